"""Holds the hard keep ratio while routers are tuned, or static routes whose skip paths are."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from dynadepth.dial import set_budget
from dynadepth.routed import routing_of
from dynadepth.routing.context import current

N = TypeVar("N")


def drawn(choices: Sequence[N], seed: int, step: int) -> N:
    """The one of a step, which hangs on `seed` and its number."""
    return random.Random(f"{seed} {step}").choice(choices)


class RouteController(TrainerCallback):
    """Sets a static route to one of several budgets at every step; nothing is remembered, as below."""

    def __init__(self, model: nn.Module, budgets: Sequence[float], seed: int) -> None:
        self.model, self.budgets, self.seed = model, list(budgets), seed

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        budget = drawn(self.budgets, self.seed, state.global_step)
        set_budget(self.model, **{routing_of(self.model).target.name: budget})


class QuantileController(TrainerCallback):
    """Pins the hard keep ratio: after every step the common threshold is the quantile of what the routers answer now.

    Executing more always lowers the loss, so the logits drift upwards together. The threshold is therefore computed
    from the *new* parameters on the step's inputs, not from its logits, which lag one step behind; nothing else is
    remembered, so that a resumed run goes on exactly.
    """

    UNITS = 512
    """Inputs kept per site and step."""

    def __init__(self, model: nn.Module, keeps: Sequence[float], seed: int) -> None:
        """`keeps`: keep ratios of the routed sites, of which every step has one."""
        self.routers, self.keeps, self.seed = list(routing_of(model).routers().values()), list(keeps), seed
        self.inputs: dict[nn.Module, list[Tensor]] = {router: [] for router in self.routers}
        self.hooks = [router.register_forward_pre_hook(self._keep_input) for router in self.routers]

    def _keep_input(self, router: nn.Module, args: tuple[Tensor, ...]) -> None:
        if router.training:
            units, context = args[0].detach(), current()
            if units.dim() == 3 and context is not None and context.token_mask is not None:
                units = units[context.token_mask]  # padding decides nothing
            units = units.flatten(0, -2)
            self.inputs[router].append(units[:: max(1, len(units) // self.UNITS)])

    def keep_at(self, step: int) -> float:
        """The keep ratio of a step."""
        return drawn(self.keeps, self.seed, step)

    @torch.no_grad()
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0 and len(self.keeps) > 1:
            weights = [getattr(router, "weight", None) for router in self.routers]
            if any(weight is not None and bool(weight.any()) for weight in weights):
                return  # they look at their inputs already: the first step keeps the threshold it was given
            biases = [getattr(router, "bias", None) for router in self.routers]
            known = torch.stack([torch.zeros(()) if bias is None else bias.detach().cpu() for bias in biases])
            self._set(known, 0)

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logits = torch.cat([router(torch.cat(self.inputs[router])) for router in self.routers])
        self._set(logits, state.global_step)
        for router in self.routers:
            self.inputs[router].clear()

    def _set(self, logits: Tensor, step: int) -> None:
        goal = torch.quantile(logits, 1 - self.keep_at(step))
        for router in self.routers:
            router.threshold.copy_(goal)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for hook in self.hooks:
            hook.remove()
