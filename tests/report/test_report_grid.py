"""A benchmark's grid on disk and as a figure."""

import json

import pytest

from dynadepth.errors import ConfigError, DataError
from dynadepth.provenance import provenance
from dynadepth.report.grid import SAME, in_order, points, resumed
from dynadepth.report.heatmap import check_figure, heat_map, write_heat_map


def stamp(**changes) -> dict:
    return {**provenance(), "routers": None, "bench": {"compare": ["sequence@0.5"], "seconds": None}, **changes}


def cell(batch=1, context=32, phase="prefill", **changes) -> dict:
    values = {
        "variant": "sequence@0.5", "batch": batch, "context": context, "phase": phase, "speedup": 1.25,
        "nominal_efficiency": 0.9, "keep_ratio": 0.5, "overhead": -0.2, "routed_s": 0.8,
    }  # fmt: skip
    return {**values, **changes}


def written(path, cells, stamped) -> None:
    path.write_text(json.dumps({"cells": cells, "provenance": stamped}), encoding="utf-8")


def test_cells_of_the_same_run_are_kept(tmp_path):
    file = tmp_path / "grid.json"
    assert resumed(file, stamp()) == []
    cells = [cell(2, 32), cell(1, 512), cell(1, 32)]
    written(file, cells, stamp(date="yesterday", command="another"))
    assert resumed(file, stamp()) == cells
    assert points(cells) == {(2, 32), (1, 512), (1, 32)}
    assert [(c["batch"], c["context"]) for c in in_order(cells)] == [(1, 32), (1, 512), (2, 32)]


@pytest.mark.parametrize("name", SAME)
def test_another_run_is_refused_by_what_differs(tmp_path, name):
    written(tmp_path / "grid.json", [cell()], stamp(**{name: "other"}))
    with pytest.raises(DataError, match=rf"another run \({name} is other there and .* here\): give another --json"):
        resumed(tmp_path / "grid.json", stamp())


def test_a_setting_that_differs_is_named(tmp_path):
    written(tmp_path / "grid.json", [cell()], stamp())
    changed = stamp(bench={"compare": ["sequence@0.5"], "seconds": 9.0})
    with pytest.raises(DataError, match=r"\(bench: seconds is not set there and 9\.0 here\)"):
        resumed(tmp_path / "grid.json", changed)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"cells": [1], "provenance": {}}', '{"cells": [{}], "provenance": 1}']
)
def test_what_is_no_grid_is_refused(tmp_path, text):
    file = tmp_path / "grid.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="holds no cells of a benchmark"):
        resumed(file, stamp())
    assert file.read_text(encoding="utf-8") == text


def test_a_panel_a_variant_and_phase(tmp_path):
    cells = [
        cell(b, c, phase, variant=variant)
        for variant in ("sequence@0.5", "token-drop@0.5")
        for phase in ("prefill", "decode")
        for b in (1, 8)
        for c in (32, 512)
    ]
    cells.append(cell(1, 32, "generate", variant="execute_all"))
    cells[0] = cell(variant="sequence@0.5", nominal_efficiency=None, keep_ratio=1.0, overhead=0.013)
    figure = heat_map(cells)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [f"{v}, {p}" for v in ("sequence@0.5", "token-drop@0.5") for p in ("prefill", "decode")]
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts[0] == "1.25×\n+1.3%"
    assert texts[1:] == ["1.25×\n0.90"] * 3
    for name in ("map.svg", "map.png"):
        write_heat_map(tmp_path / name, cells)
    assert "<svg" in (tmp_path / "map.svg").read_text(encoding="utf-8")
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"
    first = (tmp_path / "map.svg").read_bytes()
    write_heat_map(tmp_path / "map.svg", cells)
    assert (tmp_path / "map.svg").read_bytes() == first, "the same cells make the same file"


def test_missing_points_stay_empty():
    figure = heat_map([cell(1, 32), cell(8, 512)])
    assert len(figure.axes[0].texts) == 2


def test_where_nothing_was_to_be_saved_no_price_is_shown():
    """A pruned model that was no faster says nothing of one that skips."""
    figure = heat_map([cell(nominal_efficiency=None, keep_ratio=0.5, overhead=0.02)])
    (words,) = [text.get_text() for text in figure.axes[0].texts]
    assert words.endswith("×\n–")
    assert not any("%" in text.get_text() for text in figure.axes[0].texts)


def test_what_cannot_be_drawn(tmp_path):
    with pytest.raises(DataError, match="nothing to draw"):
        heat_map([cell(speedup=None)])
    with pytest.raises(ConfigError, match=r"map\.txt must end in \.svg or \.png"):
        check_figure(tmp_path / "map.txt")
    check_figure(None)
