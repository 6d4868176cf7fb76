"""Budgets stated as a speed-up: the largest budget at which one `generate()` call is so many times as fast as dense's.

The answer comes from the cost table of this machine (see `machine`), so the same speed-up may be another budget
elsewhere. It is an expectation for prompts like those the routers were calibrated on: at sequence granularity each
prompt takes a route of its own, shorter or longer than the budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from torch import nn

from dynadepth.benchmark.cost_table import CostTable, Workload
from dynadepth.benchmark.machine import cost_table, table_path
from dynadepth.dial import calibration_of, check_adjustable, set_budget
from dynadepth.errors import BudgetError
from dynadepth.lora import LoraSettings
from dynadepth.methods import DepthConfig
from dynadepth.model import add_lora, attach, detach
from dynadepth.routed import Routing, routing_of

Progress = Callable[[str], object]

BUSY = 0.25
"""Spread of the measured times from which on an expectation is called rough."""


@dataclass(frozen=True)
class SpeedUp:
    """A budget that was solved for. `str()` is one line for the user."""

    asked: float
    """Time of the dense call over that of the routed one."""
    budget: float
    """Share of all sublayers of the target; of two decimals, where the routed sites reach so low."""
    expected: float
    """What the table says of that budget."""
    target: str
    workload: Workload
    table: CostTable | None
    """None for 1x, which needs no measuring."""
    file: Path | None = None
    """Where the table is kept."""

    def __str__(self) -> str:
        share = f"{self.asked:g}x asked: budget {self.budget:.2f} of the {self.target}s"
        if self.table is None:
            return f"{share} (dense: nothing is skipped)"
        said = f"{share} (expected {self.expected:.2f}x at {self.workload} on this machine)"
        if self.table.spread <= BUSY:
            return said
        busy = f"the machine was busy when it was measured (spread {self.table.spread:.0%})"
        return f"{said}, roughly: {busy}; delete {self.file} to measure again"

    def to_dict(self) -> dict[str, Any]:
        """For the provenance of results: what was asked, what is expected, and the points measured."""
        table = None if self.table is None else self.table.to_dict()
        return {"asked": f"{self.asked:g}x", "budget": self.budget, "expected": self.expected, "cost_table": table}


def set_speedup(
    model: nn.Module,
    times: float,
    *,
    context: int = Workload.context,
    new_tokens: int = Workload.new_tokens,
    batch: int = Workload.batch,
    progress: Progress | None = None,
) -> SpeedUp:
    """Sets the budget at which `generate()` is `times` as fast as the dense model's, and says which one that is.

    What counts is the time of the forwards of one call: a batch of `batch` prompts of `context` tokens and `new_tokens`
    new ones. The first call for a model, a routing and a workload measures this machine, which takes some of these
    calls (`progress` is told in words); later ones read the table from the cache. 1 is the dense budget. Raises
    BudgetError below 1, for a speed-up that cannot be reached here, and as `set_budget` does.
    """
    routing = routing_of(model)
    workload = Workload(context, new_tokens, batch)
    check_adjustable(routing)
    if check_times(times) > 1 and not routing.is_static:
        calibration_of(routing, f"a speed-up of {times:g}x")
    found = solve_speedup(model, times, workload, progress)
    set_budget(model, **{routing.target.name: found.budget})
    routing.speedup = found.to_dict()
    return found


def speedup_of(
    model: nn.Module,
    config: DepthConfig,
    times: float,
    workload: Workload,
    progress: Progress | None = None,
    lora: LoraSettings | None = None,
) -> SpeedUp:
    """The budget for routers, and a LoRA, that are still to be tuned: `model` has none, and has none afterwards."""
    attach(model, config)
    try:
        if lora is not None:
            add_lora(model, lora)
        return solve_speedup(model, times, workload, progress)
    finally:
        detach(model)


def solve_speedup(model: nn.Module, times: float, workload: Workload, progress: Progress | None = None) -> SpeedUp:
    """The largest budget that reaches a speed-up, not set yet; the routers need no calibration for it."""
    routing = routing_of(model)
    if check_times(times) == 1:
        return SpeedUp(1.0, 1.0, 1.0, routing.target.name, workload, None)
    table = cost_table(model, workload, progress)
    budget = solved_budget(table, routing, times)
    expected = table.speedup(routing.keep_of(budget))
    file = table_path(model, workload)
    return SpeedUp(float(times), budget, expected, routing.target.name, workload, table, file)


def solved_budget(table: CostTable, routing: Routing, times: float) -> float:
    """The largest budget of two decimals at which the table expects `times`. BudgetError where none does.

    One sublayer of the target executes at least: a budget is above 0. That of a static route is the largest whole
    number of sublayers, since it executes the nearest one.
    """
    lowest = max(routing.lowest_budget(), 1 / routing.n_layers)
    keep = table.keep_for(times)
    budget = 0.0 if keep is None else routing.budget_of(keep)
    if routing.is_static:
        budget = math.floor(budget * routing.n_layers + 1e-9) / routing.n_layers
    if budget < lowest - 1e-9:
        target, n_sites = routing.target, len(routing.sites)
        ways = ["ask for less"]
        if n_sites < routing.n_layers:
            ways.append(f"route more than {n_sites} of {routing.n_layers} layers")
        if target.keeps_kv:  # attention's part in the time grows with what it looks back at
            longer = 2 * table.workload.context
            example = f"{times:g}x@{longer}+{table.workload.new_tokens}, in Python context={longer}"
            ways.append(f"state it for a longer context, where more is gained ({example})")
        reached = math.floor(100 * table.speedup(routing.keep_of(lowest))) / 100
        raise BudgetError(
            f"A speed-up of {times:g}x cannot be reached on this machine: the largest at {table.workload} is "
            f"{reached:.2f}x, with {lowest:.2f} of the {target.name}s executing; {', or '.join(ways)}."
        )
    return max(lowest, budget if routing.is_static else math.floor(100 * budget + 1e-9) / 100)


def check_times(times: float) -> float:
    """The speed-up, if it is a number of at least 1."""
    if not isinstance(times, Real) or not 1 <= times < math.inf:
        raise BudgetError(f"A speed-up must be a number of at least 1, such as 1.3, not {times!r}.")
    return float(times)
