"""The folder of a frontier: which files it holds, how they are written, and how they are read back.

    DIR/cells/NAME@BUDGET.json   one cell: a method at a budget, everything that was measured of it
    DIR/frontier.json            the methods and the table, without the scores of single rows
    DIR/table.md                 the table, to be read
    DIR/routers/NAME             routers of the tuned methods, and fitted skip paths
    DIR/scores/NAME.json         importance of sublayers, where a method's order is measured
    DIR/pieces/NAME@BUDGET       texts and tasks of a cell that is not finished

A cell is written when it is finished, whole or not at all; one that was not timed may be timed later. `report.folder`
reads leniently, for the page.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynadepth.errors import DataError
from dynadepth.records import plain, read_json, write_json

__all__ = [
    "CELLS", "DENSE", "FORMAT", "OWN", "PIECES", "ROUTERS", "SCORES", "SUMMARY", "TABLE", "Cell", "Findings",
    "budget_label", "cell_name", "cell_path", "plain", "read_cell", "read_json", "write_json",
]  # fmt: skip

FORMAT = 1
CELLS, SUMMARY, TABLE, ROUTERS, SCORES, PIECES = "cells", "frontier.json", "table.md", "routers", "scores", "pieces"
OWN = "own"
"""Stands for the budget of a method whose routers have no calibration."""
DENSE = "dense"

Cell = dict[str, Any]

PARTS: dict[str, type] = {
    "row": str, "settings": dict, "text": dict, "site_keep": dict, "kinds": dict, "samples": list, "layers": int,
}  # fmt: skip
"""What every finished cell has."""


def budget_label(budget: float | None) -> str:
    """`0.75`, or `own`."""
    return OWN if budget is None else f"{budget:g}"


def cell_name(row: str, budget: float | None) -> str:
    """`static@0.75`: the cell's name, and its file's without `.json`."""
    return f"{row}@{budget_label(budget)}"


def cell_path(folder: Path, row: str, budget: float | None) -> Path:
    """Where the cell is kept."""
    return folder / CELLS / f"{cell_name(row, budget)}.json"


def read_cell(path: Path) -> Cell:
    """One cell. Raises `DataError` saying what is wrong with a file that is none."""
    document = read_json(path)
    if document.get("format") != FORMAT:
        raise DataError(f"{path} has format {document.get('format')!r}, this version reads {FORMAT}.")
    for name, kind in PARTS.items():
        if not isinstance(document.get(name), kind):
            raise DataError(f"{path} is damaged: it has no {name!r}.")
    try:
        figures = document["text"]["perplexity"]
        assert figures, "no text"
        assert all(isinstance(value["nll"], float) for value in figures.values())
        assert document["budget"] is None or isinstance(document["budget"], float)
    except (KeyError, TypeError, AttributeError, AssertionError) as error:
        raise DataError(f"{path} is damaged: its figures cannot be read ({error!r}).") from error
    return document


@dataclass
class Findings:
    """What a folder holds."""

    rows: list[dict[str, str]] = field(default_factory=list)
    """`name` and `description` of each method, in the order of the table."""
    cells: dict[str, dict[float | None, Cell]] = field(default_factory=dict)
    """By method, then by budget, the largest first and a method's own last."""
    model: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """A sentence for each part that is missing or damaged."""

    @property
    def dense(self) -> Cell | None:
        """The dense model's cell."""
        return next(iter(self.cells.get(DENSE, {}).values()), None)

    def add(self, cell: Cell) -> None:
        """Takes in a cell."""
        of_row = self.cells.setdefault(cell["row"], {})
        of_row[cell["budget"]] = cell
        order = sorted(of_row, key=lambda budget: (budget is None, -(budget or 0)))
        self.cells[cell["row"]] = {budget: of_row[budget] for budget in order}

    @property
    def methods(self) -> list[dict[str, str]]:
        """The rows that have a cell, in order; those that the summary does not name come last."""
        named = [row for row in self.rows if row["name"] in self.cells]
        known = {row["name"] for row in named}
        return named + [{"name": name, "description": ""} for name in sorted(self.cells) if name not in known]
