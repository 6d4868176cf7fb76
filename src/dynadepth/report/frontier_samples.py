"""Answers of the frontier's methods, side by side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dynadepth.report.cells import DENSE, Findings
from dynadepth.report.routes import mean_keep, shaded, span_of, strip, told

SAMPLE_BUDGET = 0.75
"""Answers are shown at the budget nearest to this one."""


def sample_budget(found: Findings) -> float | None:
    """The budget at which answers are shown; None where no cell has one."""
    budgets = {b for name, cells in found.cells.items() if name != DENSE for b in cells if b is not None}
    return min(budgets, key=lambda budget: (abs(budget - SAMPLE_BUDGET), budget), default=None)


def samples_at(found: Findings, at: float | None) -> Iterator[dict[str, Any]]:
    """Per prompt the answers of every method that has a cell at this budget, of dense, and of those with their own."""
    shown: dict[str, list[dict[str, Any]]] = {}
    for row in found.methods:
        cells = found.cells[row["name"]]
        cell = cells.get(at) or cells.get(None) or (found.dense if row["name"] == DENSE else None)
        answers = cell["samples"] if cell else []
        mean, span = mean_keep(answers), span_of(answers)
        for answer in answers:
            assert cell is not None
            route, text = answer.get("route"), str(answer.get("text") or "").strip()
            words, more = told(answer.get("keep_ratio"), mean)
            shown.setdefault(str(answer["prompt"]), []).append(
                {
                    "method": row["name"],
                    "pieces": shaded(answer["depth"], span) if answer.get("depth") else [(text, 0)],
                    "strip": strip(route, cell["layers"]) if route else "",
                    "keep": words,
                    "more": more,
                }
            )
    for prompt, made in shown.items():
        yield {"prompt": prompt, "answers": made}
