"""Where a run starts: its budget, routers or a route from importance scores, skip paths fitted in closed form."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dynadepth.architectures import decoder_of, text_config
from dynadepth.budget import KEEPS, Batches, in_order, pin_threshold, prompts_to_batches, units_needed, up_to
from dynadepth.dial import check_budget, set_budget
from dynadepth.errors import ConfigError, TuningError
from dynadepth.methods import StaticConfig
from dynadepth.model import disabled
from dynadepth.routed import routing_of, unwrapped
from dynadepth.routing.decision import Site
from dynadepth.tuning.data import Example
from dynadepth.tuning.recipe import Recipe
from dynadepth.tuning.surrogate import TOKENS_A_FEATURE, fit_paths, n_features
from dynadepth.tuning.token_routers import fit_token_routers

FIT_TOKENS = 32_768
"""Tokens of the training examples that skip paths are fitted on at least; what more would bring, tuning brings."""

PINNED = 2
"""Batches, the longest ones, on which the first threshold of routers of tokens is measured."""


def check_learnable(model: nn.Module, recipe: Recipe) -> None:
    """Raises ConfigError where the steps, or some of them, would have nothing to tune."""
    routing = routing_of(model)
    if not routing.trainable:
        raise ConfigError(
            f"There is nothing to tune: method {routing.config.name!r} has no router parameters, and skip_path "
            f"{routing.config.skip_path!r} has none: set skip_path to linear."
        )
    if recipe.init == "importance" and not routing.is_static and not hasattr(routing.config, "bias"):
        raise ConfigError(
            f"init: importance starts routers by their biases, and those of method {routing.config.name!r} have none: "
            "set init to zeros, or take another method."
        )
    if recipe.joint < 1 and not routing.paths() and routing.lora is None:
        raise ConfigError(f"joint: {recipe.joint} leaves nothing to learn without skip paths or LoRA: set it to 1.")


def check_numbers(model: nn.Module, example: Example) -> None:
    """Raises TuningError where the dense model itself gives no numbers, which nothing can be fitted or tuned to."""
    base: Any = unwrapped(model)
    ids = torch.tensor([example.input_ids], device=next(base.parameters()).device)
    training = model.training
    model.eval()
    with torch.no_grad(), disabled(model):
        states = decoder_of(base)(input_ids=ids, use_cache=False)[0]
    model.train(training)
    if not states.isfinite().all():
        raise TuningError(
            f"{type(base).__name__} overflows in {str(base.dtype).removeprefix('torch.')}, without any route: give "
            "--dtype bfloat16 or float32."
        )


def freeze_base(model: nn.Module) -> None:
    """A LoRA that PEFT put on the model is a part of the dense model, as `attach` leaves it; tuning is not to move it:
    no checkpoint would hold it."""
    routing = routing_of(model)
    own = {id(p) for part in (*routing.routers().values(), *routing.paths().values()) for p in part.parameters()}
    for parameter in unwrapped(model).parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in own)


def state_budget(
    model: nn.Module, recipe: Recipe, budget: float | None, overrides: dict[str, Any]
) -> tuple[float, float]:
    """The budget and the keep ratio it asks of the routed sites, which becomes the training-time capacity of methods
    that have one. Raises BudgetError where that one, or one of the recipe's, is out of reach."""
    routing = routing_of(model)
    budget = check_budget(recipe.budget if budget is None else budget, routing)
    for served in recipe.budgets:
        check_budget(served, routing)
    keep = keep_of(model, budget)
    if hasattr(routing.config, "capacity"):
        routing.config = recipe.config(**overrides, capacity=keep)
    return budget, keep


def keep_of(model: nn.Module, budget: float) -> float:
    """The keep ratio of the routed sites, in (0, 1], for a budget that they can reach."""
    routing = routing_of(model)
    return min(1.0, max(routing.keep_of(check_budget(budget, routing)), 1e-6))


def initialise(model: nn.Module, recipe: Recipe, scores: Mapping[Site, float], budget: float) -> None:
    """Routers with `init: importance`: biases are the standardised log scores, and the threshold keeps the budget's
    share of them. A static route without an order gets that of the scores, and is set to the budget."""
    routing = routing_of(model)
    if isinstance(routing.config, StaticConfig):
        order = routing.config.order or in_order(scores)
        routing.config = replace(routing.config, layers=None, order=order)
        set_budget(model, **{routing.target.name: budget})
    elif recipe.init == "importance":
        routers = routing.routers()
        logs = torch.tensor([max(scores[site], 1e-12) for site in routers]).log()
        biases = (logs - logs.mean()) / logs.std(correction=0).clamp(min=1e-6)
        for router, bias in zip(routers.values(), biases, strict=True):
            if getattr(router, "bias", None) is None:
                raise ConfigError("init: importance needs routers with a bias: set method.bias to true.")
            with torch.no_grad():
                router.bias.copy_(bias)  # type: ignore[operator]  # a parameter, checked above
            router.threshold.fill_(float(torch.quantile(biases, 1 - keep_of(model, budget))))


def fit_tokens(model: nn.Module) -> int:
    """How many tokens a model's skip paths are fitted on: the wider it is, the more features they have."""
    return max(FIT_TOKENS, TOKENS_A_FEATURE * n_features(text_config(unwrapped(model)).hidden_size))


def fit_batches(model: nn.Module, training: Sequence[Example], pad: int) -> Batches:
    """The training examples on which something starts in closed form."""
    return prompts_to_batches(up_to((example.input_ids for example in training), fit_tokens(model)), pad)


def fit(
    model: nn.Module, training: Sequence[Example], pad: int, progress: Callable[[int, int], None] | None
) -> dict[str, float] | None:
    """Skip paths start in closed form, on the training examples. Of each site the share of variance that its path
    explains is returned; None without paths."""
    if not routing_of(model).paths():
        return None
    explained = fit_paths(model, fit_batches(model, training, pad), progress)
    return {str(site): share for site, share in explained.items()}


def start_by_token(
    model: nn.Module,
    recipe: Recipe,
    training: Sequence[Example],
    pad: int,
    budget: float,
    progress: Callable[[int, int], None] | None,
) -> None:
    """With `init: importance`, routers of tokens start in closed form behind the skip paths, set to the budget."""
    routing = routing_of(model)
    if recipe.init == "importance" and not routing.granularity.sticky and not routing.is_static:
        batches = fit_batches(model, training, pad)
        fit_token_routers(model, batches, progress)
        pin_threshold(model, batches[-PINNED:], keep_of(model, budget))


def shares_of(recipe: Recipe, keep: float) -> list[float]:
    """The keep ratios that a run calibrates, where it is for `keep` and has routers; none by some recipes."""
    return sorted({*KEEPS, round(keep, 4)}) if recipe.calibrate else []


def held_out(recipe: Recipe, n_examples: int, shares: int) -> int:
    """How many examples are held out: the recipe's share, or as many more as it takes to calibrate `shares`; one is
    left to tune on."""
    needed = units_needed(shares) if shares else 1
    return min(max(1, round(recipe.holdout * n_examples), needed), n_examples - 1)


def data_digest(examples: Sequence[Example]) -> str:
    """Of what is tuned on and held out: a checkpoint of other data is not gone on from."""
    return hashlib.sha256(json.dumps([(e.input_ids, e.prompt_length) for e in examples]).encode()).hexdigest()[:16]
