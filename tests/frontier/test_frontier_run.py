"""The frontier on a tiny model: what a cell holds, what an interruption leaves, what is never done twice."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from runs import BUDGETS, CELLS, settings_for

import dynadepth
from dynadepth import is_attached
from dynadepth.errors import BudgetError, ConfigError, DataError
from dynadepth.evaluation.scoring import DenseStates
from dynadepth.frontier import rows, run, scoring, workbench
from dynadepth.frontier.makers import Tuned
from dynadepth.frontier.run import Teller, run_frontier
from dynadepth.frontier.scoring import blend
from dynadepth.frontier.static import Static
from dynadepth.frontier.workbench import Workbench
from dynadepth.report.cells import cell_name, read_cell
from dynadepth.report.folder import read_folder
from dynadepth.report.frontier_figures import write_figures
from dynadepth.report.frontier_table import budgets_met, summary_of
from saved_model import N_LAYERS, save_routers


def cells_of(folder):
    return sorted(path.stem for path in (folder / "cells").iterdir())


@pytest.fixture
def counted(monkeypatch):
    """Names of the cells measured."""
    made = []
    original = run._measure

    def measure(bench, row, budget, wanted):
        made.append(cell_name(row.name, budget))
        return original(bench, row, budget, wanted)

    monkeypatch.setattr(run, "_measure", measure)
    return made


def test_every_cell_is_there_and_whole(finished):
    found = read_folder(finished)
    assert cells_of(finished) == CELLS
    assert found.problems == []
    assert [row["name"] for row in found.methods] == ["dense", "static", "random"]
    assert list(found.cells["static"]) == [0.75, 0.5]
    for cells in found.cells.values():
        for cell in cells.values():
            assert set(cell["kinds"]) == {"chat", "plain text", "code", "maths", "multiple choice"}
            assert len(cell["samples"]) == 4
            assert cell["tasks"]["tasks"]["alpha"]["n"] == 4
            assert cell["tasks"]["tasks"]["alpha"]["stderr"] is not None
            assert len(cell["rows"]["perplexity"]["text.txt"]) == 2
            assert cell["provenance"]["torch"] == torch.__version__
            assert cell["provenance"]["model"]["fingerprint"] == cell["settings"]["model"]
            assert cell["speed"] is None
    dense, static = found.dense, found.cells["static"][0.5]
    assert (dense["text"]["kl"], dense["text"]["keep_ratio"]["all"]) == (0.0, 1.0)
    assert static["text"]["keep_ratio"]["all"] == 0.5
    assert static["text"]["kl"] > 0
    assert static["text"]["kv_share"] == 0.5
    ratio = static["against_dense"]["perplexity"]["text.txt"]
    own, bare = (cell["text"]["perplexity"]["text.txt"]["ppl"] for cell in (static, dense))
    assert ratio["value"] == pytest.approx(own / bare)
    assert ratio["low"] <= ratio["value"] <= ratio["high"]
    assert set(static["against_dense"]["average"]) == {"value", "low", "high"}
    assert sorted(static["site_keep"].values()) == [0.0, 0.0]
    summary = json.loads((finished / "frontier.json").read_text())
    assert [line["budget"] for line in summary["cells"]] == [1.0, 0.75, 0.5, 0.75, 0.5]
    assert "/" not in json.dumps(summary["settings"])
    assert budgets_met(found)[2] == []
    off = json.loads(json.dumps(static))
    off["tasks"]["keep_ratio"]["all"] = 0.47
    found.add(off)
    assert budgets_met(found)[2] == ["static at 0.5 executed 47.0 % on the tasks."]
    found.add(static)


def test_a_second_run_measures_nothing(folder, opened, model_folder, data, counted):
    run_frontier(*opened, settings_for(model_folder, data), folder)
    assert counted == []


def test_an_interrupted_run_goes_on_where_it_was(opened, model_folder, data, tmp_path, counted, monkeypatch):
    settings, original = settings_for(model_folder, data), scoring.answers
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(scoring, "answers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_frontier(*opened, settings, tmp_path)
    assert not is_attached(opened[0])
    assert cells_of(tmp_path) == ["dense@1", "static@0.75"]
    assert counted == ["dense@1", "static@0.75", "static@0.5"]
    counted.clear()
    before = {path: path.read_bytes() for path in (tmp_path / "cells").iterdir()}
    told = []
    run_frontier(*opened, settings, tmp_path, Teller(told.append))
    assert counted == ["static@0.5", "random@0.75", "random@0.5"]
    assert {path: path.read_bytes() for path in before} == before
    assert cells_of(tmp_path) == CELLS
    assert told[0].startswith("[3/5] static@0.5: perplexity ")
    assert "2 left, " in told[0]


def test_an_interrupted_timing_loses_no_quality(opened, model_folder, data, tmp_path, monkeypatch):
    settings = settings_for(model_folder, data, methods=("static",), budgets=(0.5,), bench=True)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "timed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_frontier(*opened, settings, tmp_path)
    kept = read_cell(tmp_path / "cells" / "dense@1.json")
    assert kept["speed"] is None
    scored = []
    monkeypatch.setattr(run, "measured", lambda *a, of=run.measured, **k: (scored.append(1), of(*a, **k))[1])
    found = run_frontier(*opened, settings, tmp_path)
    assert len(scored) == 1, "dense was scored before"
    assert found.cells["static"][0.5]["speed"]
    assert {**found.dense, "speed": None, "speed_settings": None, "seconds": 0} == {**kept, "seconds": 0}


def test_a_damaged_cell_is_said_and_measured_again(folder, opened, model_folder, data, counted):
    path = folder / "cells" / "static@0.5.json"
    whole = json.loads(path.read_text())
    path.write_text(path.read_text()[:200])
    told = []
    run_frontier(*opened, settings_for(model_folder, data), folder, Teller(told.append))
    assert counted == ["static@0.5"]
    assert "static@0.5.json is damaged" in told[0]
    again = json.loads(path.read_text())
    assert again["text"] == whole["text"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"limit": 2}, "limit is not set there and 2 here"),
        ({"max_windows": 1}, "max_windows is 2 there and 1 here"),
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"tasks": ()}, "tasks: alpha"),
    ],
)
def test_cells_of_other_settings_are_refused(folder, opened, model_folder, data, counted, change, said):
    with pytest.raises(ConfigError, match=f"made with other settings .*{said}.*another --out"):
        run_frontier(*opened, settings_for(model_folder, data, **change), folder)
    assert counted == []


def test_more_budgets_and_methods_add_cells(folder, opened, model_folder, data, counted):
    settings = settings_for(model_folder, data, methods=("static-deepest",), budgets=(0.5, 0.25))
    found = run_frontier(*opened, settings, folder)
    assert counted == ["static-deepest@0.5", "static-deepest@0.25"]
    assert [row["name"] for row in found.methods] == ["dense", "static", "static-deepest", "random"]
    assert found.problems == []


def test_timing_is_added_to_finished_cells(folder, opened, model_folder, data, monkeypatch):
    monkeypatch.setattr(run, "measured", lambda *_, **__: pytest.fail("scored again"))
    settings = settings_for(model_folder, data, methods=("static",), bench=True)
    found = run_frontier(*opened, settings, folder)
    for budget in BUDGETS:
        summary = summary_of(found.cells["static"][budget])
        assert summary["prefill"]["value"] > 0
        assert summary["decode"]["value"] > 0
        assert summary["perplexity"] > 0
    with pytest.raises(ConfigError, match="context is 16 there and 8 here"):
        run_frontier(*opened, replace(settings, context=8), folder)


def test_one_tuning_serves_every_budget(opened, model_folder, data, tmp_path, monkeypatch):
    tunings, original = [], workbench.tune

    def tune(*args, **options):
        tunings.append(options["out"].name)
        return original(*args, **options)

    monkeypatch.setattr(workbench, "tune", tune)
    settings = settings_for(model_folder, data, methods=("default-static",), tasks=())
    found = run_frontier(*opened, settings, tmp_path)
    assert tunings == ["default"]
    assert [row["name"] for row in found.methods] == ["dense", "default", "default-static"]
    for budget in BUDGETS:
        routed, twin = found.cells["default"][budget], found.cells["default-static"][budget]
        assert twin["text"]["keep_ratio"]["all"] == pytest.approx(routed["text"]["keep_ratio"]["all"], abs=0.02)
        assert routed["tuning"]["steps"] > 0
        assert routed["provenance"]["routers"]["budget"] == budget
    for path in (tmp_path / "cells").iterdir():
        path.unlink()
    run_frontier(*opened, settings, tmp_path)
    assert tunings == ["default"], "routers of a finished tuning are used again"
    with pytest.raises(ConfigError, match="other settings"):
        run_frontier(*opened, replace(settings, max_samples=10), tmp_path)
    assert tunings == ["default"]


def test_a_twin_skips_in_the_order_that_tuning_measured(opened, model_folder, data, tmp_path, monkeypatch):
    """Not in that of 1 − cosine; routers that noted no order are refused with the way out."""
    settings = settings_for(model_folder, data, methods=("default-static",), tasks=(), budgets=(0.5,))
    for first in range(N_LAYERS):
        order, folder = [(first + i) % N_LAYERS for i in range(N_LAYERS)], tmp_path / str(first)
        routers = save_routers(folder / "saved", model_folder, order=order)
        monkeypatch.setattr(Workbench, "routers", lambda *_, routers=routers: routers)
        twin = run_frontier(*opened, settings, folder / "out").cells["default-static"][0.5]
        never = [layer for layer in order if twin["site_keep"][f"{layer}.attention"] == 0]
        assert 0 < len(never) < N_LAYERS
        assert never == order[: len(never)]
    routers = save_routers(tmp_path / "older", model_folder)
    monkeypatch.setattr(Workbench, "routers", lambda *_: routers)
    with pytest.raises(ConfigError, match="did not note their order: remove that folder"):
        run_frontier(*opened, settings, tmp_path / "old")


@pytest.mark.parametrize("method", ["default", "static-linear"])
def test_routers_of_a_newer_version_are_refused_and_stay(opened, model_folder, data, tmp_path, method, counted):
    settings = settings_for(model_folder, data, methods=(method,), tasks=(), budgets=(0.5,))
    folder = tmp_path / "routers" / method
    dynadepth.save(dynadepth.attach(opened[0], dynadepth.MindSkipConfig()), folder)
    dynadepth.detach(opened[0])
    file = folder / "routing_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}), encoding="utf-8")
    before = file.read_bytes()
    with pytest.raises(ConfigError, match=r"has format 99.*pip install -U dynadepth\. Or give another --out"):
        run_frontier(*opened, settings, tmp_path)
    assert file.read_bytes() == before
    assert counted == []


def test_routers_without_calibration_keep_their_own_budget(opened, model_folder, data, tmp_path):
    settings = settings_for(model_folder, data, methods=("mindskip-paper",), tasks=())
    found = run_frontier(*opened, settings, tmp_path)
    assert list(found.cells["mindskip-paper"]) == [None]
    assert cells_of(tmp_path) == ["dense@1", "mindskip-paper@own"]


def test_every_input_draws_its_own_route(opened, model_folder, data, tmp_path):
    found = run_frontier(*opened, settings_for(model_folder, data, methods=("random-per-input",), tasks=()), tmp_path)
    kinds = found.cells["random-per-input"][0.5]["kinds"].values()
    assert sum(kind["distinct"] for kind in kinds) > 8
    assert sum(kind["keep_ratio"]["all"] for kind in kinds) / len(kinds) == pytest.approx(0.5, abs=0.2)


def test_dense_reads_the_texts_once_for_all_cells(opened, model_folder, data, tmp_path, monkeypatch):
    made = []
    of = DenseStates.of

    def counting(self, ids_BT, prompt, forward):
        return of(self, ids_BT, prompt, lambda: made.append(ids_BT) or forward())

    monkeypatch.setattr(DenseStates, "of", counting)
    settings = settings_for(model_folder, data, methods=("static", "random", "random-per-input"), tasks=())
    found = run_frontier(*opened, settings, tmp_path)
    assert sum(map(len, found.cells.values())) == 7
    assert sum(map(len, made)) == settings.max_windows, "each window once, for six routed cells"


def test_unknown_methods_name_the_near_ones(opened, model_folder, data, tmp_path):
    with pytest.raises(ConfigError, match=r"no method 'statik'.*Did you mean 'static'"):
        run_frontier(*opened, settings_for(model_folder, data, methods=("statik",)), tmp_path)


@pytest.mark.parametrize("budget", [0.0, -0.5, 1.5, float("nan")])
def test_budgets_outside_their_range(model_folder, data, budget):
    with pytest.raises(BudgetError, match="above 0 and at most 1"):
        settings_for(model_folder, data, budgets=(budget,))


def test_budgets_out_of_reach_are_said_before_anything_runs(opened, model_folder, data, tmp_path, counted, monkeypatch):
    settings = settings_for(model_folder, data, methods=("static-deepest",), budgets=(0.05,))
    with pytest.raises(BudgetError, match=r"0\.05 cannot be reached by static-deepest: it skips at most 3 of 4"):
        run_frontier(*opened, settings, tmp_path)
    few = rows.Row("few", "", Tuned("default", {"method": {"method": "mindskip", "bias": True, "layers": (1,)}}))
    monkeypatch.setattr(rows, "ROWS", (*rows.ROWS, few))
    with pytest.raises(BudgetError, match="cannot be reached by few"):
        run_frontier(*opened, settings_for(model_folder, data, methods=("few",)), tmp_path)
    assert counted == []


def test_a_new_method_is_one_entry(opened, model_folder, data, tmp_path, monkeypatch):
    entry = rows.Row("static-mlp", "skips MLPs", Static("deepest", target="mlp"))
    monkeypatch.setattr(rows, "ROWS", (*rows.ROWS, entry))
    found = run_frontier(*opened, settings_for(model_folder, data, methods=("static-mlp",), tasks=()), tmp_path)
    assert set(found.cells["static-mlp"][0.5]["site_keep"]) == {"1.mlp", "2.mlp"}


def test_tuning_data_is_read_first(opened, model_folder, data, tmp_path, counted):
    settings = settings_for(model_folder, data, data_of={"default": str(tmp_path / "none.jsonl")}, methods=("default",))
    with pytest.raises(DataError, match=r"none\.jsonl.*--data default=FILE"):
        run_frontier(*opened, settings, tmp_path)
    assert counted == []


def test_mixtures_are_exact_means():
    one = {"ppl": 2.0, "nll": math.log(2), "rows": [1.0, 2.0], "n": 3, "name": "one", "none": None}
    other = {"ppl": 8.0, "nll": math.log(8), "rows": [3.0, 6.0], "n": 3, "name": "other", "none": None}
    assert blend([(0.5, one), (0.5, other)]) == {
        "ppl": pytest.approx(4.0), "nll": pytest.approx(math.log(4)), "rows": [2.0, 4.0], "n": 3, "name": "one",
        "none": None,
    }  # fmt: skip


def test_what_is_mixed_goes_together():
    """Ratios of mixed times, not mixed ratios; an answer was written under one route."""

    def cell(dense_s, routed_s, nominal_s, word):
        speed = {
            "dense_s": dense_s, "routed_s": routed_s, "nominal_s": nominal_s, "pruned_s": None, "speedup": 0.0,
            "saving": 0.0, "overhead": 0.0, "nominal_efficiency": 0.0, "skip_efficiency": None,
            "tokens_per_s": {"dense": 1 / dense_s, "routed": 1 / routed_s},
        }  # fmt: skip
        return {"samples": [{"tokens": [dense_s], "text": word}], "speed": [speed]}

    found = blend([(0.75, cell(4.0, 2.0, 1.0, "one")), (0.25, cell(8.0, 8.0, 4.0, "other"))])
    assert found["samples"] == [{"tokens": [4.0], "text": "one"}]
    (speed,) = found["speed"]
    assert (speed["dense_s"], speed["routed_s"], speed["nominal_s"]) == (5.0, 3.5, 1.75)
    assert speed["speedup"] == pytest.approx(5 / 3.5)
    assert speed["saving"] == pytest.approx(1.5 / 5)
    assert speed["overhead"] == pytest.approx(3.5 / 5 - 1)
    assert speed["nominal_efficiency"] == pytest.approx(1.5 / 3.25)
    assert speed["skip_efficiency"] is None
    assert speed["tokens_per_s"] == {"dense": pytest.approx(1 / 5), "routed": pytest.approx(1 / 3.5)}


def test_a_method_that_fails_leaves_the_others(opened, model_folder, data, tmp_path, counted):
    said = []
    settings = settings_for(model_folder, data, methods=("static-linear", "random"), max_samples=3, budgets=(0.5,))
    with pytest.raises(ConfigError, match="too few to fit skip paths"):
        run_frontier(*opened, settings, tmp_path, Teller(said.append))
    assert counted == ["dense@1", "static-linear@0.5", "random@0.5"]
    assert not is_attached(opened[0])
    assert "too few to fit skip paths of 49 features: give at least as many. The other methods go on." in said[1]
    counted.clear()
    found = run_frontier(*opened, settings, tmp_path, lenient=True)
    assert counted == ["static-linear@0.5"]
    assert "random" in found.cells


def test_one_row_has_no_interval(opened, model_folder, data, tmp_path):
    settings = settings_for(model_folder, data, methods=("static",), max_windows=1, tasks=(), budgets=(0.5,))
    found = run_frontier(*opened, settings, tmp_path)
    ratio = found.cells["static"][0.5]["against_dense"]["perplexity"]["text.txt"]
    assert ratio["value"] != 1
    assert (ratio["low"], ratio["high"]) == (None, None)
    (line,) = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| static")]
    assert f"| {ratio['value']:.2f} |" in line
    assert write_figures(tmp_path, found)


def test_read_cell_says_what_is_wrong(folder):
    path = folder / "cells" / "dense@1.json"
    whole = json.loads(path.read_text())
    for change, said in (
        ({"format": 9}, "format 9"),
        ({"kinds": None}, "no 'kinds'"),
        ({"text": {"perplexity": {"a": {}}}}, "figures cannot be read"),
    ):
        path.write_text(json.dumps(whole | change))
        with pytest.raises(DataError, match=said):
            read_cell(path)


@pytest.mark.parametrize("gone", ["default@0.5", "default-static@0.5", None])
def test_a_row_and_its_twin_are_of_the_same_routers(opened, settings, tmp_path, model_folder, gone, monkeypatch):
    """Routers that were tuned anew since do not stand beside figures of those before; older cells name none."""
    asked, cells = settings("default-static", budgets=(0.75, 0.5)), tmp_path / "cells"
    routers = save_routers(tmp_path / "routers" / "default", model_folder, order=list(range(N_LAYERS)))
    monkeypatch.setattr(Workbench, "routers", lambda *_: routers)
    run_frontier(*opened, asked, tmp_path)
    assert read_cell(cells / "default@0.5.json")["routers"] == read_cell(cells / "default-static@0.75.json")["routers"]
    model = dynadepth.load(opened[0], routers)
    for router in dynadepth.routing_of(model).routers().values():
        router.weight.data += 0.01
    dynadepth.save(model, routers)
    dynadepth.detach(model)
    if gone is None:  # nothing is left to measure: figures of one tuning
        run_frontier(*opened, asked, tmp_path)
        path = cells / "default-static@0.5.json"
        path.write_text(json.dumps({**read_cell(path), "routers": "others"}))
    else:
        (cells / f"{gone}.json").unlink()
    with pytest.raises(ConfigError, match=r"other routers than cell default@0\.75 was.*remove that cell"):
        run_frontier(*opened, asked, tmp_path)
    for path in cells.iterdir():
        older = {key: value for key, value in read_cell(path).items() if key != "routers"}
        path.write_text(json.dumps(older))
    run_frontier(*opened, asked, tmp_path)
