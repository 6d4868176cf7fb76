"""Recipes of isoFLOP studies: sizes, variants, budgets, and which of their combinations are trained."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynadepth.errors import ConfigError, did_you_mean
from dynadepth.pretraining.recipe import PretrainRecipe
from dynadepth.recipe_files import checked, read_recipe

COMMON = {"tokenizer", "vocab_size", "holdout", "validation_ids", "validation_tokens", "start", "sequence_length"}
"""Settings of the base alone: with others, losses could not be compared."""
OURS = {"name", "source", "flops", "seed"}
"""Settings that the study gives each cell."""


@dataclass(frozen=True, order=True)
class Cell:
    """One training run of a study."""

    budget: float
    size: str
    variant: str
    seed: int = 0

    @property
    def name(self) -> str:
        """`3e12-small-mod-s0`: the cell's name, and its file's without `.json`."""
        return f"{budget_label(self.budget)}-{self.size}-{self.variant}-s{self.seed}"


def budget_label(budget: float) -> str:
    """`3e12` of 3 · 10¹² FLOPs."""
    mantissa, _, exponent = f"{budget:.6e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


@dataclass(frozen=True)
class IsoflopRecipe:
    """One study. `sizes` and `variants` change settings of `base`, a pretraining recipe; `model` is merged."""

    name: str
    source: str
    """Where the settings come from."""
    base: dict[str, Any]
    sizes: dict[str, dict[str, Any]]
    variants: dict[str, dict[str, Any]]
    budgets: tuple[float, ...]
    grid: tuple[dict[str, Any], ...] = ()
    """Parts of the study: each names `variants`, `sizes` and `budgets`, all of which are combined; what a part leaves
    out is all of them. None: everything."""
    repeats: dict[str, Any] = field(default_factory=dict)
    """`variants`, and `seeds` with which each is trained again at its best size of every budget."""
    reference: str = ""
    """The size whose dense model every forward is timed against, beside the dense model of its own size; none: the
    middle one."""
    time_rows: int = 8
    """Sequences in the timed forwards."""
    time_repeats: int = 7

    def __post_init__(self) -> None:
        for name in ("sizes", "variants", "budgets"):
            if not getattr(self, name):
                raise ConfigError(f"Recipe {self.name!r} has no {name}.")
        for budget in self.budgets:
            if isinstance(budget, bool) or not isinstance(budget, float | int) or not 0 < budget < float("inf"):
                raise ConfigError(f"budgets must be numbers of FLOPs above 0, not {budget!r}.")
        if len(set(map(budget_label, self.budgets))) < len(self.budgets):
            raise ConfigError(f"budgets names a number of {list(self.budgets)} twice: name each once.")
        for label in (*self.sizes, *self.variants):
            if not re.fullmatch(r"[\w.-]+", str(label)):
                raise ConfigError(
                    f"{label!r} would be part of a file's name: call it by letters, digits, '.', '_' and '-' alone."
                )
        if self.reference and self.reference not in self.sizes:
            raise ConfigError(f"reference names no size: {self.reference!r}.{did_you_mean(self.reference, self.sizes)}")
        for name in ("time_rows", "time_repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}.")
        for parts, kind in ((self.sizes, "size"), (self.variants, "variant")):
            for name, changes in parts.items():
                if not isinstance(changes, dict):
                    raise ConfigError(f"{kind} {name!r} must be settings, not {changes!r}.")
                for key in changes:
                    if key in COMMON | OURS:
                        why = "is the base's, so that losses compare" if key in COMMON else "is the study's to give"
                        raise ConfigError(f"{kind} {name!r} cannot have {key}: it {why}.")
        cells = list(self.cells())  # and so checks the names in the grid
        for cell in {dataclasses.replace(c, budget=self.budgets[0]) for c in cells}:
            self.pretraining(cell)
        for name in (
            self._chosen(self.repeats, "variants", self.variants, {"variants", "seeds"}) if self.repeats else ()
        ):
            if not any(cell.variant == name for cell in cells):
                raise ConfigError(f"repeats names {name!r}, which no part of the grid trains.")
        if self.repeats:
            self._check_seeds(self.repeats.get("seeds"))

    @staticmethod
    def _check_seeds(seeds: Any) -> None:
        """Raises ConfigError for `seeds` of `repeats` that train nothing, or nothing new."""
        if not isinstance(seeds, (list, tuple)) or not seeds or any(type(seed) is not int for seed in seeds):
            raise ConfigError(f"repeats needs seeds, a list of whole numbers such as [1, 2], not {seeds!r}.")
        if len(set(seeds)) < len(seeds) or any(not 0 < seed < 2**32 for seed in seeds):
            raise ConfigError(
                f"repeats: seeds must be different whole numbers from 1 to {2**32 - 1} (the grid itself has seed 0), "
                f"not {list(seeds)}."
            )

    def cells(self) -> Iterator[Cell]:
        """The grid's cells, small budgets first, each once."""
        seen = set()
        parts = self.grid or ({},)
        for part in parts:
            named = {"variants": self.variants, "sizes": self.sizes, "budgets": self.budgets}
            chosen = {key: self._chosen(part, key, known, set(named)) for key, known in named.items()}
            for budget in chosen["budgets"]:
                for size in chosen["sizes"]:
                    for variant in chosen["variants"]:
                        seen.add(Cell(float(budget), size, variant))
        order = {name: i for i, name in enumerate((*self.sizes, *self.variants))}
        yield from sorted(seen, key=lambda c: (c.budget, order[c.size], order[c.variant]))

    def repeated(self, losses: Mapping[Cell, float]) -> list[Cell]:
        """The cells of the other seeds, given the grid's losses."""
        cells = []
        for variant in self.repeats.get("variants", ()):
            for budget in sorted({cell.budget for cell in losses}):
                tried = [c for c in losses if (c.variant, c.budget, c.seed) == (variant, budget, 0)]
                if tried:
                    best = min(tried, key=losses.__getitem__)
                    cells += [dataclasses.replace(best, seed=seed) for seed in self.repeats.get("seeds", ())]
        return cells

    def pretraining(self, cell: Cell) -> PretrainRecipe:
        """The cell's own recipe. Raises ConfigError for settings that are none."""
        merged = copy.deepcopy(self.base)
        for changes in (self.sizes[cell.size], self.variants[cell.variant]):
            model = {**merged.get("model", {}), **changes.get("model", {})}
            merged = {**merged, **copy.deepcopy(changes), **({"model": model} if model else {})}
        own = {"name": cell.name, "source": self.source, "flops": cell.budget, "seed": cell.seed}
        return PretrainRecipe(**checked(PretrainRecipe, {**merged, **own}, f"{self.name}, {cell.name}"))

    def dense(self, size: str) -> PretrainRecipe:
        """The dense model of a size: the base with that size's changes alone."""
        bare = dataclasses.replace(self, variants={"dense": {}}, grid=(), repeats={})
        return dataclasses.replace(bare.pretraining(Cell(1.0, size, "dense")), method={})

    @property
    def reference_size(self) -> str:
        names = list(self.sizes)
        return self.reference or names[len(names) // 2]

    def _chosen(self, part: Mapping[str, Any], key: str, known: Any, keys: set[str]) -> list[Any]:
        """What a part names of `key`, or all that is known."""
        for word in part:
            if word not in keys:
                raise ConfigError(
                    f"Recipe {self.name!r}: a part of the grid has no {word!r}.{did_you_mean(word, keys)}"
                )
        values = part.get(key, list(known))
        if not isinstance(values, (list, tuple)) or not values:
            raise ConfigError(f"Recipe {self.name!r}: {key} must be a list, not {values!r}.")
        for value in values:
            if value not in known:
                near = did_you_mean(str(value), map(str, known))
                raise ConfigError(f"Recipe {self.name!r} has no {value!r} among its {key}.{near}")
        return list(values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def load_recipe(name_or_path: str | Path) -> IsoflopRecipe:
    """An isoFLOP recipe by name or from a YAML file."""
    data, where = read_recipe(name_or_path, "isoflop")
    return IsoflopRecipe(**checked(IsoflopRecipe, data, where))
