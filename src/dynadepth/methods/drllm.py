"""Dr.LLM: each layer is skipped, executed or repeated, chosen per prompt by routers that learn from searched routes
(arXiv 2510.12773).

Router: a bottleneck MLP (Linear, GELU, Linear) on 8 windows of the prompt's hidden states before the layer, the
windows' logits averaged, the likeliest of three actions taken once a prompt. Training: focal loss on the actions of
given routes, class weights by effective numbers, the layers below executed as the route says (`tuning.from_routes`).

Where the paper leaves room: its control p in [−1, 1] is read here as a shift of the choice between skipping and not
skipping (`dynadepth.set_control`); a prompt shorter than 8 tokens has windows of one token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynadepth.errors import ConfigError
from dynadepth.methods.config import DepthConfig
from dynadepth.routing.decision import Site
from dynadepth.routing.repeat import check_can_repeat
from dynadepth.routing.router import AbstractRouter

ACTIONS = ("skip", "execute", "repeat")
"""Classes of the routers, by how often the layer executes."""


@dataclass(frozen=True)
class DrLLMConfig(DepthConfig):
    """Defaults are the paper's: every layer, hidden size 128, 8 windows."""

    name = "drllm"
    from_routes = True

    target: str = "block"
    hidden: int = 128
    """Hidden units of each router (the paper's ablations keep 128)."""
    windows: int = 8
    """Contiguous windows that a prompt is pooled into; the logits of all are averaged. 1: the mean over the prompt."""

    unit_input: bool = False
    """Scales each window to a root mean square of 1. The paper does not: routers of deep layers, whose states are a
    hundred times as long as the first ones', then start from losses of 10 and more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_can_repeat(self.target, self.granularity, self.skip_path)
        for name, value in (("hidden", self.hidden), ("windows", self.windows)):
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}.")

    def build_router(self, site: Site, hidden_size: int) -> DrLLMRouter:
        return DrLLMRouter(hidden_size, self.hidden, self.windows, self.unit_input)


class DrLLMRouter(AbstractRouter):
    """Windows `[B, W, D]` to logits of skip, execute and repeat, `[B, 3]`; float32, Xavier weights, zero biases.

    Routers that never learnt decide at random: tune them from routes.
    """

    repeats = True

    def __init__(self, hidden_size: int, hidden: int, windows: int, unit_input: bool) -> None:
        super().__init__()
        self.windows, self.unit_input = windows, unit_input
        self.inner = _Affine(hidden_size, hidden)
        self.outer = _Affine(hidden, len(ACTIONS))
        for layer in (self.inner, self.outer):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.unit_input:
            hidden = nn.functional.rms_norm(hidden, hidden.shape[-1:], eps=1e-6)
        logits = self.outer(nn.functional.gelu(self.inner(hidden)))
        return logits.mean(-2) if self.windows > 1 else logits


class _Affine(nn.Module):
    """A linear layer that PEFT's `target_modules="all-linear"` does not take for one of the model's."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        plain = nn.Linear(inputs, outputs, dtype=torch.float32)  # so that a seed gives the routers it always gave
        self.weight, self.bias = plain.weight, plain.bias

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.weight, self.bias)


def class_weights(counts: Tensor, beta: float) -> Tensor:
    """Weights of classes by the effective number of their examples, (1 − β) / (1 − βⁿ), scaled to a mean of one over
    the classes that occur; zero for the others (Cui et al., arXiv 1901.05555; Dr.LLM, section 3)."""
    number = counts.double()
    weights = torch.where(number > 0, (1 - beta) / (1 - beta**number).clamp(min=1e-12), 0.0)
    return (weights * (number > 0).sum() / weights.sum()).float()


def focal_loss(actions: Tensor, labels: Tensor, weights: Tensor, gamma: float) -> Tensor:
    """Mean of −w·(1 − p)^γ·log p over examples: `actions` `[..., 3]` logits, `labels` int64 `[...]`, p the probability
    of the label (Lin et al., arXiv 1708.02002, Eq. 5)."""
    log_p = torch.log_softmax(actions, -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    missing = (-log_p.expm1()).clamp(min=1e-6)  # 1 - p; a power below 1 of zero has no finite gradient
    return -(weights[labels] * missing**gamma * log_p).mean()
