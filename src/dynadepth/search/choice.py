"""What a file of routes gives a model in the end: routers that choose by prompt, or the one route that serves all
prompts best (`static.best_static`). Whichever answers more of the prompts that neither learnt from, run as it will be.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dynadepth import adapter
from dynadepth.architectures import decoder_layers
from dynadepth.errors import DataError
from dynadepth.evaluation.continuations import ContinuationScorer, Request
from dynadepth.model import attach, detach, disabled, fixed_routes, save
from dynadepth.route_file import PromptRoutes, read
from dynadepth.routed import routing_of, unwrapped
from dynadepth.routing.recorder import recording
from dynadepth.search.questions import Question
from dynadepth.search.replay import Key, questions_of
from dynadepth.search.static import StaticRoute, best_static, static_route
from dynadepth.statistics import paired_bootstrap
from dynadepth.tuning.data import pad_token_id
from dynadepth.tuning.from_routes import RouteTuneResult, tune_from_routes
from dynadepth.tuning.route_data import parted
from dynadepth.tuning.route_recipe import RouteRecipe
from dynadepth.tuning.trainer import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROUTERS, STATIC = "routers", "static"
BATCH = 8


@dataclass(frozen=True)
class Answered:
    """How some prompts are answered."""

    accuracy: float
    """By the highest summed log-probability: `acc`."""

    difference: tuple[float, float, float]
    """From the dense model's accuracy: mean, and its 95 % interval, paired by prompt."""

    layers: float
    """Mean executions."""


@dataclass(frozen=True)
class RouteChoice:
    """What was chosen, and the figures it rests on."""

    directory: str
    seconds: float
    chosen: str
    """`routers` or `static`."""

    why: str
    """In words."""

    static: StaticRoute
    n_validation: int
    validation: dict[str, Answered]
    """`dense`, `static` and, where there are any, `routers`: of the prompts that decide."""

    n_heldout: int
    heldout: dict[str, Answered]
    """The same of prompts that decided nothing."""

    routers: RouteTuneResult | None
    """Their tuning; None where a static route was asked for."""


def choose_from_routes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    routes: str | Path,
    recipe: RouteRecipe,
    *,
    out: str | Path,
    with_routers: bool = True,
    max_samples: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> RouteChoice:
    """Finds the best static route on the training prompts of a file, tunes routers on their routes (`with_routers`),
    and saves in `out` what answers more of the validation prompts: the static route unless the routers are better
    beyond the noise, since it costs nothing to decide. Only multiple-choice prompts are compared.

    Raises what `tune_from_routes` raises, and `DataError` for a file without multiple-choice prompts.
    """
    started = time.monotonic()
    base = unwrapped(model)
    file = read(routes, adapter.identity(base, decoder_layers(base)))
    training, validation, heldout = parted(file, recipe, max_samples, seed)

    def tell(line: str) -> None:
        if progress is not None:
            progress(f"best static route, {line}", 0, 0, {})

    static = best_static(model, tokenizer, file, among=_keys(training), seed=seed, progress=tell)
    tuned = None
    if with_routers:
        tuned = tune_from_routes(
            model, tokenizer, routes, recipe, out=out, max_samples=max_samples, seed=seed, progress=progress
        )
    else:
        attach(model, static_route(static.counts))
    questions = questions_of(file, tokenizer)
    decides, other = (
        _Compared(model, tokenizer, [questions[key] for key in _keys(part) if key in questions], static, with_routers)
        for part in (validation, heldout)
    )
    chosen, why = decides.judged(seed)
    if chosen == STATIC and with_routers:
        provenance = routing_of(model).provenance
        detach(model)
        attach(model, static_route(static.counts))
        routing_of(model).provenance = provenance
    result = RouteChoice(
        directory=str(out),
        seconds=time.monotonic() - started,
        chosen=chosen,
        why=why,
        static=static,
        n_validation=decides.n,
        validation=decides.answered(seed),
        n_heldout=other.n,
        heldout=other.answered(seed),
        routers=tuned,
    )
    told = {name: value for name, value in asdict(result).items() if name not in ("directory", "routers")}
    routing_of(model).provenance["choice"] = told
    save(model, out)
    return result


def _keys(prompts: Sequence[PromptRoutes]) -> list[Key]:
    return [(prompt.source, prompt.id) for prompt in prompts]


class _Compared:
    """Prompts answered by the dense model, under the static route and, where there are any, under the routers'."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[Question],
        static: StaticRoute,
        with_routers: bool,
    ) -> None:
        if not questions:
            raise DataError(
                "none of the prompts put aside is a multiple choice, on which a static route and routers are compared: "
                "search more of them, or tune with --method drllm."
            )
        route = {site: static.counts[site.layer] for site in routing_of(model).sites}
        ways: dict[str, AbstractContextManager[Any]] = {"dense": disabled(model), STATIC: fixed_routes(model, route)}
        if with_routers:
            ways[ROUTERS] = nullcontext()
        self.n = len(questions)
        self.right: dict[str, list[float]] = {}
        self.layers: dict[str, float] = {}
        for name, way in ways.items():
            with way, recording() as record:
                self.right[name] = _right(model, questions, pad_token_id(tokenizer))
            depth = record.depth("prefill")
            self.layers[name] = float(routing_of(model).n_layers) if depth is None else depth

    def answered(self, seed: int) -> dict[str, Answered]:
        """The figures."""
        found, dense = {}, self.right["dense"]
        for name, right in self.right.items():
            accuracy, low_high = sum(right) / self.n, paired_bootstrap(right, dense, seed=seed)
            found[name] = Answered(accuracy, (accuracy - sum(dense) / self.n, *low_high), self.layers[name])
        return found

    def judged(self, seed: int) -> tuple[str, str]:
        """What is better, and why."""
        if ROUTERS not in self.right:
            return STATIC, "asked for"
        static, routers = self.right[STATIC], self.right[ROUTERS]
        low, high = paired_bootstrap(routers, static, seed=seed)
        chosen = ROUTERS if low > 0 else STATIC
        return chosen, (
            f"routers answer {sum(routers) / self.n:.1%} of {self.n} prompts rightly, the static route "
            f"{sum(static) / self.n:.1%}; difference {100 * low:+.1f} to {100 * high:+.1f} points"
        )


@torch.no_grad()
def _right(model: PreTrainedModel, questions: Sequence[Question], pad: int) -> list[float]:
    """1 for each question whose right option has the highest summed log-probability, else 0."""
    requests = [
        Request(list(question.context), list(tokens), len(question.context))
        for question in questions
        for tokens in question.continuations
    ]
    sums = iter(total for total, _ in ContinuationScorer(model, pad)(requests, BATCH))
    found = []
    for question in questions:
        log_probs = list(islice(sums, len(question.continuations)))
        gold = log_probs.pop(question.gold or 0)
        found.append(float(gold > max(log_probs)))
    return found
