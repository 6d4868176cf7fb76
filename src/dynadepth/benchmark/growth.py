"""How cost grows with the work: exponents fitted to the cells of a grid.

Cost ∝ context^x (or batch^x), least squares in logarithms over all points: 1 is proportional, 2 quadratic, 0 constant.
A range that crosses from one regime into another has an exponent between theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FEWEST = 3
"""Points that a fit needs."""


@dataclass(frozen=True)
class Slope:
    """Exponents of one variant's cost along one axis, the other held at `fixed`; None where a figure is unknown."""

    variant: str
    phase: str
    axis: str
    """`context` or `batch`."""
    fixed: int
    low: int
    high: int
    dense_time: float | None
    time: float | None
    dense_memory: float | None
    memory: float | None


def slopes(cells: Sequence[Mapping[str, Any]]) -> list[Slope]:
    """One for each variant, phase and value of the other axis that has at least three points along `context` or
    `batch`."""
    found = []
    for axis, other in (("context", "batch"), ("batch", "context")):
        series: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
        for cell in cells:
            series.setdefault((cell["variant"], cell["phase"], cell[other]), []).append(cell)
        for (variant, phase, fixed), points in series.items():
            points = sorted(points, key=lambda cell: cell[axis])
            if len({cell[axis] for cell in points}) < FEWEST:
                continue
            sizes = [cell[axis] for cell in points]
            dense_memory, memory = ([cell["peak_bytes"][name] for cell in points] for name in ("dense", variant))
            figures = [cell["dense_s"] for cell in points], [cell["routed_s"] for cell in points], dense_memory, memory
            found.append(
                Slope(variant, phase, axis, fixed, sizes[0], sizes[-1], *(exponent(sizes, one) for one in figures))
            )
    return found


def exponent(sizes: list[int], figures: list[float | None]) -> float | None:
    """x of figures ∝ sizes^x; None where any of them is unknown or not positive."""
    known = [figure for figure in figures if figure is not None and figure > 0]
    if len(known) < len(sizes):
        return None
    x, y = [math.log(size) for size in sizes], [math.log(figure) for figure in known]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
