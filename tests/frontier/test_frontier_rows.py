"""Rows beyond the plain ones: orders by removal, fitted skip paths, routes of other inputs, token granularity."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from runs import forget_cells

from dynadepth import attach, detach, is_attached, load, lora, recording, routing_of
from dynadepth.budget import KEEPS, prompts_to_batches, up_to
from dynadepth.errors import ConfigError, UnsupportedModelError
from dynadepth.evaluation import evaluate
from dynadepth.frontier import makers, orders, run, static, workbench
from dynadepth.frontier.given import giving, watching
from dynadepth.frontier.run import Teller, run_frontier
from dynadepth.frontier.shuffled import deranged, shuffled
from dynadepth.frontier.workbench import Workbench
from dynadepth.methods import MindSkipConfig
from dynadepth.removal import Damage
from dynadepth.report.folder import read_folder
from dynadepth.report.frontier_table import compared
from dynadepth.routing.decision import Site
from dynadepth.tuning import load_recipe
from dynadepth.tuning.data import pad_token_id
from dynadepth.tuning.start import held_out
from saved_model import WORDS, attach_routers, save_routers


def skipped(cell):
    return {int(site.split(".")[0]) for site, share in cell["site_keep"].items() if share == 0}


class TestOrdersByRemoval:
    @pytest.fixture
    def calls(self, monkeypatch):
        """Routes whose damage was measured; an entry `interrupt` stops at the so-manieth."""
        made = []
        of = Damage.of

        def counted(self, route):
            made.append(set(route))
            if len(made) == getattr(counted, "interrupt", None):
                raise KeyboardInterrupt
            return of(self, route)

        monkeypatch.setattr(Damage, "of", counted)
        made_by = type("Calls", (), {"made": made, "interrupt": lambda n: setattr(counted, "interrupt", n)})
        return made_by

    def test_they_are_measured_once_and_in_force(self, opened, settings, tmp_path, calls):
        asked = settings("static-alone", "static-greedy")
        found = run_frontier(*opened, asked, tmp_path)
        assert not is_attached(opened[0])
        assert len(calls.made) <= 4 + 1 + 3, "the greedy search knows the damages alone"
        scores = {name: json.loads((tmp_path / "scores" / f"{name}.json").read_text()) for name in asked.methods}
        alone = scores["static-alone"]["alone"]
        assert set(alone) == {f"{layer}.attention" for layer in range(4)}
        lowest = sorted(alone, key=lambda site: alone[site])
        assert skipped(found.cells["static-alone"][0.5]) == {Site.parse(site).layer for site in lowest[:2]}
        chosen = scores["static-greedy"]["chosen"]
        assert skipped(found.cells["static-greedy"][0.75]) == {Site.parse(next(iter(chosen))).layer}
        assert skipped(found.cells["static-greedy"][0.5]) == {Site.parse(site).layer for site in chosen}
        assert scores["static-greedy"]["provenance"]["seed"] == 0
        calls.made.clear()
        forget_cells(tmp_path)
        run_frontier(*opened, asked, tmp_path)
        assert calls.made == []

    def test_a_lower_budget_and_an_interrupted_search_go_on(self, opened, settings, tmp_path, calls):
        whole = tmp_path / "whole"
        run_frontier(*opened, settings("static-greedy", budgets=(0.25,)), whole)
        wanted = json.loads((whole / "scores" / "static-greedy.json").read_text())["chosen"]
        cut, file = tmp_path / "cut", tmp_path / "cut" / "scores" / "static-greedy.json"
        calls.made.clear()
        calls.interrupt(6)  # in the second round: four alone, and the best of them, come first
        with pytest.raises(KeyboardInterrupt):
            run_frontier(*opened, settings("static-greedy", budgets=(0.5,)), cut)
        assert not is_attached(opened[0])
        assert len(json.loads(file.read_text())["chosen"]) == 1
        calls.interrupt(None)
        for budget, count in ((0.5, 2), (0.25, 3)):
            calls.made.clear()
            run_frontier(*opened, settings("static-greedy", budgets=(budget,)), cut)
            assert {len(route) for route in calls.made} == {count}
        assert json.loads(file.read_text())["chosen"] == pytest.approx(wanted)

    def test_a_first_greedy_round_that_was_interrupted_goes_on(self, opened, settings, tmp_path, calls):
        asked = settings("static-greedy", budgets=(0.75,))
        calls.interrupt(3)
        with pytest.raises(KeyboardInterrupt):
            run_frontier(*opened, asked, tmp_path)
        before = calls.made[:2]
        calls.interrupt(None)
        calls.made.clear()
        run_frontier(*opened, asked, tmp_path)
        assert len(calls.made) == 3, "two that were not measured, and the best of all four"
        assert not any(route in before for route in calls.made[:2])

    def test_an_interrupted_pass_over_single_sublayers_goes_on(self, opened, settings, tmp_path, calls):
        asked = settings("static-alone", budgets=(0.5,))
        calls.interrupt(3)
        with pytest.raises(KeyboardInterrupt):
            run_frontier(*opened, asked, tmp_path)
        file = tmp_path / "scores" / "static-alone.json"
        before = json.loads(file.read_text())["alone"]
        assert len(before) == 2
        calls.interrupt(None)
        calls.made.clear()
        run_frontier(*opened, asked, tmp_path)
        assert len(calls.made) == 2
        after = json.loads(file.read_text())["alone"]
        assert len(after) == 4
        assert {site: after[site] for site in before} == before

    def test_scores_of_other_settings_are_refused_and_damaged_ones_measured_again(
        self, opened, settings, tmp_path, calls, monkeypatch
    ):
        asked = settings("static-alone", budgets=(0.5,))
        run_frontier(*opened, asked, tmp_path)
        forget_cells(tmp_path)
        calls.made.clear()
        monkeypatch.setattr(orders, "TOKENS", 100)
        with pytest.raises(
            ConfigError, match=r"static-alone\.json were measured with other settings \(removal: tokens"
        ):
            run_frontier(*opened, asked, tmp_path)
        assert calls.made == []
        (tmp_path / "scores" / "static-alone.json").write_text('{"format": 1}')
        told = []
        run_frontier(*opened, asked, tmp_path, Teller(detail=told.append))
        assert len(calls.made) == 4
        assert any("static-alone.json is damaged" in line and "measured again" in line for line in told)


def test_importance_is_measured_once_for_a_folder(opened, settings, tmp_path, monkeypatch):
    """Rows of one target share it, and a resumed run reads it."""
    measured, original = [], workbench.scores_of

    def counted(*args):
        measured.append(original(*args))
        return measured[-1]

    monkeypatch.setattr(workbench, "scores_of", counted)
    asked = settings("static", "static-linear")
    first = run_frontier(*opened, asked, tmp_path)
    assert len(measured) == 1
    forget_cells(tmp_path)
    again = run_frontier(*opened, asked, tmp_path)
    assert len(measured) == 1
    assert [c["site_keep"] for c in again.cells["static"].values()] == [
        c["site_keep"] for c in first.cells["static"].values()
    ]
    saved = json.loads((tmp_path / "scores" / "static.json").read_text())["cosine"]
    assert {Site.parse(site): score for site, score in saved.items()} == measured[0]


def test_static_linear_is_static_with_fitted_paths(opened, settings, tmp_path, monkeypatch):
    fits, original = [], workbench.fit_paths

    def fit_paths(model, batches, progress=None):
        fits.append(original(model, batches, progress))
        return fits[-1]

    monkeypatch.setattr(workbench, "fit_paths", fit_paths)
    asked = settings("static", "static-linear")
    found = run_frontier(*opened, asked, tmp_path)
    assert len(fits) == 1
    assert not is_attached(opened[0])
    for budget in asked.budgets:
        plain, linear = found.cells["static"][budget], found.cells["static-linear"][budget]
        assert linear["site_keep"] == plain["site_keep"]
        assert linear["text"]["kl"] != plain["text"]["kl"]
        assert linear["text"]["flops_share"] > plain["text"]["flops_share"]
        assert linear["tuning"]["steps"] == 0
        assert linear["tuning"]["n_trainable"] > 0
    model = load(opened[0], tmp_path / "routers" / "static-linear")
    assert {str(site): share for site, share in fits[0].items()} == routing_of(model).provenance["result"]["explained"]
    assert any(path.write.abs().sum() > 0 for path in routing_of(model).paths().values())


def test_static_damage_orders_by_what_is_lost_with_the_skip_path_in_place(opened, settings, tmp_path, monkeypatch):
    asked = settings("static-damage", budgets=(0.75, 0.5))
    found = run_frontier(*opened, asked, tmp_path)
    assert not is_attached(opened[0])
    file = tmp_path / "scores" / "static-damage.json"
    scores = json.loads(file.read_text())["alone"]
    # the same by plain forwards under the saved paths
    model, bench = opened[0], Workbench(*opened, asked, tmp_path)
    heldout = bench.split("static-damage", load_recipe())[0]
    texts = prompts_to_batches(up_to((e.input_ids for e in heldout), orders.TOKENS), pad_token_id(opened[1]))
    load(model, tmp_path / "routers" / "static-damage")
    damage = Damage(model, texts, stride=orders.STRIDE)
    assert scores == pytest.approx({str(site): damage.of([site]) for site in damage.sites}, rel=1e-4)
    detach(model)
    layers = [Site.parse(site).layer for site in sorted(scores, key=lambda site: scores[site])]
    assert skipped(found.cells["static-damage"][0.75]) == {layers[0]}
    assert skipped(found.cells["static-damage"][0.5]) == set(layers[:2])
    forget_cells(tmp_path)
    monkeypatch.setattr(Damage, "of", lambda *_: pytest.fail("measured again"))
    run_frontier(*opened, asked, tmp_path)
    forget_cells(tmp_path)
    monkeypatch.setattr(workbench, "fit_tokens", lambda model: 50)
    with pytest.raises(
        ConfigError, match=r"static-damage(\.json)? were (made|measured) with other settings \(.*50 here"
    ):
        run_frontier(*opened, asked, tmp_path)


def test_fitted_paths_are_used_again_where_settings_are_the_same(opened, settings, tmp_path, monkeypatch):
    asked = settings("static-linear", budgets=(0.5,))
    run_frontier(*opened, asked, tmp_path)
    forget_cells(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(workbench, "fit_paths", lambda *_: pytest.fail("fitted again"))
        run_frontier(*opened, asked, tmp_path)
    forget_cells(tmp_path)
    weights = tmp_path / "routers" / "static-linear" / "routers.safetensors"
    whole, told = weights.read_bytes(), []
    weights.write_bytes(whole[:100])
    run_frontier(*opened, asked, tmp_path, Teller(told.append))
    assert "static-linear" in told[0]
    assert told[0].endswith("They are made again.")
    assert not any("made again" in line for line in told[1:]), "said once"
    assert weights.read_bytes()[100:] == whole[100:]
    forget_cells(tmp_path)
    monkeypatch.setattr(workbench, "fit_tokens", lambda model: 50)
    with pytest.raises(ConfigError, match=r"static-linear were made with other settings \(fit: tokens is 32768 there"):
        run_frontier(*opened, asked, tmp_path)


def test_what_is_not_tuned_depends_on_the_texts_of_the_recipe_alone(opened, settings, tmp_path, monkeypatch):
    """Static rows outlive a change of how routers are tuned, and not one of what is read."""
    asked = settings("static", "static-alone", "static-linear", budgets=(0.5,))
    run_frontier(*opened, asked, tmp_path)
    monkeypatch.setattr(run, "_measure", lambda *_: pytest.fail("measured again"))

    def changed(**fields):
        recipe = replace(load_recipe(), **fields)
        for module in (static, orders):
            monkeypatch.setattr(module, "load_recipe", lambda: recipe)

    changed(bias_learning_rate=0.5, method={**load_recipe().method, "granularity": "sequence"})
    run_frontier(*opened, asked, tmp_path)
    changed(passages=0.5)
    with pytest.raises(ConfigError, match=r"static@0.5.json was made .*texts: passages is 0.8 there and 0.5 here"):
        run_frontier(*opened, asked, tmp_path)


@pytest.fixture
def varied(tmp_path):
    """Texts and a task whose inputs differ, as settings."""
    text = " ".join(" ".join([WORDS[i % 25], WORDS[(5 * i + 3) % 25], "the"] * 350) for i in range(5))
    (tmp_path / "varied.txt").write_text(text, encoding="utf-8")
    (tmp_path / "tasks").mkdir()
    words = ("why", "class", "function", "sky")
    rows = [{"query": " ".join([w] * 6), "choices": ["blue", "sky is"], "gold": 0} for w in words]
    (tmp_path / "tasks" / "beta.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return {
        "perplexity": (str(tmp_path / "varied.txt"),), "max_windows": 5, "tasks": ("beta",),
        "task_data": str(tmp_path / "tasks"),
    }  # fmt: skip


class TestShuffled:
    def test_nobody_keeps_the_own_route(self):
        routes = {(number,): {Site(0, "attention"): number} for number in range(7)}
        others = deranged(routes, seed=3)
        assert set(others) == set(routes)
        assert all(others[prompt] != route for prompt, route in routes.items())
        assert {tuple(route.values()) for route in others.values()} == {
            tuple(route.values()) for route in routes.values()
        }
        assert others == deranged(routes, seed=3)
        assert others != deranged(routes, seed=4)

    def test_every_input_takes_the_route_of_another(self, opened, varied):
        model, tokenizer = opened
        attach_routers(model)
        inputs = {**varied, "with_rows": True, "compare_dense": True}
        (file,) = varied["perplexity"]
        with watching(model) as chosen:
            before = evaluate(model, tokenizer, **inputs)
        assert len(chosen) == 4 + 5  # contexts of the task, then windows
        first, *_ = windows = list(chosen)[4:]
        others = deranged(chosen, seed=0) | {first: chosen[first]}
        with giving(model, others), watching(model) as seen:
            after = evaluate(model, tokenizer, **inputs)
        assert seen == others
        same = [chosen[prompt] == others[prompt] for prompt in windows]
        assert same[0]
        assert not all(same)
        for kind in ("perplexity", "kl"):
            was, now = (found["rows"][kind][file] for found in (before, after))
            assert [a == pytest.approx(b, rel=1e-6) for a, b in zip(was, now, strict=True)] == same
        with watching(model) as again:
            evaluate(model, tokenizer, **inputs)
        assert again == chosen, "the routers decide again"

    def test_generation_keeps_the_given_route(self, opened):
        model, _ = opened
        attach_routers(model)
        ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
        inputs = {"input_ids": ids, "attention_mask": (ids > 0).long(), "max_new_tokens": 4, "min_new_tokens": 4}
        with watching(model) as chosen:
            model.generate(**inputs)
        assert list(chosen) == [(5, 6, 7), (8, 9, 10, 11, 12)]
        sites = routing_of(model).sites
        given = {prompt: dict.fromkeys(sites, row == 0) for row, prompt in enumerate(chosen)}
        with giving(model, given), recording() as record:
            model.generate(**inputs)
        assert [set(row.values()) for row in record._sequences("decode")] == [{1.0}, {0.0}]

    def test_the_row(self, opened, settings, varied, model_folder, tmp_path, monkeypatch):
        routers = save_routers(tmp_path / "random", model_folder)
        monkeypatch.setattr(Workbench, "routers", lambda *_: routers)
        asked = settings("default-shuffled", budgets=(0.5,), bench=True, **varied)
        found = run_frontier(*opened, asked, tmp_path / "out")
        assert [row["name"] for row in found.methods] == ["dense", "default", "default-shuffled"]
        own, cell = found.cells["default"][0.5], found.cells["default-shuffled"][0.5]
        assert own["routes"]["distinct"] > 1
        assert cell["text"]["keep_ratio"] == pytest.approx(own["text"]["keep_ratio"])
        assert cell["site_keep"] == pytest.approx(own["site_keep"])
        assert cell["routes"] == own["routes"]
        assert cell["shuffled"]["texts"]["inputs"] == 5
        assert 0 < cell["shuffled"]["texts"]["changed"] <= 5
        assert cell["shuffled"]["tasks"]["inputs"] == 4
        assert (cell["kinds"], cell["samples"], cell["speed"]) == ({}, [], [])
        beside = cell["against"]
        assert beside["row"] == "default"
        ratio = cell["text"]["perplexity"]["varied.txt"]["ppl"] / own["text"]["perplexity"]["varied.txt"]["ppl"]
        assert beside["perplexity"]["varied.txt"]["value"] == pytest.approx(ratio)
        assert beside["kl"]["varied.txt"]["value"] == pytest.approx(cell["text"]["kl"] - own["text"]["kl"])
        (sentence,) = compared(found)
        assert sentence.startswith(f"default-shuffled at 0.5: perplexity {ratio:.3f} × that of default (95 % ")
        assert f"{cell['shuffled']['texts']['changed']} of 5 windows had another route" in sentence

    def test_tokens_have_no_route(self, opened, settings):
        model, tokenizer = opened
        attach(model, MindSkipConfig(granularity="token"))
        with pytest.raises(AssertionError, match="belongs to a sequence"):
            shuffled(model, tokenizer, settings("default"), print)


def test_the_default_recipe_by_token(opened, settings, tmp_path):
    found = run_frontier(*opened, settings("default-token", budgets=(0.5,)), tmp_path)
    cell = found.cells["default-token"][0.5]
    assert cell["granularity"] == "token"
    assert cell["provenance"]["routers"]["config"]["skip_path"] == "linear"
    assert cell["tuning"]["steps"] > 0
    # One held-out text of ten tokens calibrates nothing; budgets are met in tests/tuning/test_token_routers.py.
    assert 0 < cell["text"]["keep_ratio"]["all"] < 1
    assert cell["text"]["kv_share"] == 1.0, "skipped tokens keep their keys and values"
    assert (cell["routes"]["distinct"], cell["routes"]["entropy"]) == (None, None)
    assert 0 <= cell["routes"]["agreement"] <= 1
    assert all("".join(piece for piece, _ in sample["depth"]) == sample["text"] for sample in cell["samples"])


def test_the_default_recipe_with_lora(opened, settings, tmp_path):
    found = run_frontier(*opened, settings("default-lora", budgets=(0.5,), bench=True), tmp_path)
    cell = found.cells["default-lora"][0.5]
    assert cell["provenance"]["routers"]["lora"]["rank"] == 16
    assert (tmp_path / "routers" / "default-lora" / "adapter_model.safetensors").is_file()
    assert found.cells["dense"][1.0]["text"]["flops_share"] == 1.0
    assert {one["variant"] for one in cell["speed"]} == {"routed"}
    model = opened[0]
    assert not is_attached(model)
    assert not any("lora_" in name for name in model.state_dict())
    run_frontier(model, opened[1], settings("default-lora", budgets=(0.5,), bench=True), tmp_path)  # all is there


def test_a_model_that_can_have_no_lora_is_said_before_any_cell(opened, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(lora, "linear_sides", lambda model: {})
    told = []
    found = run_frontier(*opened, settings("default-lora", "static", budgets=(0.5,)), tmp_path, Teller(told.append))
    assert [row["name"] for row in found.methods] == ["dense", "static"]
    assert told[0].startswith("default-lora is left out: LlamaForCausalLM can have no LoRA")
    assert not is_attached(opened[0])


def test_a_method_that_the_model_cannot_have_is_said_and_left_out(opened, settings, tmp_path, monkeypatch):
    def refusing(model, config):
        if config.granularity == "token":
            raise UnsupportedModelError("no keys and values of skipped tokens")
        return attach(model, config)

    monkeypatch.setattr(makers, "attach", refusing)
    told = []
    found = run_frontier(*opened, settings("default-token", "random", budgets=(0.5,)), tmp_path, Teller(told.append))
    assert [row["name"] for row in found.methods] == ["dense", "random"]
    assert told[0] == "default-token is left out: no keys and values of skipped tokens"
    assert found.problems == []


def test_a_row_compared_on_one_window_has_no_interval(opened, settings, tmp_path):
    """It is measured, kept and shown all the same."""
    asked = settings("default-shuffled", budgets=(0.5,), max_windows=1)
    found = run_frontier(*opened, asked, tmp_path / "out")
    (sentence,) = compared(found)
    assert re.search(r"perplexity \d\.\d{3} × that of default, KL [+-]", sentence)
    assert read_folder(tmp_path / "out").cells["default-shuffled"][0.5]["against"]["row"] == "default"


def test_paths_are_fitted_on_the_texts_that_a_tuning_fits_them_on(opened, settings, tmp_path):
    recipe = load_recipe()
    bench = Workbench(*opened, settings("default"), tmp_path)
    held, training = bench.split("default", recipe)
    n = len(held) + len(training)
    assert len(held) == held_out(recipe, n, len(KEEPS)) > round(recipe.holdout * n)
