"""A tuning run from first to last: routers attached, skip paths fitted, both trained, budgets calibrated, all saved."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dynadepth import budget as budgets
from dynadepth.budget import in_order
from dynadepth.dial import set_budget
from dynadepth.errors import ConfigError, TuningError
from dynadepth.lora import LoraSettings
from dynadepth.methods import StaticConfig
from dynadepth.model import add_lora, attach, detach, save
from dynadepth.routed import is_attached, routing_of, unwrapped
from dynadepth.routing.decision import KeepRatio
from dynadepth.tuning.choice import STATIC, Choice, choose, settle, twins
from dynadepth.tuning.data import Collator, Example, pad_token_id
from dynadepth.tuning.heldout import distance
from dynadepth.tuning.orders import scores_by
from dynadepth.tuning.recipe import Recipe
from dynadepth.tuning.resuming import Measured, keep_start, kept_start, restore, resumable, snapshot
from dynadepth.tuning.start import (
    check_learnable,
    check_numbers,
    data_digest,
    fit,
    freeze_base,
    held_out,
    initialise,
    shares_of,
    start_by_token,
    state_budget,
)
from dynadepth.tuning.trainer import Progress, RouterTrainer, check_device, check_trainable, moved, trainer_for


@dataclass
class TuneResult:
    """What a run did. Keep ratios and KL are measured on held-out prompts, with hard decisions."""

    directory: str
    seconds: float
    steps: int
    n_trainable: int
    n_train: int
    n_heldout: int
    keep_before: KeepRatio | None
    keep_after: KeepRatio | None
    kl_before: float
    kl_after: float
    moved: float
    """Root mean square change of the router parameters."""
    losses: list[float] = field(default_factory=list)
    static_skip: list[int] = field(default_factory=list)
    """Layers that a static route of the budget skips: the one saved, or the one of the same importance scores."""
    kl_static: float | None = None
    """KL of static routes in `order` with the tuned skip paths, which execute as much as the routers did; None where a
    static route is saved."""
    explained: dict[str, float] | None = None
    """Share of the variance of each site's contribution that its skip path explained as fitted."""
    order: list[int] = field(default_factory=list)
    """Layers, the one that a static route skips first coming first."""
    choice: Choice | None = None
    """Between routers and a static route, where the recipe asks for it."""


@dataclass(frozen=True)
class _Start:
    """What a run starts from, with the model attached, fitted and initialised."""

    budget: float
    training: list[Example]
    heldout: list[Example]
    collator: Collator
    """Of held-out examples."""
    prompts: budgets.Batches
    """Held-out ones, as far as a decision sees them."""
    shares: list[float]
    """Keep ratios to calibrate; none of a static route."""
    measured: Measured
    earlier: float
    """Seconds that an interrupted run took to make it; 0 where it was made now."""


def tune(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    recipe: Recipe,
    *,
    out: str | Path,
    budget: float | None = None,
    target: str | None = None,
    granularity: str | None = None,
    kv_policy: str | None = None,
    seed: int = 0,
    resume: bool = True,
    progress: Progress | None = None,
) -> TuneResult:
    """Attaches fresh routers to `model`, tunes them on `examples`, calibrates their budgets and saves them in `out`.

    Where the recipe says `choose`, a static route with the same skip paths is saved instead unless the routers are
    better. Held-out examples (the recipe's share, or as many as calibration takes) give the calibration, that choice
    and the figures of the result, never gradients. An interrupted run with the same model, settings and data
    resumes from its last checkpoint, and what it measured and fitted to start from is not done again. Raises
    TuningError where the loss turns NaN (the last good routers are saved first) or where there are too few examples,
    ConfigError where the recipe leaves nothing to tune.
    """
    started = time.monotonic()
    out = Path(out)
    if is_attached(model):
        raise ConfigError("This model is already routed: dynadepth.detach(model) first.")
    check_trainable(recipe)
    check_device(model)
    if len(examples) < 2:
        raise TuningError(f"{len(examples)} example leaves nothing to hold out: give at least 2.")

    overrides = {"target": target, "granularity": granularity, "kv_policy": kv_policy}
    attach(model, recipe.config(**overrides))
    try:
        freeze_base(model)
        start = _start(model, tokenizer, examples, recipe, budget, overrides, out, seed, resume, progress)
    except BaseException:
        detach(model)
        raise
    learnt = snapshot(model)
    compare = _stage(progress, "compare")
    before = distance(model, start.heldout, start.collator, compare)
    trainer = _train(model, start, recipe, out, seed, resume, started, progress)
    n_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    way = moved(learnt, snapshot(model))
    choice = _set(model, start, recipe, progress)
    after = distance(model, start.heldout, start.collator, compare)
    routing = routing_of(model)
    skip = budgets.static_skip(start.measured.scores, start.budget, routing.n_layers)
    if isinstance(routing.config, StaticConfig):
        skip = routing.config.skip
    order, kl_static = in_order(start.measured.scores), None
    if not routing.is_static and after.executed is not None:
        (sums,) = twins(model, start.heldout, start.collator, order, [after.executed], compare)
        kl_static = sum(sums) / max(after.tokens, 1)
    result = TuneResult(
        directory=str(out),
        seconds=trainer.seconds,
        steps=trainer.state.global_step,
        n_trainable=n_trainable,
        n_train=len(start.training),
        n_heldout=len(start.heldout),
        keep_before=before.keep,
        keep_after=after.keep,
        kl_before=before.mean,
        kl_after=after.mean,
        moved=way,
        losses=trainer.losses,
        static_skip=list(skip),
        kl_static=kl_static,
        explained=start.measured.explained,
        order=list(order),
        choice=choice,
    )
    for path in routing.paths().values():
        path.to(unwrapped(model).dtype)
    if routing.lora is not None:
        routing.lora.to(unwrapped(model).dtype)
    routing.provenance["result"] = {k: v for k, v in asdict(result).items() if k != "directory"}
    save(model, out)
    return result


