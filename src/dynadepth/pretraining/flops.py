"""What training costs, by formula: forward and backward of the tokens that really ran, counted as in `cost`.

A matrix product's backward is two products of its size, one for its input's gradient and one for its weights': three
forwards in all. That holds for every product of the model (the first layer's input has a gradient, too, since
embeddings learn), head and routers included; only a predictor's matrix reads states that no gradient goes back to.
Where tokens compete (Mixture-of-Depths), training runs the winners of each row alone: k queries with k keys. An
assignment to a no-op expert costs nothing.
Rows that run different numbers of tokens (threshold routing) are padded to the longest when they run: that is not
counted, for another kernel would not do it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from dynadepth.cost import SublayerCost, head_flops, sublayer_costs
from dynadepth.routed import is_attached, routing_of
from dynadepth.routing.decision import RoutingTrace, Site

Executed = Mapping[Site, torch.Tensor]
"""Of each row, int64 `[B]`: the tokens that a routed block ran, or the assignments that experts computed."""


class FlopMeter:
    """Counts a model's FLOPs; sizes are read once."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.layers = [_Layer(c["attention"], c["mlp"], c["experts"].weights) for c in sublayer_costs(model)]
        self.per_token = getattr(model.config.get_text_config(decoder=True), "num_experts_per_tok", None) or 1
        self.head = head_flops(model)
        self.router_forward, self.router_training = _router_flops(model)

    def forward(self, rows: int, tokens: int, executed: Executed | None = None) -> int:
        """FLOPs of one forward of `rows` sequences of `tokens` tokens, logits of all of them."""
        return rows * tokens * (self.head + self.router_forward) + self._blocks(rows, tokens, executed or {})

    def dense(self, tokens: int) -> int:
        """FLOPs of one sequence's forward, were every block run for every token and no router asked."""
        return tokens * self.head + self._blocks(1, tokens, {})

    def training(self, rows: int, tokens: int, executed: Executed | None = None) -> int:
        """FLOPs of one forward and backward."""
        own = rows * tokens * (3 * self.head + self.router_training)
        return own + 3 * self._blocks(rows, tokens, executed or {})

    def _blocks(self, rows: int, tokens: int, executed: Executed) -> int:
        targets = {site.layer: (site.target, count) for site, count in executed.items()}
        total = 0
        for index, layer in enumerate(self.layers):
            target, counts = targets.get(index, (None, None))
            if target == "block":
                assert counts is not None
                values, times = counts.unique(return_counts=True)  # k queries meet k keys
                total += sum(n * layer.flops(k) for k, n in zip(values.tolist(), times.tolist(), strict=True))
                continue
            total += rows * layer.flops(tokens)
            if target == "expert":
                assert counts is not None
                idle = rows * tokens * self.per_token - int(counts.sum())
                total -= 2 * idle * (layer.experts // self.per_token)
        return total


class _Layer(NamedTuple):
    """A layer's parts, and how many of its MLP's multiply-adds a token are in experts."""

    attention: SublayerCost
    mlp: SublayerCost
    experts: int

    def flops(self, tokens: int) -> int:
        return self.attention.flops(tokens, 0) + self.mlp.flops(tokens, 0)


def executed_of(trace: RoutingTrace | None) -> dict[Site, torch.Tensor]:
    """How much of each row each routed block, or mixture of experts, ran in a forward."""
    return {} if trace is None else {site: d.execute.flatten(1).sum(1) for site, d in trace.decisions.items()}


def _router_flops(model: PreTrainedModel) -> tuple[int, int]:
    """Of all routers, a token: forward, and forward and backward. Products with a single vector count, too."""
    if not is_attached(model):
        return 0, 0
    named = [(name, p) for router in routing_of(model).routers().values() for name, p in router.named_parameters()]
    sizes = [(p.numel(), name.startswith("predictor.") and p.dim() > 1) for name, p in named if p.dim()]
    return sum(2 * n for n, _ in sizes), sum((4 if detached else 6) * n for n, detached in sizes)
