"""What a file of routes gives a model in the end: routers that choose by prompt, or the one route that serves all
prompts best (`static.best_static`). Whichever answers more of the validation prompts, run as it will be.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dynadepth import adapter
from dynadepth.architectures import decoder_layers
from dynadepth.errors import DataError
from dynadepth.evaluation.continuations import ContinuationScorer, Request
from dynadepth.model import attach, detach, disabled, save
from dynadepth.route_file import read
from dynadepth.routed import routing_of, unwrapped
from dynadepth.routing.recorder import recording
from dynadepth.search.questions import Question
from dynadepth.search.replay import questions_of
from dynadepth.search.static import KEPT, StaticRoute, best_static, static_route
from dynadepth.statistics import paired_bootstrap
from dynadepth.tuning.data import pad_token_id
from dynadepth.tuning.from_routes import RouteTuneResult, learnt_from, tune_from_routes
from dynadepth.tuning.route_data import parted
from dynadepth.tuning.route_recipe import RouteRecipe
from dynadepth.tuning.trainer import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROUTERS, STATIC = "routers", "static"
BATCH = 8

ENOUGH = 20
"""Validation prompts without which routers are not called better: the interval of a few equal answers has no width."""


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
    n_train: int
    """Multiple-choice prompts that the static route was chosen by."""

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

    What ran to choose a static route is kept in `out` until the end (`KEPT`): interrupted, the choice goes on from it.
    Raises what `tune_from_routes` raises, and `DataError` for a file without multiple-choice prompts.
    """
    started = time.monotonic()
    base = unwrapped(model)
    file = read(routes, adapter.identity(base, decoder_layers(base)))
    prompts = parted(file, recipe, max_samples, seed, learnable=with_routers)
    questions = questions_of(file, tokenizer)
    training, validation, heldout = ([q for p in part if (q := questions.get((p.source, p.id)))] for part in prompts)
    for name, part in (("validation", validation), ("held-out", heldout)):
        if len(part) < 2:
            raise DataError(
                f"{len(part) or 'none'} of the {name} prompts is a multiple choice, on which routes are compared, and "
                "it takes two: search more of them, or tune with --method drllm."
            )

    def tell(line: str) -> None:
        if progress is not None:
            progress(f"best static route, {line}", 0, 0, {})

    names = {(question.source, question.id) for question in training}
    kept = Path(out) / KEPT
    static = best_static(model, tokenizer, file, among=names, seed=seed, kept=kept, progress=tell)
    sides = _Side(model, tokenizer, validation, seed), _Side(model, tokenizer, heldout, seed)
    attach(model, static_route(static.counts))
    for side in sides:
        with disabled(model):
            side.answer("dense")
        side.answer(STATIC)
    tuned = None
    if with_routers:
        detach(model)
        tuned = tune_from_routes(
            model, tokenizer, routes, recipe, out=out, max_samples=max_samples, seed=seed, progress=progress
        )
        for side in sides:
            side.answer(ROUTERS)
    chosen, why = sides[0].judged()
    provenance = routing_of(model).provenance
    if chosen == STATIC:
        if with_routers:
            detach(model)
            attach(model, static_route(static.counts))
        provenance = learnt_from(routes, file, recipe, seed)
    result = RouteChoice(
        directory=str(out),
        seconds=time.monotonic() - started,
        chosen=chosen,
        why=why,
        static=static,
        n_train=len(training),
        n_validation=len(validation),
        validation=sides[0].answered,
        n_heldout=len(heldout),
        heldout=sides[1].answered,
        routers=tuned,
    )
    choice = {name: value for name, value in asdict(result).items() if name not in ("directory", "routers")}
    mine = {"seconds": result.seconds, "n_train": result.n_train} if chosen == STATIC else provenance["result"]
    routing_of(model).provenance = {**provenance, "result": {**mine, "choice": choice}}
    save(model, out)
    kept.unlink(missing_ok=True)
    return result


class _Side:
    """Prompts that were put aside, answered in several ways."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[Question],
        seed: int,
    ) -> None:
        self.model, self.questions, self.seed = model, questions, seed
        self.pad = pad_token_id(tokenizer)
        self.answered: dict[str, Answered] = {}
        self._right: dict[str, list[float]] = {}

    def answer(self, name: str) -> None:
        """Answers all prompts with the model as it stands; `dense` comes first."""
        with recording() as record:
            right = self._right[name] = _right(self.model, self.questions, self.pad)
        depth, dense = record.depth("prefill"), self._right["dense"]
        accuracy = sum(right) / len(right)
        low, high = paired_bootstrap(right, dense, seed=self.seed)
        layers = float(routing_of(self.model).n_layers) if depth is None else depth
        self.answered[name] = Answered(accuracy, (accuracy - sum(dense) / len(dense), low, high), layers)

    def judged(self) -> tuple[str, str]:
        """What is better, and why."""
        if ROUTERS not in self._right:
            return STATIC, "asked for"
        static, routers = self._right[STATIC], self._right[ROUTERS]
        low, high = paired_bootstrap(routers, static, seed=self.seed)
        n = len(static)
        if n < ENOUGH:
            return STATIC, f"{n} validation prompts are too few to tell: it takes {ENOUGH}"
        return ROUTERS if low > 0 else STATIC, (
            f"routers answer {sum(routers) / n:.1%} of {n} prompts rightly, the static route {sum(static) / n:.1%}; "
            f"difference {100 * low:+.1f} to {100 * high:+.1f} points"
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
