"""MindSkip: attention (or MLP, or block) with dynamic depth, its routers tuned alone (Router-Tuning, arXiv 2410.13184).

Router: one linear map of the routed module's own input (at `route` granularity, of the lowest one's), sigmoid, executes
where the score reaches 0.5 (section 3, Eq. 3). Training: straight-through gate; L = L_task + penalty * ReLU(mean gate -
capacity) (section 3.3, Eq. 9 and 10). The mean is taken per sequence and the ReLU before averaging sequences, so that
gradient accumulation does not change the trajectory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynadepth.errors import ConfigError
from dynadepth.methods.config import DepthConfig
from dynadepth.routing.decision import RoutingDecision, RoutingTrace, Site
from dynadepth.routing.router import AbstractRouter


@dataclass(frozen=True)
class MindSkipConfig(DepthConfig):
    """Defaults are the paper's: no bias, zero initialisation (training starts dense), the 16 deepest layers but the
    last."""

    name = "mindskip"

    capacity: float = 0.5
    """Share of the routed units that may execute before the penalty acts, in (0, 1]."""
    penalty: float = 0.01
    """Weight of the capacity loss (lambda; the paper's grid is 0, 0.001, 0.01, 0.1)."""
    bias: bool = False
    """Gives the router a bias, so that a site can be kept or skipped for every input alike."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.capacity, float | int) or not 0 < self.capacity <= 1:
            raise ConfigError(f"capacity must be above 0 and at most 1, not {self.capacity!r}.")
        if not isinstance(self.penalty, float | int) or not 0 <= self.penalty < math.inf:
            raise ConfigError(f"penalty must be a number, zero or more, not {self.penalty!r}.")

    def default_layers(self, n_layers: int) -> tuple[int, ...]:
        """The deepest 16 but the last; in shallower models, the deeper half but the last (released code, 32 layers)."""
        count = min(16, max(1, n_layers // 2))
        return tuple(range(n_layers - 1 - count, n_layers - 1)) if n_layers > 1 else (0,)

    def build_router(self, site: Site, hidden_size: int) -> LinearRouter:
        return LinearRouter(hidden_size, self.bias)

    def depth_loss(self, trace: RoutingTrace, weights: Tensor) -> Tensor | None:
        mean = trace.mean_gate()
        if mean is None:
            return None
        return self.penalty * (torch.relu(mean - self.capacity) * weights).sum()


class LinearRouter(AbstractRouter):
    """One weight vector `[D]`, float32, zero at first; with `bias`, also one number."""

    def __init__(self, hidden_size: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros((), dtype=torch.float32)) if bias else None

    def forward(self, hidden: Tensor) -> Tensor:
        # A vector a sequence: by the kernels that pooled it, which are warm in a prefill that waits for the answer.
        logits = (hidden * self.weight).sum(-1) if hidden.dim() == 2 else hidden @ self.weight
        return logits if self.bias is None else logits + self.bias

    @staticmethod
    def decide_each(routers: Sequence[AbstractRouter], hidden: Tensor) -> list[RoutingDecision]:
        own = [router for router in routers if isinstance(router, LinearRouter)]
        logits = (hidden * torch.stack([router.weight for router in own]).unsqueeze(1)).sum(-1)  # [S, B]
        if own[0].bias is not None:
            logits = logits + torch.stack([router.bias for router in own if router.bias is not None]).unsqueeze(1)
        execute = logits >= torch.stack([router.threshold for router in own]).unsqueeze(1)
        return [RoutingDecision(*parts) for parts in zip(execute.unbind(), logits.unbind(), strict=True)]
