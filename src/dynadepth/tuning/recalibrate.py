"""Budgets measured anew on a user's own prompts: routers stay what they are, and every budget gets other thresholds.

A threshold keeps a share of the prompts that it was measured on. Of other prompts it keeps another share, most where
each token decides: web pages have more tokens that want to look back than questions do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import nn

from dynadepth import budget as budgets
from dynadepth.architectures.probe import quietly
from dynadepth.dial import check_adjustable, set_budget
from dynadepth.errors import BudgetError
from dynadepth.routed import routing_of, unwrapped
from dynadepth.routing.recorder import recording
from dynadepth.tuning.data import Example

CHECKED = (0.875, 0.75, 0.625, 0.5)
"""Budgets that are checked, where the routed sites can reach them."""

HELD_BACK = 0.25
"""Share of the prompts that are not calibrated on: what budgets are checked on."""

Progress = Callable[[str, int, int], None]
"""`progress(stage, done, total)`."""


@dataclass(frozen=True)
class Checked:
    """What a budget executes of all sublayers of the target on the prompts held back."""

    budget: float
    before: float | None
    """By the thresholds that were there; None where there were none for it."""
    after: float


@dataclass(frozen=True)
class Recalibration:
    """What it was measured on, and what it is good for."""

    n_calibrated: int
    n_held_back: int
    checked: tuple[Checked, ...]


def recalibrate(
    model: nn.Module, examples: Sequence[Example], pad: int, progress: Progress | None = None
) -> Recalibration:
    """Calibrates the budgets of an attached model on three quarters of `examples` and checks them on the rest.

    Where whole sequences are routed, an example counts by its prompt; plain text is a prompt. `pad`: a token id. The
    budget in force stays, by its new threshold; so does a control. Raises BudgetError where a budget has no threshold
    (static routes, learnt choices, routers tuned from searched routes), or where the examples are too few.
    """
    routing = routing_of(model)
    if routing.is_static:
        raise BudgetError(
            f"A {routing.config.name} route has no thresholds to calibrate: its budgets are whole numbers of "
            "sublayers, the same for every prompt."
        )
    check_adjustable(routing)
    if routing.config.from_routes:
        raise BudgetError(
            f"Routers of method {routing.config.name!r} are trained apart, and no threshold fits all: shift their own "
            "choice with --control P, or dynadepth.set_control."
        )
    sticky = routing.granularity.sticky
    decided = [e.input_ids[: e.prompt_length or None] if sticky else e.input_ids for e in examples]
    held_back = max(1, round(HELD_BACK * len(decided)))
    checks = budgets.prompts_to_batches(decided[:held_back], pad)
    batches = budgets.prompts_to_batches(decided[held_back:], pad)
    in_force, control = routing.budget, routing.control
    reachable = [b for b in CHECKED if b >= routing.lowest_budget()]
    asked = sorted({*reachable, *([] if in_force is None else [in_force])} - {1.0}, reverse=True)
    keeps = sorted({*budgets.KEEPS, *(round(routing.keep_of(b), 4) for b in asked)})
    needed = budgets.units_needed(len(keeps))
    if len(decided) - held_back < needed:
        total = next(n for n in count(needed) if n - max(1, round(HELD_BACK * n)) >= needed)
        raise BudgetError(
            f"{len(decided)} prompts are too few to calibrate {len(keeps)} budgets and check them: give at least "
            f"{total}, and about sixty for budgets that are met within 0.02."
        )

    routers, speedup = list(routing.routers().values()), routing.speedup
    thresholds = [(router.threshold.clone(), router.asked) for router in routers]
    try:
        before = [None if routing.calibration is None else _executed(model, checks, budget) for budget in asked]
        budgets.calibrate(model, batches, keeps, progress and (lambda done, total: progress("calibrate", done, total)))
        checked = []
        for number, (budget, old) in enumerate(zip(asked, before, strict=True), 1):
            checked.append(Checked(budget, old, _executed(model, checks, budget)))
            if progress:
                progress("check", number, len(asked))
    finally:
        for router, (threshold, is_asked) in zip(routers, thresholds, strict=True):
            router.threshold.copy_(threshold)
            router.asked = is_asked
        routing.budget, routing.control, routing.speedup = in_force, control, speedup
    if in_force is not None:
        set_budget(model, **{routing.target.name: in_force})
        routing.speedup = speedup
    return Recalibration(len(decided) - held_back, held_back, tuple(checked))


@torch.no_grad()
def _executed(model: nn.Module, batches: budgets.Batches, budget: float) -> float:
    """The share of all sublayers of the target that executes at a budget."""
    set_budget(model, **{routing_of(model).target.name: budget})
    with quietly(unwrapped(model)), recording() as record:
        for batch in batches:
            budgets.forward(model, batch)
    measured = record.keep_ratio("prefill")
    assert measured is not None
    return measured.all
