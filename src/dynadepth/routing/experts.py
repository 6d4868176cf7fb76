"""Mixtures of experts: which experts tokens are assigned to, and experts that do nothing among them.

The experts of a layer are one module, `experts(hidden, index, weights)`, called with what the gate beside it chose.
`expert` is the target that routes it, `assignment` its granularity: no-op experts compete with the experts in the
gate's softmax (integrated Mixture-of-Depths-and-Experts, arXiv 2404.02258), and an assignment to one of
them is not computed. Each token decides for itself, so that training and generation are one path.

Gates are watched, too, where a method balances its experts: what they assigned is `RoutingTrace.assignments`.

Shape suffixes: N = B · T tokens, k experts a token, E experts, C experts and no-ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynadepth.errors import UnsupportedModelError
from dynadepth.routing.call import SublayerCall
from dynadepth.routing.context import ForwardContext, Injection, current
from dynadepth.routing.decision import Assignments, RoutingDecision
from dynadepth.routing.granularity import Granularity, refuse_reentrant
from dynadepth.routing.router import AbstractRouter
from dynadepth.routing.sublayer import SublayerState
from dynadepth.routing.target import Target

GATES = ("gate", "router")
"""Names of the module beside the experts that chooses among them."""


def gate_of(mlp: nn.Module) -> nn.Module | None:
    """The gate of a mixture of experts, None for another MLP."""
    has_experts = isinstance(getattr(mlp, "experts", None), nn.Module)
    found = (getattr(mlp, name, None) for name in GATES)
    return next((gate for gate in found if isinstance(gate, nn.Module)), None) if has_experts else None


class ExpertTarget(Target):
    """The experts of a mixture, behind its gate; skipped assignments contribute nothing."""

    name = "expert"
    general = False
    keeps_kv = False
    runs_mlp = False

    def module(self, layer: nn.Module, spec: Any) -> nn.Module:
        mlp = getattr(layer, spec.mlp)
        if gate_of(mlp) is None:
            raise UnsupportedModelError(
                f"{type(layer).__name__} has no mixture of experts: its {type(mlp).__name__} has no gate beside a "
                "module of experts. Name layers that have one, or use method 'mod'."
            )
        return mlp.experts


class PerAssignment(Granularity):
    """One decision an assignment of a token to an expert: a decision is bool `[B, T, k]`, an injected one `[B, T]`."""

    name = "assignment"
    general = False
    sticky = False

    def masked(self, state: SublayerState, call: SublayerCall, context: ForwardContext) -> Any:
        return self._assign(state, call, context)

    def sparse(self, state: SublayerState, call: SublayerCall, context: ForwardContext) -> Any:
        return self._assign(state, call, context)

    def pool(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        return hidden.float()

    def expand(self, value: Injection, hidden: Tensor) -> Tensor:
        tensor = torch.as_tensor(value, dtype=torch.bool, device=hidden.device)
        return tensor.flatten() if tensor.dim() else tensor.expand(len(hidden))

    def _assign(self, state: SublayerState, call: SublayerCall, context: ForwardContext) -> Tensor:
        hidden, index, weights = call.args
        layer, trace = state.site.layer, context.trace
        gate = context.gates[layer]
        known = state.known(context)
        if known is None:
            refuse_reentrant(context)
            gate, index, weights = self._with_no_ops(state, gate, hidden, weights.dtype, context)
            executes = index < gate.experts
        else:
            executes = self.expand(known, hidden)[:, None].expand_as(index)
        shape = (trace.batch, trace.tokens, index.shape[1])
        trace.record(state.site, RoutingDecision(executes.view(shape)))
        trace.assign(layer, gate)
        return call() if known is True else run_assignments(call, executes, index, weights)

    def _with_no_ops(
        self, state: SublayerState, gate: Assignments, hidden: Tensor, dtype: torch.dtype, context: ForwardContext
    ) -> tuple[Assignments, Tensor, Tensor]:
        """The gate's choice anew, `[N, k]`, among C: the experts and, behind them, the no-ops."""
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            offers = state.router(self.pool(hidden, context))  # [N, C - E]
            probabilities = torch.softmax(torch.cat([gate.logits, offers], dim=-1), dim=-1)
            weights, index = probabilities.topk(gate.index.shape[1], dim=-1)
            if gate.normalised:
                weights = weights / weights.sum(-1, keepdim=True)
        return gate.chosen(probabilities, index), index, weights.to(dtype)


def run_assignments(call: SublayerCall, executes: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The experts' output `[N, D]` for the assignments `executes` (bool `[N, k]`) alone: each is a token of its own, so
    that any implementation of the experts computes those and no others."""
    hidden = call.args[0]
    token, place = executes.nonzero(as_tuple=True)
    output = torch.zeros_like(hidden)
    if not len(token):
        return output
    part = (hidden[token], index[token, place].unsqueeze(1), weights[token, place].unsqueeze(1))
    return output.index_add(0, token, SublayerCall(call.forward, part, call.kwargs)().to(output.dtype))


class NoOpRouter(AbstractRouter):
    """A gate's rows for no-op experts: float32 `[..., D]` to one logit each, `[..., count]`."""

    def __init__(self, hidden_size: int, count: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(std * torch.randn(count, hidden_size, dtype=torch.float32))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ self.weight.T


@dataclass
class GateState:
    """What a watched gate knows of itself. `normalised`: do its weights sum to one over the chosen experts?"""

    owner: Any
    layer: int
    routed: bool
    """Are this layer's experts a site, which then says what is assigned?"""
    normalised: bool


class WatchedGate:
    """Mixin put before a gate's class: tells the forward in progress what it chose, and returns what the base does."""

    depth_state: GateState

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        context, state = current(), self.depth_state
        result = super().forward(*args, **kwargs)  # type: ignore[misc]  # mixed into a module's class
        if context is None or context.owner is not state.owner:
            return result
        logits, _, index = result
        logits = logits.float()
        real = context.running.pop(state.layer, context.token_mask)
        found = Assignments(
            logits,
            torch.softmax(logits, dim=-1),
            index,
            logits.shape[-1],
            state.normalised,
            None if real is None else real.flatten(),
        )
        context.gates[state.layer] = found
        if not state.routed:
            context.trace.assign(state.layer, found)
        return result


def inspect_gate(gate: nn.Module, output: Any) -> bool:
    """Are the weights normalised over the chosen experts? From what a gate returned in the bare run; refused where it
    is not the softmax of logits `[N, E]`, its k largest `[N, k]` and their index."""
    shapes = [value.dim() for value in output if isinstance(value, Tensor)] if isinstance(output, Sequence) else []
    if shapes == [2, 2, 2] and len(output) == 3:
        logits, scores, index = output
        probabilities = torch.softmax(logits.float(), dim=-1).gather(-1, index)
        for normalised in (True, False):
            wanted = probabilities / probabilities.sum(-1, keepdim=True) if normalised else probabilities
            if torch.allclose(wanted.to(scores.dtype), scores, atol=8 * torch.finfo(scores.dtype).eps):
                return normalised
    raise UnsupportedModelError(
        f"{type(gate).__name__} does not choose experts by the softmax of one logit each (as Mixtral and OLMoE do), so "
        "no-op experts and balance losses would not mean what they say there."
    )
