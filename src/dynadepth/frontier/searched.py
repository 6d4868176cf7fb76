"""Rows of routers that learnt from searched routes, and their controls: a static and a random route as long.

The file of routes is the row's tuning data, `--data drllm=FILE`. Such routers take their own choice, which no budget
sets, so that each of these rows has one cell.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynadepth import adapter
from dynadepth.architectures import decoder_layers
from dynadepth.budget import mixture
from dynadepth.errors import ConfigError
from dynadepth.frontier.makers import Budget, Maker, Part, attached, fixed, loaded
from dynadepth.frontier.settings import source_facts
from dynadepth.frontier.workbench import Workbench
from dynadepth.methods.random import RandomConfig
from dynadepth.model import detach
from dynadepth.report.cells import ROUTERS, plain
from dynadepth.report.stamp import sign
from dynadepth.route_file import read
from dynadepth.routed import is_attached, routing_of
from dynadepth.routing.calibration import TOLERANCE
from dynadepth.routing.decision import Site
from dynadepth.tuning.from_routes import tune_from_routes
from dynadepth.tuning.route_recipe import RouteRecipe, load_route_recipe


@dataclass(frozen=True)
class Searched(Maker):
    """Routers tuned on searched routes by a recipe, at their own choice."""

    recipe: str

    def made(self) -> RouteRecipe:
        """The recipe."""
        return load_route_recipe(self.recipe)

    def file(self, bench: Workbench, name: str) -> str:
        """The file of routes; ConfigError where none is named."""
        file = bench.settings.data_of.get(name)
        if file is None:
            raise ConfigError(
                f"{name} learns from searched routes: name their file as --data {name}=FILE, or leave the method out "
                "with --methods."
            )
        return file

    def budgets(self, name: str, asked: Iterable[float], n_layers: int) -> tuple[Budget, ...]:
        return (None,)

    def settings(self, bench: Workbench, name: str) -> dict[str, Any]:
        tuning = {
            "recipe": self.made().to_dict(),
            "data": source_facts(self.file(bench, name)),
            "max_samples": bench.settings.max_samples,
            "seed": bench.settings.seed,
            "model": bench.fingerprint,
        }
        return {"tuning": plain(tuning)}

    def ready(self, bench: Workbench, name: str) -> None:
        read(self.file(bench, name), adapter.identity(bench.model, decoder_layers(bench.model)))
        with attached(bench.model, self.made().config()):
            pass  # the probe refuses what this model cannot do

    def parts(self, bench: Workbench, name: str, budget: Budget) -> list[Part]:
        folder = self.folder(bench, name)
        return [Part(lambda: loaded(bench.model, folder, None))]

    def folder(self, bench: Workbench, name: str) -> Path:
        """Of the routers, tuned now if need be."""
        folder, settings = bench.out / ROUTERS / name, self.settings(bench, name)["tuning"]
        if bench.is_made(name, settings):
            return folder
        try:
            tune_from_routes(
                bench.model,
                bench.tokenizer,
                self.file(bench, name),
                self.made(),
                out=folder,
                max_samples=bench.settings.max_samples,
                seed=bench.settings.seed,
                progress=lambda stage, done, total, _: bench.tell(f"{name}, {stage}: {done} of {total}"),
            )
            routing_of(bench.model).provenance["frontier"] = settings
            sign(bench.model, folder, bench.settings.model, bench.settings.seed)
        finally:
            if is_attached(bench.model):
                detach(bench.model)
            bench.model.eval()
        return folder


@dataclass(frozen=True)
class _Beside(Maker):
    """A control of a searched row, with its one cell."""

    of: str
    """The searched row's name: its cell comes first."""
    row: Searched

    def budgets(self, name: str, asked: Iterable[float], n_layers: int) -> tuple[Budget, ...]:
        return (None,)

    def settings(self, bench: Workbench, name: str) -> dict[str, Any]:
        return {"beside": self.row.settings(bench, self.of)}

    def ready(self, bench: Workbench, name: str) -> None:
        self.row.ready(bench, self.of)


@dataclass(frozen=True)
class StaticBeside(_Beside):
    """One route for every input that skips as many layers as the routers did on the texts: those that they ran least.
    It repeats none."""

    def parts(self, bench: Workbench, name: str, budget: Budget) -> list[Part]:
        folder, cell = self.row.folder(bench, self.of), bench.cell(self.of, budget)
        passes = {Site.parse(site).layer: count for site, count in cell["site_keep"].items()}
        order = sorted(passes, key=lambda layer: passes[layer])
        counts = mixture(cell["text"]["keep_ratio"]["all"], bench.n_layers, len(order), TOLERANCE)
        return [Part(fixed(bench.model, folder, frozenset(order[:count])), share) for count, share in counts]


@dataclass(frozen=True)
class RandomBeside(_Beside):
    """Each input draws which layers it skips, the routers' share of them on the texts. It repeats none."""

    def parts(self, bench: Workbench, name: str, budget: Budget) -> list[Part]:
        keep = bench.cell(self.of, budget)["text"]["keep_ratio"]["all"]
        config = RandomConfig(target="block", layers="all", keep=max(keep, 1e-6), seed=bench.settings.seed)
        return [Part(lambda: attached(bench.model, config))]
