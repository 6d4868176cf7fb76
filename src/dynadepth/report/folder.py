"""A frontier's folder, read leniently: what can be shown, and a sentence for each part that is missing or damaged."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dynadepth.errors import DataError
from dynadepth.report.cells import CELLS, SUMMARY, Cell, Findings, read_cell, read_json
from dynadepth.report.frontier_samples import samples_at
from dynadepth.report.frontier_table import budgets_met, compared, per_kind, rough_timing, summary_of, table, task_table
from dynadepth.routing.decision import Site

OPTIONAL = {"tasks": dict, "against_dense": dict, "against": dict, "speed": list, "routes": dict, "provenance": dict}
"""What a cell may lack."""

ALIKE = {
    "model": "models",
    "dtype": "dtypes",
    "texts": "sets of texts",
    "max_windows": "numbers of windows",
    "tasks": "sets of tasks",
    "limit": "limits of rows",
}
"""Settings that cells have to share to be compared."""

MOST_LAYERS = 10_000
"""More than any model has: a layer map of more would be no picture."""


def usable(path: Path) -> Cell:
    """A cell whose every figure can be shown, or `DataError`: all that tables, figures and the page ask of it is asked
    of it alone."""
    cell = read_cell(path)
    alone = Findings()
    alone.add(cell)
    try:
        for name, kind in OPTIONAL.items():
            if cell.get(name) is not None and not isinstance(cell[name], kind):
                raise TypeError(f"{name} is no {kind.__name__}")
        _check_numbers(cell, summary_of(cell))
        shares = [(Site.parse(site), float(share)) for site, share in cell["site_keep"].items()]
        if any(not 0 <= site.layer < cell["layers"] for site, _ in shares):
            raise ValueError("site_keep names a layer that does not exist")
        if not all(map(math.isfinite, (share for _, share in shares))):
            raise ValueError("site_keep has a share that is no number")
        for text in cell["text"]["perplexity"].values():
            int(text.get("n_tokens") or 0)
        for interval in _intervals(cell):
            _check_interval(interval)
        for show in (table, task_table, budgets_met, compared, rough_timing):
            show(alone)
        per_kind([cell])
        list(samples_at(alone, cell["budget"]))
    except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged: its figures cannot be read ({error!r}).") from error
    return cell


def _check_numbers(cell: Cell, summary: Mapping[str, Any]) -> None:
    """Raises `ValueError` for figures that are no numbers, times that no clock gives, and depths that no model has."""
    figures = [summary[name] for name in ("perplexity", "kl", "tasks", "keep_all", "flops_share", "kv_share")]
    if any(figure is not None and math.isnan(figure) for figure in figures):
        raise ValueError("a figure is no number")
    for timed in cell.get("speed") or []:
        if (timed.get("speedup") or 1) <= 0 or (timed.get("spread") or 0) < 0:
            raise ValueError("a speed-up or its spread is below zero")
    if not 0 < cell["layers"] <= MOST_LAYERS:
        raise ValueError(f"{cell['layers']} layers")


def _intervals(cell: Cell) -> Iterator[Any]:
    """Of all differences from other cells."""
    for name in ("against_dense", "against"):
        differences = cell.get(name) or {}
        yield from (differences.get(kind) for kind in ("average",) if differences.get(kind) is not None)
        for kind in ("perplexity", "kl", "tasks"):
            yield from (differences.get(kind) or {}).values()


def _check_interval(interval: Any) -> None:
    """Raises `TypeError` or `ValueError` for one that cannot be drawn."""
    bounds = (interval["low"], interval["high"])
    if (bounds[0] is None) != (bounds[1] is None):
        raise ValueError("an interval has one end")
    if not all(math.isfinite(float(bound)) for bound in (interval["value"], *bounds) if bound is not None):
        raise ValueError("a difference is no number")


def read_folder(folder: Path) -> Findings:
    """Everything usable in `folder`, and what is not. Raises `DataError` where nothing is."""
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}.")
    found = Findings()
    planned: list[str] = []
    try:
        summary = read_json(folder / SUMMARY)
        found.rows = [{"name": str(row["name"]), "description": str(row["description"])} for row in summary["rows"]]
        found.provenance, found.model = dict(summary["provenance"]), summary["model"]
        planned = [str(name) for name in summary["planned"]]
    except DataError as error:
        found.problems.append(str(error))
    except (KeyError, TypeError, ValueError):
        found.problems.append(f"{folder / SUMMARY} is damaged: it does not name the methods.")
    files = sorted((folder / CELLS).glob("*.json")) if (folder / CELLS).is_dir() else []
    for path in files:
        try:
            found.add(usable(path))
        except DataError as error:
            found.problems.append(str(error))
    if not found.cells:
        why = f" ({'; '.join(p.rstrip('.') for p in found.problems)})" if found.problems else ""
        raise DataError(
            f"{folder} holds no finished cell of a frontier{why}: make some with `dynadepth frontier MODEL --out DIR`."
        )
    settings = [cell["settings"] for cells in found.cells.values() for cell in cells.values()]
    for name, what in ALIKE.items():
        if (several := len({json.dumps(one.get(name), sort_keys=True) for one in settings})) > 1:
            found.problems.append(f"The cells are of {several} {what}: differences between them mean nothing.")
    there = {path.stem for path in files}
    found.problems += [f"The cell {name} is missing: it was planned." for name in planned if name not in there]
    if found.dense is None:
        found.problems.append("There is no dense cell: differences from the dense model are left out.")
    found.model = found.model or next(iter(next(iter(found.cells.values())).values())).get("model")
    return found
