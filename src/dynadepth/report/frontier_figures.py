"""The frontier's figures: quality against keep ratio and against measured speed-up, one line a method, with error bars.

The same drawings are written as files (`write_figures`) and set into the page, where their colours follow its theme.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynadepth.report import figures
from dynadepth.report.cells import DENSE, Findings, budget_label
from dynadepth.report.figures import COLOURS
from dynadepth.report.frontier_table import summary_of
from dynadepth.routing.decision import Site

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = (
    "#2f81f7", "#e08a2e", "#1a9e75", "#c2479d", "#8b6cef", "#a88600", "#d9534f", "#2a93a8", "#7f8c2d", "#b07a5a",
    "#d1607f", "#5f86c4", "#43a047",
)  # fmt: skip
SERIES = {f"series{i}": colour for i, colour in enumerate(_COLOURS)}
"""By place of the method; each reads on white and on black."""
MARKERS = "os^Dv<>PX*"
PALETTE = {key: colour for key, colour in COLOURS.items() if key in ("ink", "grid", "dense")} | SERIES


@dataclass(frozen=True)
class Drawing:
    """A figure, its file's name without suffix, and what it shows."""

    name: str
    caption: str
    figure: Figure


Point = tuple[float, float, tuple[float, float], float]
"""x, y, lowest and highest y, half the width of x."""


def drawings(found: Findings) -> Iterator[Drawing]:
    """Every figure for which there are points."""
    text = next((summary_of(cell)["text"] for cells in found.cells.values() for cell in cells.values()), "text")
    perplexity = f"perplexity of {text}"
    for name, caption, axes, point in (
        ("quality-keep", "Quality against keep ratio (lower and further left is better)",
         ("share executed of all sublayers of the target", perplexity), lambda s: _perplexity(s, _keep(s), found)),
        ("tasks-keep", "Accuracy against keep ratio (higher and further left is better)",
         ("share executed of all sublayers of the target", "mean of the tasks, %"), _accuracy),
        ("quality-prefill", "Quality against the measured speed-up of a prefill (lower and further right is better)",
         ("prefill: times as fast as dense", perplexity), lambda s: _perplexity(s, s["prefill"], found)),
        ("quality-decode", "Quality against the measured speed-up of decoding (lower and further right is better)",
         ("decode: times as fast as dense", perplexity), lambda s: _perplexity(s, s["decode"], found)),
    ):  # fmt: skip
        series = _series(found, point)
        if any(method != DENSE for method in series):
            keeps = name.endswith("-keep")
            yield Drawing(name, caption, _lines(series, _places(found), *axes, log=name != "tasks-keep", keeps=keeps))


def layer_maps(found: Findings) -> Iterator[Drawing]:
    """Per method what each layer executed on the texts, a strip a budget; none of the dense model."""
    for row in found.methods:
        strips: list[tuple[str, list[float | None], str]] = []
        for budget, cell in found.cells[row["name"]].items():
            shares = {Site.parse(site).layer: share for site, share in cell["site_keep"].items()}
            strips.append((budget_label(budget), [shares.get(i) for i in range(cell["layers"])], "routed"))
        if strips and row["name"] != DENSE:
            yield Drawing(f"layers-{row['name']}", row["name"], figures.layer_map(strips))


def write_figures(folder: Path, found: Findings) -> list[Path]:
    """Writes each drawing as SVG and PNG into `folder`, on white; returns the files."""
    return [file for drawing in drawings(found) for file in figures.write(folder, drawing.name, drawing.figure)]


def _places(found: Findings) -> dict[str, int]:
    """A method's place among those that are no dense model: its colour and marker in every figure."""
    return {row["name"]: i for i, row in enumerate(r for r in found.methods if r["name"] != DENSE)}


def colour_key(found: Findings, method: str) -> str:
    """The CSS variable of a method's colour."""
    return DENSE if method == DENSE else f"series{_places(found)[method] % len(SERIES)}"


def _series(found: Findings, point: Callable[[dict[str, Any]], Point | None]) -> dict[str, list[Point]]:
    series = {}
    for row in found.methods:
        points = [point(summary_of(cell)) for cell in found.cells[row["name"]].values()]
        if known := sorted(p for p in points if p is not None):
            series[row["name"]] = known
    return series


def _keep(summary: dict[str, Any]) -> dict[str, float] | None:
    return None if summary["keep_all"] is None else {"value": summary["keep_all"], "spread": 0.0}


def _perplexity(summary: dict[str, Any], x: dict[str, float] | None, found: Findings) -> Point | None:
    """With the 95 % interval of the ratio to dense, where there is one."""
    y, ratio = summary["perplexity"], summary["ratio"]
    if x is None or y is None:
        return None
    low, high = (y * bound / ratio["value"] for bound in _bounds(ratio)) if ratio else (y, y)
    return x["value"], y, (low, high), x["value"] * min(x["spread"], 1.0) / 2


def _accuracy(summary: dict[str, Any]) -> Point | None:
    """At what executed on the tasks."""
    value, difference, keep = summary["tasks"], summary["difference"], summary["keep_tasks"]
    if value is None or keep is None:
        return None
    low, high = (bound - difference["value"] for bound in _bounds(difference)) if difference else (0.0, 0.0)
    return keep, 100 * value, (100 * (value + low), 100 * (value + high)), 0.0


def _bounds(interval: dict[str, float | None]) -> tuple[float, float]:
    """Of an interval; the value itself where nothing is known of it."""
    value, low, high = (interval[key] for key in ("value", "low", "high"))
    assert value is not None, "a value that was measured"
    return value if low is None else low, value if high is None else high


def _lines(series: dict[str, list[Point]], places: dict[str, int], x: str, y: str, *, log: bool, keeps: bool) -> Figure:
    figure, axes = figures.new(height=3.4)
    dense = series.get(DENSE)
    if dense:
        axes.axhline(dense[0][1], color=COLOURS["dense"], linewidth=1, linestyle=(0, (4, 3)), label=DENSE)
    for method, points in series.items():
        if method == DENSE:
            continue
        place = places[method]
        axes.errorbar(
            [p[0] for p in points],
            [p[1] for p in points],
            yerr=[[max(0.0, p[1] - p[2][0]) for p in points], [max(0.0, p[2][1] - p[1]) for p in points]],
            xerr=[p[3] for p in points] if any(p[3] for p in points) else None,
            color=SERIES[f"series{place % len(SERIES)}"],
            marker=MARKERS[place % len(MARKERS)],
            markersize=4.5,
            linewidth=1.2,
            elinewidth=0.8,
            capsize=2,
            label=method,
        )
    if log:
        _log_axis(axes)
    if keeps:
        axes.set_xlim(axes.get_xlim()[0], 1.01)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color=COLOURS["grid"], linewidth=0.5, which="major")
    axes.legend(
        frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=8, labelcolor=COLOURS["ink"]
    )
    return figure


def _log_axis(axes: Any) -> None:
    """Perplexities differ by orders of magnitude; a handful of plain numbers along the axis."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    steps: tuple[float, ...] = (1, 2, 5) if high / low < 300 else (1,)
    if high / low < 5:
        steps = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
