"""Rows of searched routes: routers that learnt from them, with their controls (a static and a random route as long, the
best static route of the search), and the oracle, which is given each prompt's own.

The file of routes is the row's data, `--data drllm=FILE`, `--data oracle=FILE`. Such rows take their own choice, which
no budget sets, so that each has one cell.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynadepth import adapter
from dynadepth.architectures import decoder_layers
from dynadepth.budget import mixture
from dynadepth.errors import ConfigError, DataError
from dynadepth.frontier.given import Prompt, Route, giving
from dynadepth.frontier.makers import Beside, Budget, Maker, Part, attached, fixed, loaded
from dynadepth.frontier.scoring import measured
from dynadepth.frontier.settings import source_facts
from dynadepth.frontier.workbench import Workbench
from dynadepth.methods.random import RandomConfig
from dynadepth.model import attach, detach
from dynadepth.report.cells import ROUTERS, plain
from dynadepth.report.stamp import sign
from dynadepth.route_file import RouteFile, read
from dynadepth.routed import is_attached, routing_of
from dynadepth.routing.calibration import TOLERANCE
from dynadepth.routing.decision import Site
from dynadepth.search.figures import figures_of
from dynadepth.search.static import KEPT, SELECTION, best_static, static_route
from dynadepth.tuning.from_routes import tune_from_routes
from dynadepth.tuning.route_recipe import RouteRecipe, load_route_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def routes_file(bench: Workbench, name: str) -> str:
    """The file of routes that a row is given; ConfigError where none is named."""
    file = bench.settings.data_of.get(name)
    if file is None:
        raise ConfigError(
            f"{name} needs searched routes: name their file as --data {name}=FILE, or leave the method out with "
            "--methods."
        )
    return file


def read_routes(bench: Workbench, name: str) -> RouteFile:
    """What it holds, read once: the routes that a routed model can take. It must be this model's."""
    path = routes_file(bench, name)
    if path in bench.routes:
        return bench.routes[path]
    file = read(path, adapter.identity(bench.model, decoder_layers(bench.model)))
    prompts = [replace(p, routes=tuple(route for route in p.routes if route.can_be_routed)) for p in file.prompts]
    bench.routes[path] = replace(file, prompts=prompts)
    return bench.routes[path]


@dataclass(frozen=True)
class Searched(Maker):
    """Routers tuned on searched routes by a recipe, at their own choice."""

    recipe: str

    def made(self) -> RouteRecipe:
        """The recipe."""
        return load_route_recipe(self.recipe)

    def budgets(self, name: str, asked: Iterable[float], n_layers: int) -> tuple[Budget, ...]:
        return (None,)

    def settings(self, bench: Workbench, name: str) -> dict[str, Any]:
        tuning = {
            "recipe": self.made().to_dict(),
            "data": source_facts(routes_file(bench, name)),
            "max_samples": bench.settings.max_samples,
            "seed": bench.settings.seed,
            "model": bench.fingerprint,
        }
        return {"tuning": plain(tuning)}

    def ready(self, bench: Workbench, name: str) -> None:
        read_routes(bench, name)
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
                routes_file(bench, name),
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
class _AsDeep(Beside[Searched]):
    """A control that runs as many layers as the routers did on the texts, their repeats counted. It repeats none, and
    runs no more than the dense model."""

    def settings(self, bench: Workbench, name: str) -> dict[str, Any]:
        return {**super().settings(bench, name), "as deep": True}

    def share(self, bench: Workbench, budget: Budget) -> float:
        """Of the layers, those that run."""
        return min(1.0, bench.cell(self.of, budget)["text"]["depth"] / bench.n_layers)


@dataclass(frozen=True)
class StaticBeside(_AsDeep):
    """One route for every input, which skips the layers that the routers ran least."""

    def parts(self, bench: Workbench, name: str, budget: Budget) -> list[Part]:
        folder, cell = self.row.folder(bench, self.of), bench.cell(self.of, budget)
        passes = {Site.parse(site).layer: count for site, count in cell["site_keep"].items()}
        order = sorted(passes, key=lambda layer: passes[layer])
        counts = mixture(self.share(bench, budget), bench.n_layers, len(order), TOLERANCE)
        return [Part(fixed(bench.model, folder, frozenset(order[:count])), share) for count, share in counts]


