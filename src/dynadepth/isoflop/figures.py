"""The paper's Figures 3 and 4 for our scale: at each budget, held-out loss against parameters, and against the FLOPs of
a forward in units of those of the best dense model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynadepth.isoflop.recipe import Cell, IsoflopRecipe, budget_label
from dynadepth.isoflop.table import best, summary
from dynadepth.report import figures
from dynadepth.report.figures import COLOURS
from dynadepth.report.frontier_figures import MARKERS, SERIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Found = Mapping[Cell, Mapping[str, Any]]


def drawings(recipe: IsoflopRecipe, found: Found) -> Iterator[tuple[str, Figure]]:
    """Each figure and its file's name: two a budget."""
    entries = summary(found)
    dense = next((name for name, changes in recipe.variants.items() if not changes), "")
    for budget in sorted({e["budget"] for e in entries}):
        own = [e for e in entries if e["budget"] == budget]
        at = budget_label(budget)
        million = [{**e, "x": e["parameters"] / 1e6} for e in own]
        yield f"loss-parameters-{at}", _lines(recipe, million, f"parameters, millions ({at} training FLOPs)")
        base = best(found, dense, budget)
        unit = next(
            (e["forward_per_token"] for e in own if base and (e["size"], e["variant"]) == (base.size, dense)), 0
        )
        if unit:
            relative = [{**e, "x": e["forward_per_token"] / unit} for e in own]
            label = f"FLOPs of a forward, best {dense} model = 1 ({at} training FLOPs)"
            yield f"loss-forward-{at}", _lines(recipe, relative, label)


def write_figures(recipe: IsoflopRecipe, found: Found, folder: Path) -> list[Path]:
    """Writes every figure as SVG and PNG; returns the files."""
    return [file for name, figure in drawings(recipe, found) for file in figures.write(folder, name, figure)]


def _lines(recipe: IsoflopRecipe, entries: list[dict[str, Any]], label: str) -> Figure:
    """A line a variant through its sizes; bars from the lowest to the highest of several seeds."""
    figure, axes = figures.new(height=3.4)
    routed = [name for name, changes in recipe.variants.items() if changes]
    for variant in recipe.variants:
        points = sorted((e for e in entries if e["variant"] == variant), key=lambda e: e["x"])
        if not points:
            continue
        place = routed.index(variant) if variant in routed else -1
        axes.errorbar(
            [e["x"] for e in points],
            [e["loss"] for e in points],
            yerr=[[e["loss"] - e["lowest"] for e in points], [e["highest"] - e["loss"] for e in points]],
            color=COLOURS["dense"] if place < 0 else SERIES[f"series{place % len(SERIES)}"],
            marker="." if place < 0 else MARKERS[place % len(MARKERS)],
            markersize=4.5,
            linewidth=1.2,
            elinewidth=0.8,
            capsize=2,
            label=variant,
        )
    axes.set_xscale("log")
    _plain_numbers(axes)
    axes.set_xlabel(label)
    axes.set_ylabel("held-out loss, nats a token")
    axes.grid(color=COLOURS["grid"], linewidth=0.5, which="major")
    axes.legend(
        frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize=8, labelcolor=COLOURS["ink"]
    )
    return figure


def _plain_numbers(axes: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
