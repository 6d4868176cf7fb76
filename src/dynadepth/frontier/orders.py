"""Orders of static routes: which layers are skipped, the first one first.

Three of them are measured by removal (removal.py), which takes minutes: scores are kept (scores.py) after each
sublayer, or each round of a greedy search, which goes on where it was, also where a lower budget asks for more layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from dynadepth.budget import in_order, prompts_to_batches, up_to
from dynadepth.errors import ConfigError, DataError
from dynadepth.frontier.scores import Scores, read_scores, scores_path, write_scores
from dynadepth.frontier.workbench import Workbench
from dynadepth.methods import StaticConfig
from dynadepth.methods.static import skip_count
from dynadepth.model import attach, detach, load
from dynadepth.recipe_files import difference
from dynadepth.removal import Damage, GreedySearch, alone
from dynadepth.report.cells import plain
from dynadepth.tuning import load_recipe
from dynadepth.tuning.data import pad_token_id

TOKENS, STRIDE, PATIENCE = 4096, 4, 8
"""Of importance by removal: held-out tokens read, of which every so many are compared, and candidates a greedy round.
With 135M parameters on two cores one removal takes a few seconds, and 15 greedy rounds five to ten minutes."""


def _cosine(bench: Workbench, name: str, target: str) -> list[int]:
    return list(in_order(bench.scores(name, load_recipe(), target)))


def _alone(bench: Workbench, name: str, target: str, order: str = "alone") -> list[int]:
    found = _Removal.read(bench, name, target, order)
    if len(found.alone) < bench.n_layers:
        tell = _told(bench, "alone")

        def keep(done: int, total: int) -> None:
            found.write(bench, name)
            tell(done, total)

        folder = bench.paths(name, load_recipe(), every_site(target)) if order == "damage" else None
        with _measuring(bench, name, target, folder) as damage:
            alone(damage, keep, found.alone)
    return list(in_order(found.alone))


def _greedy(bench: Workbench, name: str, target: str) -> list[int]:
    count = max(skip_count(budget, bench.n_layers) for budget in bench.settings.budgets)
    if count and not _Removal.read(bench, name, target).search.chosen:
        _alone(bench, name, target)  # what the first round wants to know, kept after each sublayer
    found = _Removal.read(bench, name, target)
    search = found.search
    if len(search.chosen) < count:
        search.increase = search.increase or dict(found.alone)
        tell = _told(bench, "greedy")

        def keep(done: int, total: int) -> None:
            found.write(bench, name)
            tell(done, total)

        with _measuring(bench, name, target) as damage:
            search.extend(damage, count, PATIENCE, keep)
    return [site.layer for site in search.chosen]


ORDERS: dict[str, Callable[[Workbench, str, str], list[int]]] = {
    "cosine": _cosine,
    "alone": _alone,
    "damage": partial(_alone, order="damage"),
    "greedy": _greedy,
    "deepest": lambda bench, name, target: list(range(bench.n_layers - 2, -1, -1)),
    "random": lambda bench, name, target: Random(bench.settings.seed).sample(range(bench.n_layers), bench.n_layers),
}
"""By name: which layers are skipped, the first one first, as many as the lowest budget asks for or more. (workbench,
row, target) -> layers."""

BY_REMOVAL = ("alone", "damage", "greedy")
"""Orders that are measured by removal: without anything in a sublayer's place, or, `damage`, with the row's fitted skip
path."""

LEFT_OUT = {"deepest": 1}
"""Layers that an order never skips, where there are such."""


def order_settings(order: str, bench: Workbench, name: str, target: str) -> dict[str, Any]:
    """What a measured order depends on; nothing for the others."""
    if order == "cosine":
        return {"importance": bench.text_settings(name, load_recipe())}
    return {"importance": _settings(bench, name, target, order)} if order in BY_REMOVAL else {}


def check_order(order: str, bench: Workbench, name: str, target: str) -> None:
    """Raises `ConfigError` for scores that were measured with other settings."""
    if order in BY_REMOVAL:
        _Removal.read(bench, name, target, order)


def every_site(target: str) -> StaticConfig:
    """What the default recipe's skip paths are fitted for."""
    return StaticConfig(target=target, layers="all", **path_settings())


def path_settings() -> dict[str, Any]:
    """The default recipe's settings of skip paths."""
    return {key: value for key, value in load_recipe().method.items() if key in ("skip_path", "skip_rank")}


def _settings(bench: Workbench, name: str, target: str, order: str) -> dict[str, Any]:
    removal: dict[str, Any] = {"target": target, "tokens": TOKENS, "stride": STRIDE, "patience": PATIENCE}
    if order == "damage":
        removal["paths"] = bench.fit_settings(name, load_recipe(), every_site(target))["fit"]
    return plain({**bench.text_settings(name, load_recipe()), "removal": removal})


@dataclass
class _Removal:
    """What is known of a row's importance by removal."""

    settings: Mapping[str, Any]
    alone: Scores = field(default_factory=dict)
    search: GreedySearch = field(default_factory=GreedySearch)

    @classmethod
    def read(cls, bench: Workbench, name: str, target: str, order: str = "alone") -> _Removal:
        """From the row's file; without one, the damages alone that another row measured with the same settings."""
        settings, path = _settings(bench, name, target, order), scores_path(bench.out, name)
        if path.exists():
            try:
                made, found = _parsed(path)
            except DataError as error:
                bench.tell(f"{error} It is measured again.")
            else:
                if differs := difference(made, settings):
                    raise ConfigError(
                        f"The scores in {path} were measured with other settings ({differs}): give another --out, or "
                        "remove that file and the method's cells."
                    )
                return found
        for other in sorted(path.parent.glob("*.json")):
            with suppress(DataError):
                made, found = _parsed(other)
                if made == settings:
                    return cls(settings, found.alone)
        return cls(settings)

    def write(self, bench: Workbench, name: str) -> None:
        """Into the row's file."""
        parts = {"alone": self.alone, "chosen": self.search.chosen, "increase": self.search.increase}
        path = scores_path(bench.out, name)
        write_scores(path, self.settings, parts, bench.settings.seed, bench.model.dtype)


def _parsed(path: Path) -> tuple[dict[str, Any], _Removal]:
    settings, (each, chosen, increase) = read_scores(path, "alone", "chosen", "increase")
    return settings, _Removal(settings, each, GreedySearch(chosen, increase))


@contextmanager
def _measuring(bench: Workbench, name: str, target: str, paths: Path | None = None) -> Iterator[Damage]:
    """The damage of removals from the bare model, what is removed contributing nothing, or what saved `paths` say."""
    heldout = bench.split(name, load_recipe())[0]
    texts = prompts_to_batches(up_to((e.input_ids for e in heldout), TOKENS), pad_token_id(bench.tokenizer))
    bench.tell("importance by removal: the dense model's answers")
    if paths is None:
        attach(bench.model, StaticConfig(target=target, layers="all"))
    else:
        load(bench.model, paths)
    try:
        yield Damage(bench.model, texts, STRIDE)
    finally:
        detach(bench.model)


def _told(bench: Workbench, how: str) -> Callable[[int, int], None]:
    return lambda done, total: bench.tell(f"importance by removal, {how}: {done} of {total} sublayers")
