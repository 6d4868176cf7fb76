"""Mixture-of-Depths-and-Experts (arXiv 2404.02258) for models with mixtures of experts, trained with them.

Staged: tokens are routed around whole blocks, before the attention, as in Mixture-of-Depths; those that stay meet the
experts. Integrated: no-op experts stand among the experts, so that a token may be sent to nothing; the attention always
runs. Each token chooses its experts for itself, as the host models do, so that integrated routing is causal by nature
and needs neither capacity nor predictor: how much runs follows from the balance loss, which wants all experts, no-ops
included, used alike. The paper finds integrated better than staged.

The host model's own balance loss (`output_router_logits=True`) knows nothing of either; `balance` stands in for it.
`recording()` tells the load of each expert and the share of no-ops: `record.expert_load`, `record.no_op_share`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dynadepth.errors import ConfigError
from dynadepth.methods.config import DepthConfig
from dynadepth.methods.mod import DepthChoiceConfig
from dynadepth.routing.decision import RoutingTrace, Site
from dynadepth.routing.experts import NoOpRouter

START = 0.02
"""Standard deviation of a no-op's row of the gate at first, as of the other rows in Mixtral and OLMoE."""


def check_balance(value: object) -> None:
    """Raises ConfigError unless a balance weight is a number, zero or more."""
    if type(value) not in (float, int) or not 0 <= value < float("inf"):  # type: ignore[operator]  # a number here
        raise ConfigError(f"balance must be a number, zero or more, not {value!r}.")


def balance_loss(trace: RoutingTrace) -> Tensor | None:
    """Mean over the mixtures of C · Σ share of assignments × mean probability (1 where all are used alike), float32
    scalar; None without a mixture. Padding and tokens routed around are left out."""
    losses = [assignments.balance() for assignments in trace.assignments.values()]
    return torch.stack(losses).mean() if losses else None


def _balanced(trace: RoutingTrace, weights: Tensor, balance: float) -> Tensor:
    """`balance_loss` for the rows' share of the step (`weights` `[B]`, see `DepthConfig.depth_loss`)."""
    loss = balance_loss(trace)
    return weights.new_zeros(()) if loss is None else balance * weights.sum() * loss


@dataclass(frozen=True)
class StagedMoDEConfig(DepthChoiceConfig):
    """Mixture-of-Depths around blocks with experts: its settings, and the balance of all mixtures of the model."""

    name = "mode-staged"
    watches_experts: ClassVar[bool] = True

    balance: float = 0.01
    """Weight of the balance loss (Switch Transformers' 0.01, arXiv 2101.03961)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_balance(self.balance)

    def depth_loss(self, trace: RoutingTrace, weights: Tensor) -> Tensor | None:
        sampling, balance = self.sampling_loss(trace, weights), _balanced(trace, weights, self.balance)
        return balance if sampling is None else sampling + balance


@dataclass(frozen=True)
class IntegratedMoDEConfig(DepthConfig):
    """No-op experts in every mixture, or those of `layers`. Of E experts and n no-ops, used alike, n / (E + n) of the
    assignments are not computed."""

    name = "mode-integrated"
    trains_base: ClassVar[bool] = True
    watches_experts: ClassVar[bool] = True
    has_thresholds: ClassVar[bool] = False

    target: str = "expert"
    granularity: str = "assignment"
    no_ops: int = 8
    """No-op experts a mixture. A token may have several of them among its k, each taking its weight."""
    balance: float = 0.01
    """Weight of the balance loss, over experts and no-ops (Switch Transformers' 0.01, arXiv 2101.03961)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, wanted, why in (
            ("target", "expert", "no-ops stand among the experts"),
            ("granularity", "assignment", "each of a token's experts may be a no-op"),
            ("skip_path", "identity", "no-ops contribute nothing"),
        ):
            if getattr(self, name) != wanted:
                raise ConfigError(
                    f"Method {self.name!r} has {name} {wanted!r} alone ({why}), not {getattr(self, name)!r}."
                )
        check_balance(self.balance)
        if type(self.no_ops) is not int or self.no_ops < 1:
            raise ConfigError(f"no_ops must be a whole number of at least 1, not {self.no_ops!r}.")

    def build_router(self, site: Site, hidden_size: int) -> NoOpRouter:
        return NoOpRouter(hidden_size, self.no_ops, START)

    def depth_loss(self, trace: RoutingTrace, weights: Tensor) -> Tensor | None:
        return _balanced(trace, weights, self.balance)