def _start(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    recipe: Recipe,
    budget: float | None,
    overrides: dict[str, str | None],
    out: Path,
    seed: int,
    resume: bool,
    progress: Progress | None,
) -> _Start:
    if recipe.lora:
        torch.manual_seed(seed)
        add_lora(model, LoraSettings.from_dict(recipe.lora))
    pad = pad_token_id(tokenizer)
    budget, keep = state_budget(model, recipe, budget, overrides)
    check_learnable(model, recipe)
    check_numbers(model, examples[0])
    routing = routing_of(model)
    shares = [] if routing.is_static else shares_of(recipe, keep)
    n_heldout = held_out(recipe, len(examples), len(shares))
    heldout, training = list(examples[:n_heldout]), list(examples[n_heldout:])
    routing.provenance = {
        "recipe": recipe.to_dict(),
        "config": routing.config.to_dict(),
        "budget": budget,
        "seed": seed,
        "n_train": len(training),
        "data": data_digest(examples),
    }
    collator = Collator(pad, seed=seed)
    # A sequence is decided on its prompt, a token wherever it stands.
    decided = [
        e.input_ids[: e.prompt_length or collator.prefix_length(e.input_ids)]
        if routing.granularity.sticky
        else e.input_ids
        for e in heldout
    ]
    prompts = budgets.prompts_to_batches(decided, pad)
    if shares:
        budgets.check_prompts(model, prompts, len(shares))
    began, kept = time.monotonic(), kept_start(model, out) if resume else None
    if kept is None:
        measured = _measure(model, tokenizer, examples, heldout, training, recipe, progress)
    else:
        measured = kept[0]
    torch.manual_seed(seed)
    initialise(model, recipe, measured.scores, budget)
    if kept is None:
        start_by_token(model, recipe, training, pad, budget, _stage(progress, "fit"))
        keep_start(model, out, measured, time.monotonic() - began)
    else:
        restore(model, kept[1])
    earlier = 0.0 if kept is None else kept[2]
    return _Start(budget, training, heldout, collator, prompts, shares, measured, earlier)


def _measure(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    heldout: list[Example],
    training: list[Example],
    recipe: Recipe,
    progress: Progress | None,
) -> Measured:
    """Fits the skip paths, and measures what the recipe's order needs."""
    explained = fit(model, training, pad_token_id(tokenizer), _stage(progress, "fit"))
    stage = _stage(progress, "importance")
    return Measured(scores_by(model, recipe.order, examples, heldout, tokenizer, stage), explained)


def _train(
    model: nn.Module,
    start: _Start,
    recipe: Recipe,
    out: Path,
    seed: int,
    resume: bool,
    started: float,
    progress: Progress | None,
) -> RouterTrainer:
    """Trains, or goes on from the last checkpoint; what is stopped leaves a usable folder. `started`: when the run
    began, by the monotonic clock."""
    routing = routing_of(model)
    scoring = Collator(start.collator.pad_token_id, seed=seed, score_prompts=recipe.score == "all")
    trainer = trainer_for(model, start.training, scoring, recipe, out, start.budget, seed, progress)
    trainer.started, trainer.before = started, start.earlier
    checkpoint = resumable(model, out) if resume else None
    try:
        if checkpoint is None:
            trainer.train()
        else:
            trainer.go_on(*checkpoint)
        trainer.check_finite()
    except (KeyboardInterrupt, TuningError) as error:
        routing.provenance["stopped"] = {"step": trainer.state.global_step, "why": str(error) or "interrupted"}
        if routing.is_static:
            set_budget(model, **{routing.target.name: start.budget})
        save(model, out)
        raise
    finally:
        for router in routing.routers().values():
            router.requires_grad_(True)
    model.eval()
    return trainer


def _set(model: nn.Module, start: _Start, recipe: Recipe, progress: Progress | None) -> Choice | None:
    """Calibrates every budget, chooses between routers and a static route where asked to, and sets the run's budget."""
    choice = None
    if start.shares:
        budgets.calibrate(model, start.prompts, start.shares, _stage(progress, "calibrate"))
        if recipe.choose:
            compared = sorted({start.budget, *recipe.budgets}, reverse=True)
            stage = _stage(progress, "compare")
            choice = choose(model, start.heldout, start.collator, compared, start.measured.scores, stage)
            if choice.chosen == STATIC:
                settle(model, choice.order)
    routing = routing_of(model)
    if routing.is_static or recipe.calibrate:
        set_budget(model, **{routing.target.name: start.budget})
    return choice


def _stage(progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    """Tells of one stage that has no figures."""
    return None if progress is None else (lambda done, total: progress(name, done, total, {}))
