"""Mixture-of-Depths (arXiv 2404.02258): blocks that run a fixed share of each sequence's tokens.

A router scores each token with one vector, r = w·x. In training the k tokens of the highest scores in each row go
through the block, x + r·f(x), and the others pass it by; these are absent as keys and values of that block (Eq. 1).
The score multiplies the output, so that the router is on the gradient's path.

The best k of a sequence are not known while it is being generated. Both remedies of the paper are here:
`sampling="aux_loss"` trains the scores themselves to lie above 0 where a token is among the best, `"predictor"` trains
a small network beside the router, from which no gradient reaches the model. Either loss is the binary cross-entropy.

Where we depart from the paper, and why: the router reads the stream at a root mean square of 1 (`unit_input`), so that
scores start at the size of 1 whatever the model's initialisation; and the predictor knows the router's score, from
which the best k are a threshold that varies little.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynadepth.errors import ConfigError, did_you_mean
from dynadepth.methods.config import DepthConfig
from dynadepth.routing.decision import RoutingTrace, Site
from dynadepth.routing.expert_choice import ChoosingRouter

ROUTINGS = ("top_k", "threshold", "stochastic")
SAMPLINGS = ("predictor", "aux_loss")
WEIGHTINGS = ("linear", "sigmoid")
MOST = 0.999
"""The highest share that a predictor starts at: the threshold of 1 is infinitely far."""


@dataclass(frozen=True)
class DepthChoiceConfig(DepthConfig):
    """Settings of the methods that route all but the best k tokens of a sequence around blocks. Defaults are the
    paper's: an eighth of the tokens, every other block, the first one dense, raw linear weights.

    Attach before training: the base model is not frozen. The unit of the capacity is a row of the batch, packed or not
    (the paper's sequences of 2,048 tokens); attention keeps to the documents of a packed row as in the bare model.
    """

    trains_base: ClassVar[bool] = True

    target: str = "block"
    granularity: str = "token"
    kv_policy: str = "drop"
    capacity: float = 0.125
    """Share of a row's tokens that execute in training, in (0, 1]; rounded down to whole tokens."""
    every: int = 2
    """Every how many blocks one is routed, from the second on: 2 is every other block, 1 all but the first."""
    routing: str = "top_k"
    """Which tokens training executes: the best k (`top_k`); those that generation would, for continued training, while
    the auxiliary loss holds the capacity (`threshold`); or the best k of Gaussian noise, the paper's control
    (`stochastic`: no router is learnt, and every forward draws anew)."""
    sampling: str = "predictor"
    """How generation knows the best k: `predictor` or `aux_loss`; of noise it knows the quantile."""
    weighting: str = "linear"
    """What multiplies the block's contribution: the score (`linear`, the paper's) or its sigmoid (`sigmoid`, bounded:
    for models whose stream is large, as pretrained ones)."""
    unit_input: bool = True
    """Scales the router's input to a root mean square of 1; False: the stream itself, as in the paper."""
    aux_weight: float = 0.01
    """Weight of the binary cross-entropy in the model's loss."""
    predictor_width: int = 64
    """Hidden units of the predictor."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, wanted, why in (
            ("target", "block", "it routes tokens around whole blocks"),
            ("granularity", "token", "tokens of one sequence compete"),
            ("kv_policy", "drop", "tokens routed around are absent as keys and values"),
            ("skip_path", "identity", "tokens routed around keep their residual"),
        ):
            if getattr(self, name) != wanted:
                raise ConfigError(
                    f"Method {self.name!r} has {name} {wanted!r} alone ({why}), not {getattr(self, name)!r}."
                )
        for name, known in (("routing", ROUTINGS), ("sampling", SAMPLINGS), ("weighting", WEIGHTINGS)):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(
                    f"{name} must be one of {', '.join(known)}, not {value!r}.{did_you_mean(str(value), known)}"
                )
        if type(self.capacity) not in (float, int) or not 0 < self.capacity <= 1:
            raise ConfigError(f"capacity must be above 0 and at most 1, not {self.capacity!r}.")
        if type(self.aux_weight) not in (float, int) or not 0 < self.aux_weight < float("inf"):
            raise ConfigError(f"aux_weight must be a number above 0, not {self.aux_weight!r}.")
        for name in ("every", "predictor_width"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, not {getattr(self, name)!r}.")
        if self.layers is not None and self.every != 2:
            raise ConfigError(f"every ({self.every}) and layers ({self.layers}) both say which blocks: leave one out.")

    def default_layers(self, n_layers: int) -> tuple[int, ...]:
        """Every `every`-th block from the second on."""
        if n_layers < 2:
            raise ConfigError(
                "The first block stays dense, and this model has no other: name it in layers to route it."
            )
        return tuple(range(1, n_layers, self.every))

    def build_router(self, site: Site, hidden_size: int) -> ChoosingRouter:
        if self.routing == "stochastic":
            return NoiseRouter(self.capacity, self.weighting)
        width = self.predictor_width if self.sampling == "predictor" else 0
        return DepthRouter(
            hidden_size, self.capacity, self.weighting, self.unit_input, width, self.routing == "threshold"
        )

    @abstractmethod
    def depth_loss(self, trace: RoutingTrace, weights: Tensor) -> Tensor | None: ...

    def sampling_loss(self, trace: RoutingTrace, weights: Tensor) -> Tensor | None:
        """The weighted cross-entropy of one forward, float32 scalar."""
        loss = top_loss(trace)
        return None if loss is None else self.aux_weight * (loss * weights).sum()


@dataclass(frozen=True)
class MoDConfig(DepthChoiceConfig):
    """Mixture-of-Depths as in the paper; of a mixture of experts, see `mode-staged`."""

    name = "mod"

    def depth_loss(self, trace: RoutingTrace, weights: Tensor) -> Tensor | None:
        return self.sampling_loss(trace, weights)


def top_loss(trace: RoutingTrace) -> Tensor | None:
    """How well the causal logits tell the best k, float32 `[B]`: the mean over real tokens and sites of the binary
    cross-entropy, in nats; None where nothing learns it."""
    losses = [
        F.binary_cross_entropy_with_logits(d.logits, d.top.float(), reduction="none")
        for d in trace.decisions.values()
        if d.top is not None and d.logits is not None and d.logits.requires_grad
    ]
    return _mean(losses, trace.token_mask)


def agreement(trace: RoutingTrace) -> Tensor | None:
    """Share of the real tokens and sites at which the causal decision is that of the best k, float32 `[B]` (the paper's
    predictor accuracy); None in a forward that did not choose the best k."""
    choices = [(d.top, d.causal) for d in trace.decisions.values()]
    same = [torch.eq(top, causal).float() for top, causal in choices if top is not None and causal is not None]
    return _mean(same, trace.token_mask)


def _mean(parts: list[Tensor], real: Tensor | None) -> Tensor | None:
    """Mean `[B]` over sites and real tokens of values `[B, T]`."""
    if not parts:
        return None
    values = torch.stack(parts).mean(0)
    if real is None:
        return values.mean(1)
    return (values * real).sum(1) / real.sum(1).clamp(min=1)


def _weighing(score: Tensor, weighting: str) -> Tensor:
    return torch.sigmoid(score) if weighting == "sigmoid" else score


class DepthRouter(ChoosingRouter):
    """One weight vector `[D]`, and with `width` a predictor beside it; float32. Scores start with a variance of 1."""

    def __init__(
        self, hidden_size: int, capacity: float, weighting: str, unit_input: bool, width: int, by_threshold: bool
    ) -> None:
        super().__init__(capacity, by_threshold)
        self.weighting, self.unit_input = weighting, unit_input
        self.weight = nn.Parameter(torch.randn(hidden_size, dtype=torch.float32) / hidden_size**0.5)
        self.predictor = TopPredictor(hidden_size, width, capacity) if width else None

    def score(self, hidden: Tensor) -> Tensor:
        return self._scaled(hidden) @ self.weight

    def causal(self, hidden: Tensor, score: Tensor) -> Tensor:
        return score if self.predictor is None else self.predictor(self._scaled(hidden.detach()), score.detach())

    def weigh(self, score: Tensor) -> Tensor:
        return _weighing(score, self.weighting)

    def _scaled(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, hidden.shape[-1:], eps=1e-6) if self.unit_input else hidden


class TopPredictor(nn.Module):
    """Whether a token will be among the best k: gain·score + write·silu(read·x) + bias.

    It starts as the threshold on the score that a share `capacity` of normally distributed scores reaches. Its inputs
    have no gradient.
    """

    def __init__(self, hidden_size: int, width: int, capacity: float) -> None:
        super().__init__()
        self.read = nn.Parameter(torch.randn(hidden_size, width, dtype=torch.float32) / hidden_size**0.5)
        self.write = nn.Parameter(torch.zeros(width, dtype=torch.float32))
        self.gain = nn.Parameter(torch.ones((), dtype=torch.float32))
        self.bias = nn.Parameter(torch.full((), -_quantile(min(capacity, MOST)), dtype=torch.float32))

    def forward(self, hidden: Tensor, score: Tensor) -> Tensor:
        return self.gain * score + F.silu(hidden @ self.read) @ self.write + self.bias


class NoiseRouter(ChoosingRouter):
    """Scores are standard normal noise, whatever the token; nothing to train."""

    probabilistic = False

    def __init__(self, capacity: float, weighting: str) -> None:
        super().__init__(capacity, by_threshold=False)
        self.weighting = weighting
        self.threshold.fill_(_quantile(capacity))

    def score(self, hidden: Tensor) -> Tensor:
        return torch.randn(hidden.shape[:-1], device=hidden.device)

    def causal(self, hidden: Tensor, score: Tensor) -> Tensor:
        return score

    def weigh(self, score: Tensor) -> Tensor:
        return _weighing(score, self.weighting)


def _quantile(capacity: float) -> float:
    """What a standard normal variable exceeds with this probability."""
    return float("-inf") if capacity >= 1 else NormalDist().inv_cdf(1 - capacity)
