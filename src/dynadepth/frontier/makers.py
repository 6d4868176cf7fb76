"""Kinds of methods: how a row of the frontier routes a model at a budget.

`Dense`, `RandomPerInput`, `Tuned` (a recipe), `TwinOf` (the fixed route of a tuned row), `PositionsOf` (the tokens at
fixed positions); beside them `static.Static` and `shuffled.Shuffled`. A maker gives the budgets at which its row has a
cell, the settings that the cell depends on, and the model routed at a budget: one part, or two whose figures are mixed
where a fixed route between two whole counts is meant.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from transformers import PreTrainedModel

from dynadepth import adapter
from dynadepth.budget import mixture
from dynadepth.dial import set_budget
from dynadepth.errors import BudgetError, ConfigError
from dynadepth.frontier.given import giving_positions
from dynadepth.frontier.workbench import Workbench
from dynadepth.lora import LoraSettings
from dynadepth.methods import DepthConfig
from dynadepth.methods.random import RandomConfig
from dynadepth.model import add_lora, attach, detach, fixed_routes, load
from dynadepth.routed import routing_of
from dynadepth.routing.calibration import TOLERANCE
from dynadepth.routing.decision import Site
from dynadepth.tuning import Recipe, load_recipe

Budget = float | None
Learnt = TypeVar("Learnt", bound="Maker")


@dataclass(frozen=True)
class Part:
    """A routed model, and the share of the inputs that it stands for."""

    opened: Callable[[], AbstractContextManager[PreTrainedModel]]
    share: float = 1.0
    scored: Callable[[PreTrainedModel], dict[str, Any]] | None = None
    """How it is scored where not as every model is (`scoring.measured`). Such a part is not timed."""


class Maker(ABC):
    """How a row routes a model."""

    @abstractmethod
    def budgets(self, name: str, asked: Iterable[float], n_layers: int) -> tuple[Budget, ...]:
        """The budgets of the row's cells; None is the routers' own. Raises `BudgetError` for one out of reach."""

    @abstractmethod
    def settings(self, bench: Workbench, name: str) -> dict[str, Any]:
        """What the row's cells depend on, beyond the run's settings."""

    @abstractmethod
    def ready(self, bench: Workbench, name: str) -> None:
        """Reads and tries what can fail early. Raises `UnsupportedModelError` where the model cannot be routed so."""

    @abstractmethod
    def parts(self, bench: Workbench, name: str, budget: Budget) -> list[Part]:
        """The model at a budget."""


@dataclass(frozen=True)
class Dense(Maker):
    """The bare model."""

    def budgets(self, name: str, asked: Iterable[float], n_layers: int) -> tuple[Budget, ...]:
        return (1.0,)

    def settings(self, bench: Workbench, name: str) -> dict[str, Any]:
        return {}

    def ready(self, bench: Workbench, name: str) -> None:
        pass

    def parts(self, bench: Workbench, name: str, budget: Budget) -> list[Part]:
        return [Part(lambda: nullcontext(bench.model))]


@dataclass(frozen=True)
class RandomPerInput(Maker):
    """Each input draws its own route (`methods/random.py`)."""

    target: str = "attention"

    def budgets(self, name: str, asked: Iterable[float], n_layers: int) -> tuple[Budget, ...]:
        return tuple(asked)

    def settings(self, bench: Workbench, name: str) -> dict[str, Any]:
        return {"target": self.target}

    def ready(self, bench: Workbench, name: str) -> None:
        pass

    def parts(self, bench: Workbench, name: str, budget: Budget) -> list[Part]:
        assert budget is not None
        config = RandomConfig(target=self.target, layers="all", keep=budget, seed=bench.settings.seed)
        return [Part(lambda: attached(bench.model, config))]


@dataclass(frozen=True)
class Tuned(Maker):
    """Routers tuned once by a recipe, then set to each budget. Without calibration they have their own alone."""

    recipe: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the recipe that are replaced."""
    method: Mapping[str, Any] = field(default_factory=dict)
    """Settings of its method that are replaced."""

    def made(self) -> Recipe:
        """The recipe with the changes."""
        recipe = replace(load_recipe(self.recipe), **self.changes)
        return replace(recipe, method={**recipe.method, **self.method})

    def budgets(self, name: str, asked: Iterable[float], n_layers: int) -> tuple[Budget, ...]:
        recipe, asked = self.made(), tuple(asked)
        if not recipe.calibrate:
            return (None,)
        routed = len(recipe.config().routed_layers(n_layers))
        for budget in asked:
            check_reach(name, budget, n_layers, routed, budget >= (n_layers - routed) / n_layers - 1e-9)
        return asked

    def settings(self, bench: Workbench, name: str) -> dict[str, Any]:
        return {"tuning": bench.tuning_settings(name, self.made())}

    def ready(self, bench: Workbench, name: str) -> None:
        if not bench.is_tuned(name, self.made()):
            with attached(bench.model, self.made().config()):  # the probe refuses what this model cannot do
                if self.made().lora:
                    add_lora(bench.model, LoraSettings.from_dict(self.made().lora))
            read_files(bench, name, self.made())

    def parts(self, bench: Workbench, name: str, budget: Budget) -> list[Part]:
        folder = self.folder(bench, name)
        return [Part(lambda: loaded(bench.model, folder, budget))]

    def folder(self, bench: Workbench, name: str) -> Path:
        """Of the routers, tuned now if need be."""
        return bench.routers(name, self.made())


