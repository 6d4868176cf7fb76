"""The demo's story, whole, on a tiny model: what it measures, what it leaves, and what a second run does again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dynadepth
from dynadepth import hub
from dynadepth.errors import AdapterError, DataError
from dynadepth.report import demo, measure, tuned
from dynadepth.report.html import render
from dynadepth.report.samples import answers, read_prompts
from dynadepth.report.summary import VARIANTS, rows, verdict
from dynadepth.report.twin import StaticTwins
from dynadepth.tuning import load_recipe
from saved_model import N_LAYERS, attach_routers

ORDER = (1, 3, 2, 0)


@pytest.fixture(scope="module")
def routed(model_folder):
    return attach_routers(hub.load_model(model_folder))


@pytest.fixture(scope="module")
def settings(model_folder):
    return demo.Settings(
        model=str(model_folder), max_samples=12, windows=1, questions=4, prompts=("why is the sky", "who are you"),
        answer_tokens=3, contexts=(16,), new_tokens=2, repeats=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def told(settings, tmp_path_factory):
    """(folder, results, steps) of one run."""
    out, steps = tmp_path_factory.mktemp("demo"), []
    results = demo.run_demo(out, settings, demo.Teller(lambda number, title: steps.append((number, title))))
    return out, results, steps


def test_story_is_whole(told):
    _, results, steps = told
    assert [number for number, _ in steps] == list(range(1, demo.STEPS + 1))
    assert [step["title"] for step in results["steps"]] == [title for _, title in steps]
    assert all(step["seconds"] >= 0 for step in results["steps"])
    assert set(results["variants"]) == set(VARIANTS)
    for name in VARIANTS:
        figures = results["variants"][name]
        assert {"perplexity", "kl", "agreement", "accuracy", "keep_all", "flops_share", "kv_share"} <= set(figures)
        assert figures["n_tokens"] == 768
    dense, routed, static = (results["variants"][name] for name in VARIANTS)
    assert (dense["kl"], dense["keep_all"], dense["kv_share"]) == (0.0, 1.0, 1.0)
    assert static["keep_all"] == pytest.approx(routed["keep_all"])
    assert static["keep_questions"] == pytest.approx(routed["keep_questions"])
    assert {cell["phase"] for cell in results["speed"]["routed"]} == {"prefill", "decode"}
    assert [sample["prompt"] for sample in results["samples"]] == ["why is the sky", "who are you"]
    assert results["samples"][0]["answers"]["dense"]["route"] is None
    assert results["tuning"]["reused"] is False
    json.dumps(results)


def test_story_can_be_shown(told):
    _, results, _ = told
    assert len(rows(results)) >= 10
    assert any("perplexity goes from" in sentence for sentence in verdict(results))
    assert "<svg" in render(json.loads(json.dumps(results)))


def test_second_run_uses_the_routers_again(told, settings, model_folder, monkeypatch):
    out, first, _ = told
    monkeypatch.setattr(tuned, "tune", lambda *_, **__: pytest.fail("tuned again"))
    model, tokenizer = hub.load_model(model_folder), hub.load_tokenizer(model_folder)
    again = tuned.tuned_routers(
        out / "routers", model, tokenizer, [None] * 12, demo.load_recipe(), name=settings.model, budget=settings.budget,
        seed=settings.seed, detail=print,
    )  # fmt: skip
    assert again["reused"] is True
    assert again["losses"] == first["tuning"]["losses"]
    assert answers(model, tokenizer, settings.prompts, 3) == [s["answers"]["routed"] for s in first["samples"]]


def test_only_routers_of_the_same_run_are_used_again(told, settings, model_folder, tmp_path):
    model, recipe = hub.load_model(model_folder), demo.load_recipe()
    folder = shutil.copytree(told[0] / "routers", tmp_path / "routers")
    same = {"name": settings.model, "budget": settings.budget, "seed": settings.seed, "n_samples": 12}
    assert tuned.is_reusable(folder, model, recipe, **same)
    for change in ({"budget": 0.5}, {"seed": 1}, {"n_samples": 10}):
        assert not tuned.is_reusable(folder, model, recipe, **same | change)
    assert not tuned.is_reusable(folder, model, replace(recipe, epochs=1.0), **same)
    assert not tuned.is_reusable(tmp_path, model, recipe, **same)
    config = folder / "routing_config.json"
    document = json.loads(config.read_text(encoding="utf-8"))
    for change in ({"stopped": {"step": 3, "why": "interrupted"}}, {"run": {}}, {"result": None}):
        changed = document | {"provenance": document["provenance"] | change}
        config.write_text(json.dumps(changed), encoding="utf-8")
        assert not tuned.is_reusable(folder, model, recipe, **same)


def test_twins_skip_the_least_important(routed):
    twins = StaticTwins(routed, ORDER)
    assert [twins.skipped(count) for count in range(4)] == [(), (1,), (1, 3), (1, 2, 3)]
    twin = twins.skipping(2)
    assert dynadepth.routing_of(twin).config.skip == (1, 3)
    assert twin.lm_head.weight.data_ptr() == routed.lm_head.weight.data_ptr()
    assert twins.skipping(2) is twin
    assert twins.nearest(0.45) is twin
    assert dynadepth.routing_of(routed).config.name == "mindskip"


def test_routers_of_a_newer_version_are_not_tuned_over(routed, tmp_path):
    folder = dynadepth.save(routed, tmp_path / "routers")
    file = folder / "routing_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}), encoding="utf-8")
    with pytest.raises(AdapterError, match=r"format 99.*upgrade"):
        tuned.is_reusable(folder, routed, load_recipe(), name="tiny", budget=0.5, seed=0, n_samples=3)


@pytest.mark.parametrize("keep", [1.0, 0.9, 0.75, 0.6, 0.5, 0.25])
def test_mixture_has_exactly_the_keep_ratio(routed, keep):
    twins = StaticTwins(routed, ORDER)
    mixture = twins.mixture(keep)
    assert sum(share for _, share in mixture) == pytest.approx(1)
    assert sum(share * (N_LAYERS - count) for count, share in mixture) / N_LAYERS == pytest.approx(keep, abs=1e-3)


def test_matched_figures_are_means_over_the_mixture(routed):
    twins = StaticTwins(routed, ORDER)

    def measured(model):
        skipped = float(len(dynadepth.routing_of(model).config.skip))
        return {"skipped": skipped, "unknown": None}

    assert twins.matched(0.6, measured) == {"skipped": pytest.approx(1.6), "unknown": None}


def test_static_execute_all_is_dense(routed):
    tokenizer_free = torch.randint(4, 20, (2, 9), generator=torch.Generator().manual_seed(0))
    twin = StaticTwins(routed, ORDER).skipping(0)
    with torch.no_grad(), dynadepth.disabled(routed):
        assert torch.equal(twin(tokenizer_free).logits, routed(tokenizer_free).logits)


def test_answers_record_each_row(routed, model_folder):
    tokenizer = hub.load_tokenizer(model_folder)
    outputs = answers(routed, tokenizer, ["why is the sky blue", "who", "the function of it"], 4)
    with dynadepth.disabled(routed):
        dense = answers(routed, tokenizer, ["who"], 4)
    assert all(set(output["route"]) == {f"{i}.attention" for i in range(N_LAYERS)} for output in outputs)
    assert dense[0]["route"] is None
    assert dense[0]["keep_ratio"] is None
    with pytest.raises(DataError, match="no prompt"):
        answers(routed, tokenizer, [])


def test_tokens_end_with_the_end(routed, model_folder, monkeypatch):
    tokenizer = hub.load_tokenizer(model_folder)
    written = answers(routed, tokenizer, ["who"], 4)[0]["tokens"]
    monkeypatch.setattr("dynadepth.report.samples.end_ids", lambda *_: {written[1]})
    assert answers(routed, tokenizer, ["who"], 4)[0]["tokens"] == written[: written.index(written[1]) + 1]


def test_prompt_files(tmp_path: Path):
    rows_file, lines = tmp_path / "p.jsonl", tmp_path / "p.txt"
    rows_file.write_text('{"prompt": "a\\nb"}\n{"prompt": "c"}\n', encoding="utf-8")
    lines.write_text("a b\n\nc\n", encoding="utf-8")
    assert read_prompts(rows_file) == ["a\nb", "c"]
    assert read_prompts(lines) == ["a b", "c"]
    rows_file.write_text('{"prompt": "a"}\n{"question": "c"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"Row 2 of .*p\.jsonl has no text field 'prompt' but 'question'"):
        read_prompts(rows_file)
    with pytest.raises(DataError, match="no file"):
        read_prompts(tmp_path / "none.txt")


def test_help_text_depends_on_the_seed_alone():
    assert measure.help_text(0) == measure.help_text(0) != measure.help_text(1)
    assert len(measure.help_text(0)) == len(measure.help_text(1)) > 100_000
