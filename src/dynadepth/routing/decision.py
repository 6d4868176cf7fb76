"""Decisions as values: where (`Site`), what was decided (`RoutingDecision`), and all of it for one forward
(`RoutingTrace`).

Shape suffixes: B sequences of a batch, T tokens of this forward. A *unit* is what one decision is about: a sequence
(decisions `[B]`), a token (`[B, T]`) or an assignment of a token to an expert (`[B, T, k]`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, order=True)
class Site:
    """One routed sublayer: the decoder layer's index and the target routed in it. `str(site)` is `"3.attention"`."""

    layer: int
    target: str

    def __str__(self) -> str:
        return f"{self.layer}.{self.target}"

    @staticmethod
    def parse(text: str) -> Site:
        """The inverse of `str(site)`."""
        layer, _, target = text.partition(".")
        return Site(int(layer), target)


class _StraightThrough(torch.autograd.Function):
    """Forward: the hard decision. Backward: the identity on the score (arXiv 2410.13184, section 4.2)."""

    @staticmethod
    def forward(ctx: Any, score: Tensor, execute: Tensor) -> Tensor:
        return execute.to(score.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def straight_through(score: Tensor, execute: Tensor) -> Tensor:
    """A gate of exactly 0 or 1 whose gradient is that of `score` (any shape, floating point)."""
    return _StraightThrough.apply(score, execute)


@dataclass(frozen=True)
class RoutingDecision:
    """What one router decided for the units of one forward.

    `execute`: bool, `[B]` or `[B, T]`. `logits`: float32 of the same shape, None where nothing was computed (an
    injected or sticky decision). `gate`: float32, exactly 0 or 1 with a gradient to the logits; only while training.
    `repeat`: bool `[B]`, which of those that execute do so twice; None where none can.
    `weight`: float32 of the same shape, with gradient: the factor of what executing units contribute; None: 1.
    Where tokens of a sequence compete (see `expert_choice`), `top` says which of them win, and `causal` which ones
    the logits alone would let execute, as in generation; None elsewhere.
    """

    execute: Tensor
    logits: Tensor | None = None
    gate: Tensor | None = None
    weight: Tensor | None = None
    top: Tensor | None = None
    causal: Tensor | None = None
    repeat: Tensor | None = None

    @staticmethod
    def of(times: Tensor) -> RoutingDecision:
        """A given decision: bool, or whole numbers that say how often each unit executes (0, 1, 2)."""
        if times.dtype == torch.bool:
            return RoutingDecision(times)
        return RoutingDecision(times > 0, repeat=times > 1)

    @property
    def times(self) -> Tensor:
        """How often each unit executes: bool where none can repeat, else int64 of 0, 1 and 2."""
        return self.execute if self.repeat is None else self.execute.long() + self.repeat


@dataclass(frozen=True)
class Assignments:
    """Which experts one gate gave to N tokens in one forward, k each, of C: `experts` that compute, and behind them
    no-ops. Tokens routed around the layer are not among them."""

    logits: Tensor
    """float32 `[N, experts]`: the gate's own."""
    probabilities: Tensor
    """float32 `[N, C]`, with gradient."""
    index: Tensor
    """int64 `[N, k]`: the chosen ones, below C."""
    experts: int
    normalised: bool
    """Do the weights of a token's experts sum to one?"""
    real: Tensor | None = None
    """bool `[N]`: what is no padding; None: everything."""

    def chosen(self, probabilities: Tensor, index: Tensor) -> Assignments:
        """With another choice, among more."""
        return replace(self, probabilities=probabilities, index=index)

    def counts(self) -> Tensor:
        """Real tokens' assignments to each, float32 `[C]`."""
        weights = torch.ones_like(self.index, dtype=torch.float32)
        if self.real is not None:
            weights = weights * self.real.unsqueeze(1)
        counts = weights.new_zeros(self.probabilities.shape[1])
        return counts.index_add(0, self.index.flatten(), weights.flatten())

    def balance(self) -> Tensor:
        """C · Σ share of the assignments × mean probability: float32 scalar, 1 where all are alike, at most C (arXiv
        2101.03961, Eq. 4 to 6)."""
        counts = self.counts()
        real = torch.ones_like(self.index[:, 0]) if self.real is None else self.real
        probability = (self.probabilities * real.unsqueeze(1)).sum(0) / real.sum().clamp(min=1)
        return len(counts) * (counts / counts.sum().clamp(min=1) * probability).sum()


@dataclass(frozen=True)
class KeepRatio:
    """Executed (unit, site) pairs over all pairs: of the routed sites, and of all sublayers of the target in the
    model. A pair that executes twice counts once."""

    routed: float
    all: float


@dataclass
class RoutingTrace:
    """The decisions of one forward.

    `decisions` holds what the routers computed; `routes` how often each row executes (sequence granularity, host side:
    bools, or 0, 1 and 2); `token_mask` bool `[B, T]` marks real tokens (None: all are). `fresh` marks rows whose route
    was decided in this forward. `prefill` is False where only sticky or single-token continuation decisions were used.
    """

    n_layers: int
    batch: int
    tokens: int
    token_mask: Tensor | None = None
    prefill: bool = True
    decisions: dict[Site, RoutingDecision] = field(default_factory=dict)
    assignments: dict[int, Assignments] = field(default_factory=dict)
    """By layer, where a method watches the gates of mixtures of experts."""
    routes: dict[Site, list[int]] = field(default_factory=dict)
    fresh: list[bool] | None = None

    def record(self, site: Site, decision: RoutingDecision) -> None:
        """Keeps the first decision of a site: gradient checkpointing replays layers, and a replay is not a new
        decision."""
        self.decisions.setdefault(site, decision)

    def assign(self, layer: int, assignments: Assignments) -> None:
        """Keeps the first assignments of a layer, as `record` does."""
        self.assignments.setdefault(layer, assignments)

    @property
    def logits(self) -> dict[Site, Tensor]:
        """Router logits per site, float32 `[B]` or `[B, T]`."""
        return {site: d.logits for site, d in self.decisions.items() if d.logits is not None}

    def mean_gate(self) -> Tensor | None:
        """Mean gate of each sequence over its units and the routed sites, float32 `[B]`, with gradient; None without
        gates.

        Padding is excluded and every sequence counts the same, whatever its length.
        """
        per_site = []
        for decision in self.decisions.values():
            gate = decision.gate
            if gate is None:
                continue
            if gate.dim() == 2:
                mask = torch.ones_like(gate) if self.token_mask is None else self.token_mask.to(gate.dtype)
                gate = (gate * mask).sum(1) / mask.sum(1).clamp(min=1)
            per_site.append(gate)
        return torch.stack(per_site).mean(0) if per_site else None
