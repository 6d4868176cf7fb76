"""The scripts of benchmarks/speed on tiny models: their logic and their tables. Times themselves are not tested."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

import dynadepth
from dynadepth import routing_of
from dynadepth.benchmark.timing import Work
from dynadepth.tuning.data import Collator, Example
from saved_model import save_model
from small import bare, ids

FOLDER = Path(__file__).parents[2] / "benchmarks" / "speed"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def script(name: str):
    return importlib.import_module(name)


def batches(count: int = 2) -> list[dict]:
    rows = [Example(row, 0) for row in ids(2 * count, 16).tolist()]
    return [Collator(0)(rows[2 * i : 2 * i + 2]) for i in range(count)]


@pytest.mark.parametrize("kind", ["full", "lora", "routers", "default", "paths"])
def test_each_kind_trains_its_own_parameters_alone(kind):
    tuning_cost = script("tuning_cost")
    steps = tuning_cost.Steps(kind, bare(), batches())
    names = {name for name, p in steps.model.named_parameters() if p.requires_grad}
    part = {"lora": "lora_", "routers": "depth_router", "paths": "depth_path"}.get(kind)
    if part:
        assert all(part in name for name in names)
    elif kind == "default":
        assert {"depth_path" in name or "depth_router" in name for name in names} == {True}
        assert any("depth_path" in name for name in names)
    else:
        assert names == {name for name, _ in bare().named_parameters()}
    before = {name: p.detach().clone() for name, p in steps.model.named_parameters()}
    found = steps.run(3)
    moved = {name for name, p in steps.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert moved <= names
    for one in found:
        assert one["step"] == pytest.approx(one["forward"] + one["backward"] + one["optimiser"])
        assert (one["below"] is None) == (kind in ("full", "lora"))
        if one["below"] is not None:
            assert 0 <= one["below"] < one["forward"]


def test_paths_run_at_the_recipes_budget():
    tuning_cost = script("tuning_cost")
    steps = tuning_cost.Steps("paths", bare(), batches())
    with dynadepth.recording() as record:
        steps.run(1)
    assert record.keep_ratio().all == tuning_cost.recipe_of("paths").budget


def test_rows_are_full(tmp_path):
    tuning_cost = script("tuning_cost")
    folder = str(save_model(tmp_path / "tiny"))
    found = tuning_cost.batches_of(folder, 2, 24, 3)
    assert [tuple(batch["input_ids"].shape) for batch in found] == [(2, 24)] * 3
    assert all(bool(batch["attention_mask"].all()) for batch in found)


def test_tuning_table():
    tuning_cost = script("tuning_cost")
    one = {"forward": 1.0, "backward": 2.0, "optimiser": 1.0, "step": 4.0, "below": 0.5}
    two = {"forward": 0.5, "backward": 0.3, "optimiser": 0.2, "step": 1.0, "below": 0.25}
    kinds = {
        "full": tuning_cost.figures([one] * 3, {"memory": 2**30, "trainable": 1000}, 64),
        "routers": tuning_cost.figures([two] * 3, {"memory": 2**28, "trainable": 10}, 64),
    }
    assert kinds["routers"]["tokens_per_s"] == 64
    text = tuning_cost.table({"kinds": kinds, "batch": 2, "length": 32, "provenance": {"dtype": "float32"}})
    assert "| routers | 10 | 25% (spread 0%) | 500 + 300 + 200 | 64 | 256 MiB | 25% |" in text
    assert "spends 25% of a step" in text


@pytest.mark.parametrize("name", ["transformers", "transformers-compiled", "pruned", "dynadepth"])
def test_every_rival_generates(name, monkeypatch):
    rivals = script("rivals")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # a minute of compiling is not the point
    model, prompt = bare(), ids(1, 9)[0].tolist()
    generator = rivals.Generator(name, model, length=9 + 6)
    tokens = generator.tokens(prompt, 5)
    assert generator.tokens(prompt, 5) == tokens, "nothing of the first call is left"
    plain = model.generate(torch.tensor([prompt]), max_new_tokens=5, min_new_tokens=5, do_sample=False)[0, 9:].tolist()
    assert (tokens == plain) == name.startswith("transformers")
    if name == "dynadepth":
        assert sum(router.threshold > 0 for router in routing_of(generator.model).routers().values()) == 2


def test_compiled_rivals(monkeypatch):
    rivals = script("rivals")
    given = []
    monkeypatch.setattr(dynadepth, "compile", lambda model: given.append(model) or model)
    for name, attached in (("compiled", False), ("compiled-routed", True)):
        assert rivals.prepared(name, bare()) is given[-1]
        assert dynadepth.is_attached(given[-1]) == attached


class Scripted:
    """A worker that answers what it is told to."""

    def __init__(self, seconds: float, tokens: list[int]) -> None:
        self.seconds, self.all, self.asked = seconds, tokens, []

    def ask(self, prompt, new_tokens) -> dict:
        self.asked.append((prompt, new_tokens))
        return {"seconds": self.seconds * (10 + new_tokens), "tokens": self.all[:new_tokens]}


def test_rounds_and_table():
    rivals = script("rivals")
    workers = {"transformers": Scripted(0.2, [1, 2, 3, 4, 5]), "other": Scripted(0.1, [1, 2, 9, 4, 5])}
    samples, last = rivals.rounds(workers, [[8], [9]], 4)
    assert workers["other"].asked == [(p, n) for p in ([8], [9]) for n in (1, 5)]
    assert samples["other"] == [(pytest.approx(1.1), pytest.approx(0.1), 0.4)] * 2
    document = {
        "rivals": {
            name: {**rivals.figures(samples[name]), "ready_s": 3.2, "peak_rss_bytes": last[name].get("peak")}
            for name in workers
        },
        "context": 1, "new_tokens": 4, "keep": 0.5,
    }  # fmt: skip
    text = rivals.table(document)
    assert "| other | 1,100 ms (spread 0%) | 2.00× | 10 (spread 0%) | 2.00× | – | 3 s | 40% |" in text


def test_workers_answer_in_turn_and_failures_are_said(tmp_path):
    workers = script("workers")
    program = tmp_path / "worker.py"
    program.write_text(
        f"import sys\nsys.path.insert(0, {str(FOLDER)!r})\nfrom workers import serve\n"
        "def answer(n):\n    print('words of a library')\n    return {'twice': 2 * n, 'wrong': 1 // n}\nserve(answer)\n"
    )
    with workers.Worker(sys.executable, str(program)) as worker:
        assert [worker.ask(n=n)["twice"] for n in (1, 2)] == [2, 4]
        with pytest.raises(SystemExit, match="ended with exit code 1"):
            worker.ask(n=0)
    assert worker.process.poll() == 1


@pytest.mark.parametrize("kind", ["bf16", "q8_0"])
def test_weights_are_those_of_the_embedded_file(kind, tmp_path):
    gguf = pytest.importorskip("gguf")
    from gguf.quants import dequantize, quantize

    weights = script("weights")
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).numpy()
    writer = gguf.GGUFWriter(tmp_path / "in.gguf", "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_block_count(3)
    q4 = gguf.GGMLQuantizationType.Q4_1
    writer.add_tensor("a.weight", quantize(values, q4), raw_dtype=q4)
    writer.add_tensor("norm.weight", values[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    weights.rewrite(tmp_path / "in.gguf", tmp_path / "out.gguf", kind)
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert reader.fields["llama.block_count"].contents() == 3
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert found["a.weight"].tensor_type == gguf.GGMLQuantizationType[kind.upper()]
    given = dequantize(quantize(values, q4), q4)
    got = torch.tensor(dequantize(found["a.weight"].data, found["a.weight"].tensor_type))
    wanted = torch.tensor(given).bfloat16().float()
    assert torch.equal(got, wanted) if kind == "bf16" else torch.allclose(got, wanted, atol=0.02)
    assert (found["norm.weight"].data == values[0]).all()


def test_documents_can_be_printed_again(capsys):
    """`--table FILE` of a committed file, or what `table.py` makes of it."""
    for file in (*FOLDER.rglob("*.json"), FOLDER.parent / "readme" / "bench.json"):
        document = json.loads(file.read_text(encoding="utf-8"))
        for name, key in (("tuning_cost", "kinds"), ("rivals", "rivals")):
            if key in document:
                assert script(name).table(document).startswith("Batch")
        if "cells" in document:
            script("table").main(file)
            assert capsys.readouterr().out.startswith("| prefill: batch")


def test_tables_of_a_grid(tmp_path, capsys):
    from dynadepth.benchmark import run
    from dynadepth.benchmark.variants import Variant

    table = script("table")
    compare = [Variant(kind) for kind in ("sequence", "mixed", "token-drop")] + [Variant("sequence", 1.0)]
    sizes = {"batches": [1, 8], "contexts": [8, 16, 24], "new_tokens": 2, "repeats": 1}
    cells = run(bare(), ids(8, 26), compare=compare, **sizes)
    (tmp_path / "grid.json").write_text(json.dumps({"cells": cells}), encoding="utf-8")
    table.main(tmp_path / "grid.json")
    text = capsys.readouterr().out
    assert (
        "| prefill: batch × context | dense, tokens/s | sequence@0.5 | token-drop@0.5 | sequence@1 | mixed@0.5 |"
        in text
    )
    rows = [line for line in text.splitlines() if line.startswith("| 8 × 16 |")]
    assert len(rows) == 3, "prefill, decode, memory"
    assert "50% |" in rows[2]
    for row in rows[:2]:
        skips, _, everything, _ = row.split(" | ")[2:]
        assert "× of" in skips
        assert everything.endswith("%"), "of what executes everything, the price"
    assert "- mixed batches, of the nominal saving (goal ≥ 0.90)" in text
    assert "| sequence@0.5, decode | context 8 to 24, batch 8 |" in text
    assert text.count("goal") == 2, "no cell of 512 tokens, so nothing is said of skip efficiency"


def test_goals_name_the_worst_cell():
    table = script("table")
    common = {"variant": "sequence@0.5", "granularity": "sequence", "batch": 1, "keep_ratio": 0.5, "overhead": -0.2}
    cells = [
        {**common, "phase": "prefill", "context": context, "skip_efficiency": efficiency}
        for context, efficiency in ((32, 0.1), (512, 0.85), (2048, 0.95))
    ]
    [line] = table.goals([{**cell, "nominal_efficiency": cell["skip_efficiency"]} for cell in cells])
    assert line == (
        "- skip efficiency at prefill, by sequence (goal ≥ 0.90): met in 1 of 2 cells; worst 0.85 "
        "(sequence@0.5, prefill, batch 1, context 512)"
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::mm", "products"),
        ("aten::linear", "products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::index_copy_", "gathering and scattering"),
        ("aten::copy_", "copies"),
        ("aten::mul", "element by element (norms, rotary, sums)"),
        ("aten::cumsum", "element by element (norms, rotary, sums)"),
        ("dynadepth::path_step", "element by element (norms, rotary, sums)"),
    ],
)
def test_operations_have_a_kind(name, kind):
    assert script("where").kind_of(name) == kind


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_where_the_time_goes_adds_up(phase, monkeypatch, capsys):
    where = script("where")
    monkeypatch.setattr(where, "ROUNDS", 1)
    model = bare()
    found = where.measured({"dense": model, "other": model}, Work(ids(2, 9 + where.CALLS), 9), phase)
    for one in found.values():
        assert sum(one["kinds"].values()) == pytest.approx(one["profiled_s"])
        assert one["kinds"]["products"] > 0
        assert one["kinds"]["attention"] > 0
    where.show({"phase": phase, "batch": 2, "context": 9, "models": found})
    table = capsys.readouterr().out.splitlines()
    assert table[2] == "| | dense | other |"
    assert [line.split(" | ")[0] for line in table[4:]][-2:] == ["| profiled", "| not profiled"]
