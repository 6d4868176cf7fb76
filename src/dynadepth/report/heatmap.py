"""The grid as a figure: a panel a variant and phase, batch against context, coloured by skip efficiency.

A field says how many times as fast as dense the variant is and, below, how much of the ideal saving that is (nominal
where rows or tokens differ). Of a variant that executes everything there is no saving: the field says what routing
costs, and 2 % has the colour of an efficiency of 0.9.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynadepth.adapter import atomically
from dynadepth.errors import ConfigError, DataError
from dynadepth.report.figures import COLOURS, figure_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Cell = dict[str, Any]
SUFFIXES = (".svg", ".png")
PHASES = ("prefill", "decode")


def check_figure(path: Path | None) -> None:
    """Raises `ConfigError` for a file name that is no figure's."""
    if path is not None and path.suffix not in SUFFIXES:
        raise ConfigError(f"--figure {path} must end in {' or '.join(SUFFIXES)}.")


def heat_map(cells: Sequence[Cell]) -> Figure:
    """Raises `DataError` where no cell compares anything with dense, `DynadepthError` without matplotlib."""
    shown = [cell for cell in cells if cell["phase"] in PHASES and cell["speedup"] is not None]
    if not shown:
        raise DataError("there is nothing to draw: give --routers or --compare.")
    variants = list(dict.fromkeys(cell["variant"] for cell in shown))
    batches, contexts = (sorted({cell[name] for cell in shown}) for name in ("batch", "context"))
    figure, panels = figure_of(
        len(variants), len(PHASES), width=0.9 + 1.9 * 0.42 * len(contexts), height=0.5 + 0.34 * len(batches)
    )
    for row, variant in enumerate(variants):
        for column, phase in enumerate(PHASES):
            axes = panels[row][column]
            of_panel = [cell for cell in shown if (cell["variant"], cell["phase"]) == (variant, phase)]
            _panel(axes, of_panel, batches, contexts)
            axes.set_title(f"{variant}, {phase}", fontsize=8, color=COLOURS["ink"], loc="left")
            if column == 0:
                axes.set_ylabel("batch", fontsize=8)
            if row == len(variants) - 1:
                axes.set_xlabel("context", fontsize=8)
    return figure


def _panel(axes: Axes, cells: Sequence[Cell], batches: list[int], contexts: list[int]) -> None:
    shades = [[float("nan")] * len(contexts) for _ in batches]
    for cell in cells:
        y, x = batches.index(cell["batch"]), contexts.index(cell["context"])
        shades[y][x] = _shade(cell)
        axes.text(x, y, _words(cell), ha="center", va="center", fontsize=7, color=COLOURS["ink"])
    axes.imshow(shades, cmap="RdYlBu", vmin=0.0, vmax=1.0, aspect="auto", alpha=0.6)
    axes.set_xticks(range(len(contexts)), [f"{context:,}" for context in contexts], fontsize=7)
    axes.set_yticks(range(len(batches)), [str(batch) for batch in batches], fontsize=7)


def _shade(cell: Cell) -> float:
    """0 to 1: the efficiency, or where everything executes 1 less five times its cost; nan (no colour) where a pruned
    model was no faster, so that nothing was to be saved."""
    efficiency = cell["nominal_efficiency"]
    if efficiency is None and cell["keep_ratio"] != 1.0:
        return math.nan
    return min(max(1.0 - 5.0 * cell["overhead"] if efficiency is None else efficiency, 0.0), 1.0)


def _words(cell: Cell) -> str:
    efficiency = cell["nominal_efficiency"]
    nothing = f"{cell['overhead']:+.1%}" if cell["keep_ratio"] == 1.0 else "–"
    second = nothing if efficiency is None else f"{efficiency:.2f}"
    return f"{cell['speedup']:.2f}×\n{second}"


def write_heat_map(path: Path, cells: Sequence[Cell]) -> None:
    """Draws into `path`, whole or not at all, on white."""
    import matplotlib

    figure = heat_map(cells)
    options: dict[str, Any] = {"dpi": 160} if path.suffix == ".png" else {"metadata": {"Date": None}}

    def save(temporary: Path) -> None:
        with matplotlib.rc_context({"svg.hashsalt": path.stem}):
            figure.savefig(temporary, format=path.suffix[1:], facecolor="white", bbox_inches="tight", **options)

    try:
        atomically(path, save)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}.") from error
