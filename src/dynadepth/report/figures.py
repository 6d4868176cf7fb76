"""Figures, as matplotlib objects of data that is plain lists, and as SVG that follows a page's light or dark theme."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynadepth.adapter import atomically
from dynadepth.errors import ConfigError, DynadepthError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"ink": "#24292f", "grid": "#d0d7de", "dense": "#8c959f", "routed": "#2f81f7", "static": "#e08a2e"}
"""In a page each becomes the CSS variable of that name."""

WIDTH = 4.4
"""Inches: text keeps its size on a phone."""


def bars(values: Mapping[str, float], titles: Mapping[str, str], unit: str) -> Figure:
    """One horizontal bar an entry, coloured by its key (`dense`, `routed`, `static`), its value written beside it."""
    figure, axes = new(height=0.55 + 0.38 * len(values))
    names = list(values)
    axes.barh(names, list(values.values()), color=[COLOURS.get(name, COLOURS["ink"]) for name in names], height=0.62)
    for place, value in enumerate(values.values()):
        axes.annotate(
            f"{value:,.2f}",
            (value, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=COLOURS["ink"],
        )
    axes.set_yticks(range(len(names)), [titles.get(name, name) for name in names])
    axes.invert_yaxis()
    axes.set_xlim(0, max(values.values()) * 1.22)
    axes.set_xlabel(unit)
    axes.grid(axis="x", color=COLOURS["grid"], linewidth=0.5)
    return figure


def grouped(groups: Mapping[str, Mapping[str, float]], titles: Mapping[str, str], unit: str, line: float) -> Figure:
    """Groups of horizontal bars (`{group: {variant: value}}`) with a line at `line`: speed-ups against 1."""
    variants = list(dict.fromkeys(name for group in groups.values() for name in group))
    figure, axes = new(height=0.7 + 0.26 * len(groups) * (len(variants) + 0.6))
    step = 1 / (len(variants) + 0.6)
    for index, name in enumerate(variants):
        places = [place + (index - (len(variants) - 1) / 2) * step for place in range(len(groups))]
        values = [group.get(name, 0.0) for group in groups.values()]
        axes.barh(
            places, values, height=step * 0.92, color=COLOURS.get(name, COLOURS["ink"]), label=titles.get(name, name)
        )
        for place, value in zip(places, values, strict=True):
            axes.annotate(
                f"{value:.2f}",
                (value, place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                color=COLOURS["ink"],
            )
    axes.set_yticks(range(len(groups)), list(groups))
    axes.invert_yaxis()
    axes.axvline(line, color=COLOURS["ink"], linewidth=0.8, linestyle=(0, (3, 2)))
    axes.set_xlim(0, max(line, *(v for group in groups.values() for v in group.values())) * 1.2)
    axes.set_xlabel(unit)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.62 / (0.7 + len(groups) * 0.5)), ncols=3)
    return figure


def layer_map(rows: Sequence[tuple[str, Sequence[float | None], str]]) -> Figure:
    """One strip a row of (label, executions a layer, key of its colour): full where it executes, faint where it is
    skipped, with a bar of ink as far as it repeats, and with a dot where nothing is routed (None)."""
    figure, axes = new(height=0.7 + 0.3 * len(rows))
    for place, (_, shares, key) in enumerate(rows):
        for layer, share in enumerate(shares):
            filled = 1.0 if share is None else min(share, 1.0)
            axes.barh(place, 0.86, left=layer - 0.43, height=0.72, color=COLOURS[key], alpha=0.1 + 0.9 * filled)
            if share is not None and share > 1:
                axes.barh(place, 0.86 * (share - 1), left=layer - 0.43, height=0.2, color=COLOURS["ink"])
            if share is None:
                axes.plot(layer, place, marker=".", markersize=2, color=COLOURS["ink"])
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    axes.invert_yaxis()
    n_layers = max((len(shares) for _, shares, _ in rows), default=1)
    axes.set_xlim(-0.7, n_layers - 0.3)
    axes.set_xticks(range(0, n_layers, max(1, -(-n_layers // 6))))
    axes.set_xlabel("layer")
    return figure


def curve(values: Sequence[float], x: str, y: str) -> Figure:
    """A line over its index: the loss while tuning."""
    figure, axes = new(height=1.9)
    axes.plot(range(1, len(values) + 1), values, color=COLOURS["routed"], linewidth=1.2)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color=COLOURS["grid"], linewidth=0.5)
    return figure


def inline(figure: Figure, name: str, description: str, colours: Mapping[str, str] = COLOURS) -> str:
    """The figure as an `<svg>` element without any reference outside of itself; `name` keeps its ids apart.

    Each of the `colours` becomes the page's CSS variable of that name."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(
            buffer, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.04, metadata={"Date": None}
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"(<svg\b[^>]*?) width=\"[\d.]+pt\"", r"\1", svg)
    svg = re.sub(r"(<svg\b[^>]*?) height=\"[\d.]+pt\"", r"\1", svg)
    for key, colour in colours.items():
        svg = svg.replace(colour, f"var(--{key})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(description, quote=True)}"', 1)


def write(folder: Path, name: str, figure: Figure) -> list[Path]:
    """Writes a figure as SVG and PNG into `folder`, on white; returns the files."""
    import matplotlib

    written = []
    for suffix, options in ((".svg", {"metadata": {"Date": None}}), (".png", {"dpi": 160})):
        path = folder / f"{name}{suffix}"

        def save(temporary: Path, suffix: str = suffix, options: Any = options) -> None:
            with matplotlib.rc_context({"svg.hashsalt": name}):
                figure.savefig(temporary, format=suffix[1:], facecolor="white", bbox_inches="tight", **options)

        try:
            atomically(path, save)
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror or error}.") from error
        written.append(path)
    return written


def new(height: float) -> tuple[Figure, Axes]:
    """An empty figure in the house's style, `WIDTH` inches wide. Raises `DynadepthError` without matplotlib."""
    figure, panels = figure_of(1, 1, width=WIDTH, height=height)
    return figure, panels[0][0]


def figure_of(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    """Panels of `width` times `height` inches each, by row. Raises `DynadepthError` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DynadepthError(f"Figures need matplotlib ({error}): run `pip install 'dynadepth[report]'`.") from error
    figure = Figure(figsize=(columns * width, rows * height))
    if rows * columns > 1:
        figure.set_layout_engine("constrained")
    panels = [[figure.add_subplot(rows, columns, row * columns + i + 1) for i in range(columns)] for row in range(rows)]
    for panel in panels:
        for axes in panel:
            _plain(axes)
    return figure, panels


def _plain(axes: Axes) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(COLOURS["grid"])
    axes.tick_params(colors=COLOURS["ink"], length=0)
    axes.xaxis.label.set_color(COLOURS["ink"])
    axes.yaxis.label.set_color(COLOURS["ink"])
    axes.set_axisbelow(True)
