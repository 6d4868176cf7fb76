"""What a killed run keeps of the cell that it was at."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from runs import settings_for

from dynadepth import attach, detach
from dynadepth.errors import DataError
from dynadepth.evaluation import evaluate
from dynadepth.frontier import scoring
from dynadepth.frontier.pieces import Pieces, state_of
from dynadepth.frontier.run import run_frontier
from dynadepth.methods import MindSkipConfig, StaticConfig
from dynadepth.report.cells import read_cell
from dynadepth.routed import routing_of


@pytest.fixture
def two(model_folder, data, tmp_path):
    """Two texts and two tasks for a fixed route."""
    (tmp_path / "more.txt").write_text("you me three of on you three " * 160, encoding="utf-8")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    rows = [{"query": f"why is the {n} sky", "choices": ["blue", "a class"], "gold": n % 2} for n in range(5)]
    (tasks / "beta.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tasks / "gamma.jsonl").write_text("\n".join(map(json.dumps, rows[:3])), encoding="utf-8")
    texts = {**data, "perplexity": (*data["perplexity"], str(tmp_path / "more.txt")), "task_data": str(tasks)}
    return settings_for(model_folder, {**texts, "tasks": ("beta", "gamma")}, methods=("static",), budgets=(0.5,))


@pytest.fixture
def evaluated(monkeypatch):
    """What was scored, in order: the names of texts and tasks."""
    seen, original = [], scoring.evaluate

    def evaluate(*args, **kwargs):
        seen.append((*kwargs.get("perplexity", ()), *kwargs.get("tasks", ()))[0].rsplit("/", 1)[-1])
        if len(seen) == evaluate.stop:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    evaluate.stop = None
    monkeypatch.setattr(scoring, "evaluate", evaluate)
    seen_and = evaluate
    seen_and.seen = seen
    return seen_and


ALL = ["text.txt", "more.txt", "beta", "gamma"]


def lasting(cell):
    """A cell without what differs from run to run."""
    return {name: value for name, value in cell.items() if name not in ("seconds", "provenance")}


def test_a_killed_cell_goes_on_at_the_text_or_task_where_it_was(opened, two, tmp_path, evaluated):
    run_frontier(*opened, two, tmp_path / "whole")
    assert evaluated.seen == ALL * 2  # dense, static
    evaluated.seen.clear()
    evaluated.stop = 7
    out = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        run_frontier(*opened, two, out)
    kept = sorted(path.name for path in (out / "pieces" / "static@0.5").iterdir())
    assert kept == ["0 text more.txt.json", "0 text text.txt.json"]
    assert not (out / "pieces" / "dense@1").exists()
    seconds = [json.loads(path.read_text())["seconds"] for path in (out / "pieces" / "static@0.5").iterdir()]
    evaluated.seen.clear()
    evaluated.stop = None
    run_frontier(*opened, two, out)
    assert evaluated.seen == ["beta", "gamma"]
    assert not (out / "pieces").exists()
    resumed, whole = (read_cell(folder / "cells" / "static@0.5.json") for folder in (out, tmp_path / "whole"))
    assert lasting(resumed) == lasting(whole)
    assert resumed["seconds"] > sum(seconds)


def test_kinds_and_samples_of_a_killed_cell_are_kept(opened, two, tmp_path, evaluated, monkeypatch):
    run_frontier(*opened, two, tmp_path / "whole")
    out, calls, timed = tmp_path / "killed", [], scoring.variety
    for name in ("by_kind", "answers"):
        own = getattr(scoring, name)
        monkeypatch.setattr(scoring, name, lambda *given, own=own, name=name: (calls.append(name), own(*given))[1])

    def killed(*given, **options):
        if calls == ["by_kind", "answers"] * 2:
            raise KeyboardInterrupt
        return timed(*given, **options)

    monkeypatch.setattr(scoring, "variety", killed)
    with pytest.raises(KeyboardInterrupt):
        run_frontier(*opened, two, out)
    kept = {path.name for path in (out / "pieces" / "static@0.5").iterdir()}
    assert {"0 kinds.json", "0 samples.json"} <= kept
    evaluated.seen.clear()
    calls.clear()
    run_frontier(*opened, two, out)
    assert calls == evaluated.seen == []
    resumed, whole = (read_cell(folder / "cells" / "static@0.5.json") for folder in (out, tmp_path / "whole"))
    assert lasting(resumed) == lasting(whole)


def test_a_damaged_piece_and_one_of_other_settings_are_measured_again(opened, two, tmp_path, evaluated):
    evaluated.stop = 8
    with pytest.raises(KeyboardInterrupt):
        run_frontier(*opened, two, tmp_path)
    evaluated.stop = None
    damaged = tmp_path / "pieces" / "static@0.5" / "0 task beta.json"
    damaged.write_text(damaged.read_text()[:-40])
    evaluated.seen.clear()
    evaluated.stop = 2
    with pytest.raises(KeyboardInterrupt):
        run_frontier(*opened, two, tmp_path)
    assert evaluated.seen == ["beta", "gamma"]
    (tmp_path / "cells" / "dense@1.json").unlink()
    evaluated.seen.clear()
    evaluated.stop = None
    run_frontier(*opened, replace(two, limit=2), tmp_path)
    assert evaluated.seen == ALL * 2


def test_what_json_cannot_hold_is_measured_again(tmp_path):
    measured, pieces = [], Pieces(tmp_path, "0", {})

    def measure():
        measured.append(1)
        return {"kl": math.nan if len(measured) < 3 else 0.5, "rows": [1.0]}

    assert math.isnan(pieces("text a", measure)["kl"])
    assert math.isnan(pieces("text a", measure)["kl"])
    assert pieces("text a", measure) == pieces("text a", measure) == {"kl": 0.5, "rows": [1.0]}
    assert len(measured) == 3
    (tmp_path / "0 text a.json").write_text('{"format": 1, "settings": {}}', encoding="utf-8")
    pieces("text a", measure)
    assert len(measured) == 4


def test_pieces_are_of_one_routed_model(opened):
    model, _ = opened
    assert state_of(model) == "bare"
    attach(model, MindSkipConfig())
    before = state_of(model)
    assert before == state_of(model) != "bare"
    with torch.no_grad():
        next(iter(routing_of(model).routers().values())).weight.flatten()[0] += 1
    assert state_of(model) != before
    detach(model)
    attach(model, StaticConfig(skip=(1,)))
    static = state_of(model)
    detach(model)
    attach(model, StaticConfig(skip=(2,)))
    assert state_of(model) != static


def test_an_unknown_task_is_said_before_anything_is_measured(opened, two, tmp_path, evaluated):
    with pytest.raises(DataError, match="delta"):
        run_frontier(*opened, replace(two, tasks=("beta", "delta")), tmp_path)
    assert evaluated.seen == []


def test_pieces_together_are_one_measurement(opened, two):
    """Weighted by tokens and by sequences: what `evaluate` gives of all texts, and of all tasks."""
    model, tokenizer = opened
    attach(model, MindSkipConfig())
    torch.manual_seed(0)
    for router in routing_of(model).routers().values():
        for parameter in router.parameters():
            torch.nn.init.normal_(parameter)
    two = replace(two, max_windows=3)
    cell = scoring.measured(model, tokenizer, two, lambda line: None, prompts=False)
    texts = evaluate(model, tokenizer, perplexity=two.perplexity, max_windows=3, compare_dense=True)
    tasks = evaluate(model, tokenizer, tasks=two.tasks, task_data=two.task_data)
    assert 0 < texts["keep_ratio"]["routed"] < 1
    alone = [evaluate(model, tokenizer, perplexity=[file], max_windows=3)["keep_ratio"] for file in two.perplexity]
    assert alone[0] != alone[1], "this test needs texts that are routed differently"
    for name, value in cell["text"].items():
        expected = scoring._by_file(texts[name]) if name == "perplexity" else texts[name]
        assert flat(value) == pytest.approx(flat(expected), rel=1e-6), name
    assert {name: flat(value) for name, value in cell["tasks"].items()} == {
        name: pytest.approx(flat(tasks[name]), rel=1e-6) for name in cell["tasks"]
    }


def flat(value):
    """Numbers of a document, by their places."""
    if not isinstance(value, dict):
        return {"": value} if isinstance(value, (int, float)) else {}
    return {f"{key}/{place}": number for key, inner in value.items() for place, number in flat(inner).items()}
