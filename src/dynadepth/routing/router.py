"""The router's contract: float32 hidden states in, one logit a unit out, execute where it reaches the threshold."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynadepth.routing.decision import RoutingDecision, straight_through


class AbstractRouter(nn.Module, ABC):
    """Maps units' hidden states to logits. Parameters and arithmetic stay float32, whatever the model's dtype becomes.

    `threshold` (float32 scalar, logit space, saved with the parameters) is what a budget moves; 0 is sigmoid 0.5.
    `constant` is the decision of a router that never looks at its input, known without running it (2: executes twice);
    None otherwise. `windows`: into how many vectors a prompt is pooled for it (`windows.pool_windows`). `repeats`: it
    has logits of three actions (skip, execute, repeat), and for thresholds the better of the latter two less the first;
    minus infinity, the budget of 1, repeats nothing. `probabilistic`: sigmoid(logit) is a probability of executing.
    `weighs`: what executes has a weight that the router gives (`judge`), so that it is always asked. `asked` is False
    while a budget of 1 lets everything execute, which inference knows without running it.
    """

    threshold: Tensor
    constant: int | None = None
    windows: int = 1
    repeats: bool = False
    probabilistic: bool = True
    asked: bool = True
    weighs: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32))

    @abstractmethod
    def forward(self, hidden: Tensor) -> Tensor:
        """Float32 `[..., D]` (with `windows`, `[..., W, D]`) to float32 logits `[...]` (with `repeats`, `[..., 3]`)."""

    def judge(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """The logits, and the factor of what executing units contribute (None: 1), both float32 `[...]`."""
        return self(hidden), None

    def gate(self, logits: Tensor, execute: Tensor) -> Tensor:
        """The training-time gate of the decisions: hard 0 or 1, with the gradient of sigmoid(logit - threshold)."""
        return straight_through(torch.sigmoid(logits - self.threshold), execute)

    def decide(self, hidden: Tensor, with_gate: bool) -> RoutingDecision:
        """Decides for units of float32 hidden states `[..., D]`; `with_gate` adds the differentiable gate. Not under
        autocast, which the caller turns off."""
        logits, weight = self.judge(hidden)
        repeat = None
        if self.repeats:
            skip, once, twice = logits.unbind(-1)
            logits, repeat = torch.maximum(once, twice) - skip, (twice > once) & (self.threshold > float("-inf"))
        execute = logits >= self.threshold
        gate = self.gate(logits, execute) if with_gate else None
        return RoutingDecision(execute, logits, gate, weight, repeat=None if repeat is None else execute & repeat)

    @staticmethod
    def decide_each(routers: Sequence[AbstractRouter], hidden: Tensor) -> list[RoutingDecision]:
        """What each of these routers, all of this class, decides for the same states; without gates. A class whose
        routers can be asked in one product overrides it."""
        return [router.decide(hidden, with_gate=False) for router in routers]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Follow the model to its device, but never to its dtype.
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


class ConstantRouter(AbstractRouter):
    """Always the same decision, without parameters: the router of static routes."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.constant = times

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.new_full(hidden.shape[:-1], float("inf") if self.constant else float("-inf"))
