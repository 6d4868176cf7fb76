"""`--budget 1.3x`: solved from the machine's cost table (a made-up one here), said in one line, kept in the JSON."""

from __future__ import annotations

import json

import pytest

from dynadepth.benchmark import machine
from dynadepth.benchmark.cost_table import CostTable, Times, Workload
from dynadepth.cli.options import Speed, parse_budget
from saved_model import save_model, save_routers


@pytest.fixture(autouse=True)
def measured(monkeypatch, tmp_path) -> list[Workload]:
    """Replaces measuring by a made-up table and tells which workloads were asked for; the cache is this test's own."""
    monkeypatch.setenv("DYNADEPTH_CACHE", str(tmp_path / "cache"))
    calls: list[Workload] = []

    def measure(model, workload, progress=None):
        calls.append(workload)
        gained = 2 if workload.context == 1024 else 3
        return CostTable(workload, Times(gained, 0.0), {0.0: Times(1, 0.0), 1.0: Times(gained, 0.0)})

    monkeypatch.setattr(machine, "measure_table", measure)
    return calls


SAID = "1.5x asked: budget 0.33 of the attentions (expected 1.50x at 1,024 + 64 tokens on this machine)"


def check(document, result):
    assert SAID in result.stderr.splitlines()
    assert "asked" not in result.stdout
    record = document["provenance"]["routers"]
    assert record["budget"] == 0.33
    assert record["speedup"]["asked"] == "1.5x"
    assert record["speedup"]["expected"] == pytest.approx(2 / 1.33)
    assert record["speedup"]["cost_table"]["dense"] == {"prefill_s": 2.0, "decode_s": 0.0}


def test_generate(answered, model_folder, routers_folder, measured):
    words = ("generate", model_folder, "--routers", routers_folder, "--prompt", "why is", "--max-new-tokens", 2)
    check(*answered(*words, "--budget", "1.5x"))
    check(*answered(*words, "--budget", "1.5x"))
    assert measured == [Workload()]  # the second time the table is read
    document, result = answered(*words, "--budget", "1.5×@1900+9")
    assert "1.5x asked: budget 0.50 of the attentions (expected 1.50x at 1,900 + 9 tokens" in result.stderr
    assert document["provenance"]["routers"]["speedup"]["cost_table"]["context"] == 1900
    document, _ = answered(*words, "--budget", "0.5")
    assert document["provenance"]["routers"]["speedup"] is None


def test_eval_and_bench(answered, model_folder, routers_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("why is the sky blue and what is a class " * 120, encoding="utf-8")
    common = (model_folder, "--routers", routers_folder, "--budget", "1.5x")
    check(*answered("eval", *common, "--perplexity", text))
    check(*answered("bench", *common, "--context", 8, "--new-tokens", 2, "--repeats", 1))


def test_1x_is_dense(answered, model_folder, routers_folder, measured):
    document, _ = answered(
        "generate", model_folder, "--routers", routers_folder, "--prompt", "why is", "--budget", "1x"
    )
    assert document["provenance"]["routers"]["budget"] == 1.0
    assert document["provenance"]["routers"]["speedup"]["asked"] == "1x"
    assert document["outputs"][0]["keep_ratio"]["all"] == 1.0
    assert not measured


def test_out_of_reach(refused, model_folder, routers_folder):
    sentence = refused("generate", model_folder, "--routers", routers_folder, "--prompt", "why", "--budget", "2.5x")
    assert "2.5x cannot be reached on this machine: the largest at 1,024 + 64 tokens is 1.60x" in sentence
    assert "2.5x@2048+64" in sentence


def test_a_context_that_the_model_does_not_read(refused, tmp_path):
    folder = save_model(tmp_path / "short", max_position_embeddings=64)
    routers = save_routers(tmp_path / "routers", folder)
    words = ("generate", folder, "--routers", routers, "--prompt", "why", "--budget", "1.3x")
    assert "the model reads 64" in refused(*words)


def test_tune_solves_before_it_tunes(run, model_folder, tmp_path, measured):
    data, out = tmp_path / "data.jsonl", tmp_path / "routers"
    rows = [{"prompt": f"why is the {word}", "completion": " the sky is blue"} for word in ("sky", "class") * 15]
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    result = run("tune", model_folder, "--out", out, "--data", data, "--budget", "1.5x")
    assert result.exit_code == 0, result.output
    assert SAID in result.stderr.splitlines()
    saved = json.loads((out / "routing_config.json").read_text(encoding="utf-8"))
    assert saved["provenance"]["budget"] == saved["budget"] == 0.33
    assert saved["speedup"]["asked"] == "1.5x"
    again = run(
        "generate", model_folder, "--routers", out, "--prompt", "why", "--budget", "1.5x", "--max-new-tokens", 1
    )
    assert SAID in again.stderr.splitlines()
    assert measured == [Workload()]  # one table before and after tuning


def test_what_the_texts_mean():
    assert parse_budget(None) is None
    assert parse_budget("0.75") == 0.75
    assert parse_budget(" 1.3X ") == Speed("1.3X", 1.3)
    assert parse_budget("2x@4096+128") == Speed("2x@4096+128", 2.0, {"context": 4096, "new_tokens": 128})
