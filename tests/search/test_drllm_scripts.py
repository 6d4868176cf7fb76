"""The scripts of benchmarks/drllm on a tiny model: that they run, and what their figures rest on."""

from __future__ import annotations

import importlib
import json
import random
import sys
from pathlib import Path

import pytest

from dynadepth import hub
from dynadepth.search import search_files
from dynadepth.search.searcher import SearchSettings
from dynadepth.search.tree import TreeSettings

FOLDER = Path(__file__).parents[2] / "benchmarks" / "drllm"


@pytest.fixture
def script(monkeypatch):
    """By its name; other folders of benchmarks have a table.py, too."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name):
        sys.modules.pop(name, None)
        return importlib.import_module(name)

    yield load
    sys.modules.pop("table", None)


def test_what_routes_are_worth(script, model_folder, arc, tmp_path, capsys):
    data, out = arc(16), tmp_path / "routes.jsonl"
    model, tokenizer = hub.load_model(model_folder, dtype="float32"), hub.load_tokenizer(model_folder)
    search_files(model, tokenizer, [data], out, SearchSettings(TreeSettings(simulations=12, repeats=2), margin=0.01))
    script("oracle").main(model_folder, str(out), [str(data)], 0, 4)
    found = json.loads(capsys.readouterr().out)
    rows = found["rows"]
    assert list(rows) == ["dense", "oracle", "static", "shuffled", "random"]
    assert found["prompts"] == 8
    assert rows["dense"]["layers"] == 4
    assert rows["oracle"]["accuracy"] >= rows["dense"]["accuracy"]
    assert rows["random"]["layers"] == rows["oracle"]["layers"]
    assert found["replayed"]["apart"]["same"] == 1
    assert len(found["static_route"]) == 4


def test_random_routes_keep_the_rules_of_the_search(script):
    oracle, rules = script("oracle"), TreeSettings(max_consecutive_skips=1, repeats=2)
    drawn = {oracle.random_like((1, 3, 0, 1, 0), random.Random(seed), rules) for seed in range(40)}
    assert len(drawn) > 5
    assert all(sorted(route) == [0, 0, 1, 1, 3] and rules.allows(route) for route in drawn)


def test_the_table_against_the_goals(script, tmp_path, capsys):
    def task(acc, low, high):
        return {"metric": "acc", "acc": acc, "n": 10, "diff_vs_dense": [low, high], "acc_diff_vs_dense": [low, high]}

    tasks = {"arc_easy": task(0.5, 0.0, 0.2), "piqa": task(0.6, -0.1, 0.1)}
    dense = {"tasks": {"arc_easy": {"acc": 0.4}, "piqa": {"acc": 0.62}}}
    (tmp_path / "eval.json").write_text(json.dumps({"tasks": tasks, "dense": dense}), encoding="utf-8")
    script("table").main([str(tmp_path / "eval.json")])
    text = capsys.readouterr().out
    assert "| arc_easy | 10 | acc | 40.0 % | 50.0 % | +10.0 (+0.0 to +20.0) |" in text
    assert "in domain, `acc`, mean of 1: +10.00 points (goal: at least +2.00)" in text
    assert "out of domain, `acc`, mean of 1: -2.00 points (goal: at least -0.85)" in text
