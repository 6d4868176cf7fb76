"""The methods of a frontier as data: a new one is one more entry of `ROWS` (its kind is in makers.py)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dynadepth.errors import ConfigError, did_you_mean
from dynadepth.frontier.makers import Dense, Maker, RandomPerInput, Static, Tuned, TwinOf
from dynadepth.report.cells import DENSE


@dataclass(frozen=True)
class Row:
    """A method of the frontier."""

    name: str
    description: str
    maker: Maker

    @property
    def of(self) -> str | None:
        """The row that this one is compared with, whose cells are measured before."""
        return self.maker.of if isinstance(self.maker, TwinOf) else None


DEFAULT = Tuned("default")
IDENTITY = {"method": {"method": "mindskip", "bias": True, "penalty": 0.0, "layers": "all"}, "joint": 1.0}
ROWS = (
    Row(DENSE, "the model itself: everything executes", Dense()),
    Row("static", "skips the sublayers with the lowest 1 − cosine, the same for every input", Static("cosine")),
    Row("static-deepest", "skips the deepest sublayers but the last, the same for every input", Static("deepest")),
    Row("random", "skips sublayers drawn once, the same for every input", Static("random")),
    Row("random-per-input", "skips sublayers drawn anew for each input", RandomPerInput()),
    Row("mindskip-paper", "MindSkip with Router-Tuning as published, at the budget it gives", Tuned("mindskip-paper")),
    Row("default", "routers tuned once by the default recipe, serving every budget", DEFAULT),
    Row(
        "identity",
        "the default recipe without skip paths: what is skipped contributes nothing",
        Tuned("default", IDENTITY),
    ),
    Row("default-static", "the static twin of default: a fixed route, the same keep ratio", TwinOf("default", DEFAULT)),
)
"""In the order of the table."""


def row_named(name: str) -> Row:
    """Raises `ConfigError` with the near names for an unknown one."""
    known = {row.name: row for row in ROWS}
    if name not in known:
        raise ConfigError(f"There is no method {name!r}; known: {', '.join(known)}.{did_you_mean(name, known)}")
    return known[name]


def chosen(names: Iterable[str]) -> list[Row]:
    """The rows of these names, with dense and what they are compared with, in the order of the table."""
    wanted = {DENSE}
    for name in names:
        wanted |= {name} if (of := row_named(name).of) is None else {name, of}
    return [row for row in ROWS if row.name in wanted]
