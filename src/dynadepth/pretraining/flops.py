"""What training costs, by formula: forward and backward of the tokens that really ran, counted as in `cost`.

A matrix product's backward is two products of its size, one for its input's gradient and one for its weights': three
forwards in all. That holds for every product of the model (the first layer's input has a gradient, too, since
embeddings learn), head included. A router's matrices read states that no gradient goes back to, so there it is two.
Where tokens compete (Mixture-of-Depths), training runs the winners of each row alone: k queries with k keys.
Rows that run different numbers of tokens (threshold routing) are padded to the longest when they run: that is not
counted, for another kernel would not do it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from dynadepth.cost import SublayerCost, head_flops, sublayer_costs
from dynadepth.routed import is_attached, routing_of
from dynadepth.routing.decision import RoutingTrace, Site

Executed = Mapping[Site, torch.Tensor]
"""Tokens of each row, int64 `[B]`, that a routed block ran."""


class FlopMeter:
    """Counts a model's FLOPs; sizes are read once."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.layers = [list(parts.values()) for parts in sublayer_costs(model)]
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
        layers = {site.layer: count for site, count in executed.items()}
        total = 0
        for index, parts in enumerate(self.layers):
            counts = layers.get(index)
            if counts is None:
                total += rows * sum(part.flops(tokens, 0) for part in parts)
            else:
                total += sum(_of_rows(part, counts) for part in parts)
        return total


def executed_of(trace: RoutingTrace | None) -> dict[Site, torch.Tensor]:
    """How many tokens of each row each routed block ran in a forward."""
    return {} if trace is None else {site: d.execute.sum(1) for site, d in trace.decisions.items()}


def _of_rows(part: SublayerCost, counts: torch.Tensor) -> int:
    """Of rows that ran so many tokens each, with their keys alone."""
    values, times = counts.unique(return_counts=True)
    return sum(n * part.flops(k, 0) for k, n in zip(values.tolist(), times.tolist(), strict=True))


def _router_flops(model: PreTrainedModel) -> tuple[int, int]:
    """Of all routers, a token: forward, and forward and backward. Products with a single vector count, too."""
    if not is_attached(model):
        return 0, 0
    parameters = [p for router in routing_of(model).routers().values() for p in router.parameters() if p.dim()]
    forward = sum(2 * p.numel() for p in parameters)
    return forward, sum((4 if p.dim() > 1 else 6) * p.numel() for p in parameters)
