"""The dials of an attached model: a budget, or a control, moves its routers' thresholds or a static route's length."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real

import torch
from torch import nn

from dynadepth.architectures import text_config
from dynadepth.errors import BudgetError
from dynadepth.routed import Routing, routing_of, unwrapped
from dynadepth.routing.calibration import Calibration
from dynadepth.routing.router import AbstractRouter


def set_budget(model: nn.Module, **budgets: float) -> None:
    """Lets the share `attention=0.75` of *all* sublayers of the target execute: by moving the routers' thresholds, or,
    of a static route with an order, by skipping the first sublayers of that order, the nearest whole number of them.

    1.0 executes everything. Raises BudgetError for a share outside (0, 1], one below what the routed sites can reach,
    routers without calibration (`dynadepth.budget.calibrate`), or a static route without an order.
    """
    routing = routing_of(model)
    name = routing.target.name
    if set(budgets) != {name}:
        raise BudgetError(
            f"This model's routed target is {name!r}: set_budget(model, {name}=...), not {sorted(budgets)}."
        )
    budget = check_budget(budgets[name], routing)
    check_adjustable(routing)
    route = routing.config.at_budget(budget, routing.n_layers)
    if route is not None:
        routing.follow(route, text_config(unwrapped(model)).hidden_size)
    else:
        keep = routing.keep_of(budget)
        threshold = float("-inf") if keep >= 1 else calibration_of(routing, f"budget {budget}").threshold(keep)
        set_threshold(routing.routers().values(), threshold)
        for router in routing.routers().values():
            router.asked = keep < 1
    routing.control, routing.budget, routing.speedup = None, budget, None


def set_control(model: nn.Module, control: float) -> None:
    """Trades skipping against executing without calibration: p in [−1, 1], in probabilities.

    A sublayer is skipped where its router's probability of executing is below (1 + p) / 2. 0 is the routers' own
    choice, −1 skips nothing, 1 everything. Of routers that may repeat, the probability is that of the likelier of
    execute and repeat beside that of skip. Budgets move the same threshold: the latest of both counts. Raises
    BudgetError for a value outside, for a static route, which has no probabilities, or for routers without thresholds.
    """
    routing = routing_of(model)
    if not isinstance(control, Real) or not -1 <= control <= 1:
        raise BudgetError(f"control must be a number between -1 and 1, not {control!r}.")
    control = float(control)
    if routing.is_static:
        raise BudgetError(
            f"A {routing.config.name} route has no probabilities that a control could shift: set a budget instead."
        )
    check_adjustable(routing)
    if not all(router.probabilistic for router in routing.routers().values()):
        raise BudgetError(
            f"Routers of method {routing.config.name!r} draw at random and have no probabilities that a control could "
            "shift: calibrate them and set a budget instead."
        )
    # Finite at the ends: minus infinity stands for a budget of 1, which asks no router at all.
    most = torch.finfo(torch.float32).max
    set_threshold(routing.routers().values(), control * most if abs(control) == 1 else 2 * math.atanh(control))
    routing.control, routing.budget, routing.speedup = control, None, None


def check_adjustable(routing: Routing) -> None:
    """Raises BudgetError for routers without thresholds, and for a static route without an order: no budget changes
    them."""
    if not routing.config.has_thresholds:
        raise BudgetError(
            f"What routers of method {routing.config.name!r} execute is learnt, and no threshold changes it: train "
            "with other settings instead of setting a budget."
        )
    if routing.is_static and routing.config.at_budget(1.0, routing.n_layers) is None:
        raise BudgetError(
            f"A {routing.config.name} route is what it is: attach one with another skip instead of setting a budget, "
            "or one with an order, which budgets follow."
        )


def calibration_of(routing: Routing, asked: str) -> Calibration:
    """The routers' calibration; BudgetError where they have none, so that what is `asked` for cannot be set."""
    if routing.calibration is None:
        raise BudgetError(f"These routers have no calibration, so {asked} cannot be set: {_way_out(routing)}.")
    return routing.calibration


def _way_out(routing: Routing) -> str:
    """What can be done about routers without calibration."""
    name, config = routing.config.name, routing.config
    if config.from_routes:
        return (
            f"routers of method {name!r} are trained apart, and no threshold fits all; shift their own choice with "
            "--control P, or dynadepth.set_control"
        )
    calibrate = "dynadepth.budget.calibrate(model, batches)"
    if config.trains_base:
        return f"routers of method {name!r} are trained with the model, and get none; call {calibrate}"
    return f"tune them, run `dynadepth calibrate`, or call {calibrate}"


def check_budget(budget: float, routing: Routing) -> float:
    """The budget, if it is in (0, 1] and the routed sites can reach it."""
    if not isinstance(budget, Real) or not 0 < budget <= 1:
        raise BudgetError(f"budget must be a number above 0 and at most 1, not {budget!r}.")
    if budget < routing.lowest_budget() - 1e-9:
        raise BudgetError(
            f"budget {budget} cannot be reached: only {len(routing.sites)} of {routing.n_layers} {routing.target.name} "
            f"sublayers are routed, so at least {routing.lowest_budget():.3f} always executes; route more layers."
        )
    return float(budget)


def set_threshold(routers: Iterable[AbstractRouter], threshold: float) -> None:
    """Sets one threshold (logit space) for all routers."""
    for router in routers:
        router.threshold.fill_(threshold)
        router.asked = True