@dataclass(frozen=True)
class Beside(Maker, Generic[Learnt]):
    """A control of a row that was tuned: with what that one learnt, at its budgets."""

    of: str
    """The tuned row's name: its cells come first."""
    row: Learnt
    kind: ClassVar[str] = "beside"
    """What it is, in its settings."""

    def budgets(self, name: str, asked: Iterable[float], n_layers: int) -> tuple[Budget, ...]:
        return self.row.budgets(name, asked, n_layers)

    def settings(self, bench: Workbench, name: str) -> dict[str, Any]:
        return {self.kind: self.row.settings(bench, self.of)}

    def ready(self, bench: Workbench, name: str) -> None:
        self.row.ready(bench, self.of)


@dataclass(frozen=True)
class TwinOf(Beside[Tuned]):
    """The fixed route with the keep ratio that a tuned row had on text, least important sites first, with that row's
    own routers' skip paths and tuning."""

    kind = "twin of"

    def parts(self, bench: Workbench, name: str, budget: Budget) -> list[Part]:
        folder = self.row.folder(bench, self.of)
        order = _order_of(folder)
        keep = bench.cell(self.of, budget)["text"]["keep_ratio"]["all"]
        counts = mixture(keep, bench.n_layers, len(order), TOLERANCE)
        return [Part(fixed(bench.model, folder, frozenset(order[:count])), share) for count, share in counts]


@dataclass(frozen=True)
class PositionsOf(Beside[Tuned]):
    """The static twin of a row tuned at token granularity: at every site the same share of the tokens executes as its
    router let execute on text, but those at fixed positions, for every input, with that row's skip paths."""

    kind = "positions of"

    def parts(self, bench: Workbench, name: str, budget: Budget) -> list[Part]:
        folder = self.row.folder(bench, self.of)
        kept = bench.cell(self.of, budget)["site_keep"]
        return [Part(lambda: _at_positions(bench.model, folder, {Site.parse(s): share for s, share in kept.items()}))]


@contextmanager
def _at_positions(model: PreTrainedModel, folder: Path, shares: Mapping[Site, float]) -> Iterator[PreTrainedModel]:
    with loaded(model, folder, None), giving_positions(model, shares):
        yield model


def _order_of(folder: Path) -> list[int]:
    """The layers of tuned routers, the one that a static route skips first coming first: as the tuning measured it."""
    result = (adapter.read(folder)[0].get("provenance") or {}).get("result") or {}
    if not result.get("order"):
        raise ConfigError(
            f"The routers in {folder} are of an older version, which did not note their order: remove that folder and "
            "the cells of its method."
        )
    return list(result["order"])


def check_reach(name: str, budget: float, n_layers: int, most: int, reached: bool) -> None:
    """Raises `BudgetError` for a budget that a row, which skips at most `most` sublayers, does not reach."""
    if not reached:
        raise BudgetError(
            f"budget {budget:g} cannot be reached by {name}: it skips at most {most} of {n_layers} sublayers, so at "
            f"least {(n_layers - most) / n_layers:.3f} always executes; leave the method or the budget out."
        )


def read_files(bench: Workbench, name: str, recipe: Recipe) -> None:
    """Tuning data that is not the model's own is read before any cell is measured."""
    if bench.source(name, recipe) != "self":
        bench.examples(name, recipe)


@contextmanager
def attached(model: PreTrainedModel, config: DepthConfig) -> Iterator[PreTrainedModel]:
    """The model with fresh routers, bare again afterwards."""
    attach(model, config)
    try:
        yield model
    finally:
        detach(model)


@contextmanager
def loaded(model: PreTrainedModel, folder: Path, budget: Budget) -> Iterator[PreTrainedModel]:
    """The model with saved routers at a budget (None: their own), bare again afterwards."""
    load(model, folder)
    try:
        if budget is not None:
            set_budget(model, **{routing_of(model).target.name: budget})
        yield model
    finally:
        detach(model)


def fixed(
    model: PreTrainedModel, folder: Path, skip: frozenset[int]
) -> Callable[[], AbstractContextManager[PreTrainedModel]]:
    """Opens the model with the skip paths of saved routers, and one route for every input."""

    @contextmanager
    def opened() -> Iterator[PreTrainedModel]:
        with loaded(model, folder, None):
            decisions = {site: site.layer not in skip for site in routing_of(model).sites}
            with fixed_routes(model, decisions):
                yield model

    return opened
