"""Random routes: each input draws which sublayers it runs. The floor that routing by content has to clear.

The draw is a function of what the router sees, so that an input keeps its route in any batch: a random projection of
the pooled state, normalised, sets the phase of a fast triangle wave. Its value is spread evenly over [0, 1] between
inputs, which makes `1 - keep` the threshold that the share `keep` of them reaches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynadepth.errors import ConfigError
from dynadepth.methods.config import DepthConfig
from dynadepth.routing.decision import Site
from dynadepth.routing.router import AbstractRouter

PERIODS = 16.0
"""Standard deviations of the projection are this many periods long: far beyond float noise, far below resolution."""


@dataclass(frozen=True)
class RandomConfig(DepthConfig):
    """Each routed sublayer executes for a random share `keep` of the inputs (or tokens), drawn per site."""

    name = "random"

    keep: float = 0.5
    """Share of the units that execute, in (0, 1]."""
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.keep, float | int) or not 0 < self.keep <= 1:
            raise ConfigError(f"keep must be above 0 and at most 1, not {self.keep!r}.")

    def build_router(self, site: Site, hidden_size: int) -> AbstractRouter:
        return WaveRouter(hidden_size, 1.0 - self.keep, seed=1000 * self.seed + site.layer)


class WaveRouter(AbstractRouter):
    """Nothing to train: a fixed random direction `[D]` and a phase, float32, both drawn from `seed`."""

    probabilistic = False
    direction: Tensor
    phase: Tensor

    def __init__(self, hidden_size: int, threshold: float, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("direction", torch.randn(hidden_size, generator=generator, dtype=torch.float32))
        self.register_buffer("phase", torch.rand((), generator=generator, dtype=torch.float32))
        self.threshold.fill_(threshold)

    def forward(self, hidden: Tensor) -> Tensor:
        unit = hidden / hidden.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        turns = PERIODS * (unit @ self.direction) + self.phase
        return (2 * (turns - turns.floor()) - 1).abs()
