"""Semantic 3: a batch is its sequences run one by one, whatever its padding and however its rows decide."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import dynadepth

from .matrix import BATCH, MATRIX, ONCE, Cell, assert_same, inputs, over, routed

NEW = 5


def row_alone(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row without its padding, `[1, t]`."""
    real = batch["attention_mask"][row].bool()
    return {name: tensor[row, real].unsqueeze(0) for name, tensor in batch.items()}


def greedy(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Any]:
    """New tokens `[B, n]`, their logits `[B, n, V]`, and the cache."""
    out = model.generate(**batch, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True)
    return out.sequences[:, -NEW:], torch.stack(out.logits, 1), out.past_key_values


@over(MATRIX)
def test_generate(name: str, cell: Cell) -> None:
    batch = inputs("left")
    model = routed(name, cell, batch)
    with dynadepth.recording() as together:
        tokens, logits, cache = greedy(model, batch)
    keeps, kv_bytes = [], 0
    for row in range(BATCH):
        with dynadepth.recording() as alone:
            token, logit, own = greedy(model, row_alone(batch, row))
        assert torch.equal(token, tokens[row : row + 1])
        assert_same(logit, logits[row : row + 1], atol=1e-4)
        keeps += alone.sequences
        kv_bytes += own.kv_bytes()
        for site, route in cache.routes.items():
            assert own.routes[site] == [route[row]]
    assert together.sequences == keeps
    assert any(0 < sum(keep[site] for keep in keeps) < BATCH for site in cell.sites)
    if cell.has_policy and cell.kv_policy == "drop":
        assert cache.kv_bytes() == kv_bytes, "padding never executes, so it leaves no keys"


@over(ONCE)
def test_forward_with_padding_on_the_right(name: str, cell: Cell) -> None:
    batch = inputs("right")
    model = routed(name, cell, batch)
    with torch.no_grad():
        together = model(**batch)
        for row in range(BATCH):
            alone = model(**row_alone(batch, row))
            length = alone.logits.shape[1]
            assert_same(alone.logits, together.logits[row : row + 1, :length])
            for site, logits in together.depth_logits.items():
                own = logits[row : row + 1]
                assert_same(alone.depth_logits[site], own if own.dim() == 1 else own[:, :length], atol=1e-4)