@dataclass(frozen=True)
class RandomBeside(_AsDeep):
    """Each input draws which layers it skips."""

    def parts(self, bench: Workbench, name: str, budget: Budget) -> list[Part]:
        keep = max(self.share(bench, budget), 1e-6)
        config = RandomConfig(target="block", layers="all", keep=keep, seed=bench.settings.seed)
        return [Part(lambda: attached(bench.model, config))]


@dataclass(frozen=True)
class BestStatic(Beside[Searched]):
    """One route for every input, chosen on the searched prompts (`search.static.best_static`). Saved like any other
    static route."""

    def ready(self, bench: Workbench, name: str) -> None:
        super().ready(bench, name)
        if all(prompt.options is None for prompt in read_routes(bench, self.of).prompts):
            raise DataError(
                f"{routes_file(bench, self.of)} has no multiple-choice prompts, on which {name} compares routes: leave "
                "the method out with --methods."
            )

    def parts(self, bench: Workbench, name: str, budget: Budget) -> list[Part]:
        folder = self._folder(bench, name)
        return [Part(lambda: loaded(bench.model, folder, None))]

    def _folder(self, bench: Workbench, name: str) -> Path:
        folder = bench.out / ROUTERS / name
        of_routes = {key: self.row.settings(bench, self.of)["tuning"][key] for key in OF_ROUTES}
        settings = plain({"best static": {**of_routes, "selection": SELECTION}})
        if bench.is_made(name, settings):
            return folder
        started = time.monotonic()
        found = best_static(
            bench.model,
            bench.tokenizer,
            read_routes(bench, self.of),
            seed=bench.settings.seed,
            kept=folder / KEPT,
            progress=lambda line: bench.tell(f"{name}, {line}"),
        )
        attach(bench.model, static_route(found.counts))
        try:
            result = {"seconds": time.monotonic() - started, **asdict(found)}
            routing_of(bench.model).provenance = {"frontier": settings, "result": result}
            sign(bench.model, folder, bench.settings.model, bench.settings.seed)
            (folder / KEPT).unlink(missing_ok=True)
        finally:
            detach(bench.model)
        return folder


OF_ROUTES = ("data", "seed", "model")
"""Settings of a searched row that its best static route depends on."""


@dataclass(frozen=True)
class Oracle(Maker):
    """Every prompt of the file under the first route that the search kept for it, everything else dense: what routers
    could reach that choose among these routes and know the answers. The file is of routes searched on the rows that are
    scored. The search judges by `acc`, and short answers token by token; prompts of the same tokens stay dense."""

    def budgets(self, name: str, asked: Iterable[float], n_layers: int) -> tuple[Budget, ...]:
        return (None,)

    def settings(self, bench: Workbench, name: str) -> dict[str, Any]:
        return {"routes": source_facts(routes_file(bench, name))}

    def ready(self, bench: Workbench, name: str) -> None:
        read_routes(bench, name)
        if not bench.settings.tasks:
            raise DataError(f"{name} is scored on tasks: name those whose rows were searched with --tasks.")
        with attached(bench.model, static_route((1,) * bench.n_layers)):
            pass  # the probe refuses what this model cannot do

    def parts(self, bench: Workbench, name: str, budget: Budget) -> list[Part]:
        file, dense = read_routes(bench, name), (1,) * bench.n_layers
        prompts = [tuple(bench.tokenizer.encode(prompt.prompt.rstrip())) for prompt in file.prompts]
        times = Counter(prompts)
        best = {
            tokens: prompt.routes[0].counts if prompt.routes else dense
            for tokens, prompt in zip(prompts, file.prompts, strict=True)
            if times[tokens] == 1
        }

        def scored(model: PreTrainedModel) -> dict[str, Any]:
            sites = routing_of(model).sites
            routes: dict[Prompt, Route] = {
                prompt: {site: counts[site.layer] for site in sites} for prompt, counts in best.items()
            }
            with giving(model, routes, dict.fromkeys(sites, 1)) as given:
                found = measured(
                    model, bench.tokenizer, bench.settings, bench.tell, prompts=False, dense_states=bench.dense_states
                )
            if not given:
                raise DataError(
                    f"none of the {len(best)} prompts of {routes_file(bench, name)} is scored: search routes on the "
                    "rows of --tasks, or leave the method out with --methods."
                )
            luck = figures_of(file.prompts, bench.n_layers, float(file.header.search["margin"]))
            shares = {key: luck[key] for key in ("corrected", "control_corrected")}
            return {**found, "given": {"prompts": len(given), "of": len(file.prompts), **shares}}

        return [Part(lambda: attached(bench.model, static_route(dense)), scored=scored)]
