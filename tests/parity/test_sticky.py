"""Semantic 5: what happens to a cache between two forwards: rows reordered, picked, repeated, tokens taken back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import dynadepth
from dynadepth.routing.sublayer import EntryNorm

from .matrix import SHORT, TOKENS, Cell, assert_same, inputs, over, routed

PROMPT = TOKENS - 3
CHANGES: dict[str, tuple[list[int], Any]] = {
    "reorder": ([2, 0, 0], lambda cache, rows: cache.reorder_cache(torch.tensor(rows))),
    "select": ([2, 1], lambda cache, rows: cache.batch_select_indices(torch.tensor(rows))),
    "repeat": ([0, 0, 1, 1, 2, 2], lambda cache, rows: cache.batch_repeat_interleave(2)),
}


def forward(model: Any, batch: dict[str, Tensor], start: int, stop: int, cache: Any, rows: Any = slice(None)) -> Any:
    """Tokens `start` to `stop` of some rows, on a cache that holds those before."""
    ids, mask = batch["input_ids"][rows, start:stop], batch["attention_mask"][rows, :stop]
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("change", CHANGES)
@over(SHORT)
def test_rows_take_their_routes_along(name: str, cell: Cell, change: str) -> None:
    batch = inputs()
    model = routed(name, cell, batch)
    straight = forward(model, batch, 0, PROMPT, None).past_key_values
    wanted = [forward(model, batch, t, t + 1, straight).logits for t in range(PROMPT, TOKENS)]

    rows, apply = CHANGES[change]
    cache = forward(model, batch, 0, PROMPT, None).past_key_values
    routes = {site: list(route) for site, route in cache.routes.items()}
    apply(cache, rows)
    assert cache.routes == {site: [route[row] for row in rows] for site, route in routes.items()}
    for t, want in zip(range(PROMPT, TOKENS), wanted, strict=True):
        assert_same(forward(model, batch, t, t + 1, cache, rows).logits, want[rows])
    assert cache.routes == {site: [route[row] for row in rows] for site, route in routes.items()}


@over(SHORT)
def test_tokens_taken_back(name: str, cell: Cell) -> None:
    batch = inputs()
    model = routed(name, cell, batch)
    straight = forward(model, batch, 0, PROMPT, None).past_key_values
    wanted = [forward(model, batch, t, t + 1, straight) for t in range(PROMPT, TOKENS)]

    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    assert forward(model, batch, 0, PROMPT, cache).past_key_values is cache
    cache.activate_past_recording()  # skip paths: an ordinary cache without sliding layers does not note the first call
    routes = {site: list(route) for site, route in cache.routes.items()}
    wrong = {**batch, "input_ids": batch["input_ids"].flip(1)}
    forward(model, wrong, PROMPT, PROMPT + 2, cache)
    cache.crop(-2)
    assert cache.get_seq_length() == PROMPT
    for t, want in zip(range(PROMPT, TOKENS), wanted, strict=True):
        assert_same(forward(model, batch, t, t + 1, cache).logits, want.logits)
    assert cache.routes == routes


@over(SHORT)
def test_two_generations_at_once(name: str, cell: Cell) -> None:
    one, other = inputs(seed=0), inputs("right", seed=1)
    model = routed(name, cell, one)
    alone = [
        torch.cat([model(**{k: v[:, :8] for k, v in batch.items()}).logits, forward_rest(model, batch).logits], 1)
        for batch in (one, other)
    ]
    caches = [forward(model, batch, 0, 8, None) for batch in (one, other)]
    logits = [[out.logits] for out in caches]
    for t in range(8, TOKENS):
        for i, batch in enumerate((one, other)):
            logits[i].append(forward(model, batch, t, t + 1, caches[i].past_key_values).logits)
    for found, want, batch in zip(logits, alone, (one, other), strict=True):
        assert_same(torch.cat(found, 1), want, batch["attention_mask"])


def forward_rest(model: Any, batch: dict[str, Tensor]) -> Any:
    """What follows the first 8 tokens, at once."""
    return forward(model, batch, 8, TOKENS, forward(model, batch, 0, 8, None).past_key_values)


def test_a_route_is_kept_where_the_router_would_now_decide_otherwise() -> None:
    cell = next(cell for _, cell in SHORT if cell.sticky)
    batch = inputs()
    model = routed("llama", cell, batch)
    cache = forward(model, batch, 0, PROMPT, None).past_key_values
    routes = {site: list(route) for site, route in cache.routes.items()}
    for router in dynadepth.routing_of(model).routers().values():
        router.threshold.fill_(float("-inf"))
    out = forward(model, batch, PROMPT, PROMPT + 1, cache)
    assert cache.routes == routes
    assert not out.depth_logits


def test_a_skip_known_later_leaves_rows_that_execute_alone() -> None:
    """One row has its route when another, padding so far, gets one that skips: the first one's input is still read."""
    cell = next(cell for _, cell in SHORT if cell.sticky and cell.target == "attention")
    model = routed("llama", cell, inputs())
    assert any(isinstance(module, EntryNorm) for module in model.modules())
    sites = dynadepth.routing_of(model).sites
    ids = inputs()["input_ids"][:2]
    mask = torch.ones_like(ids)
    mask[1, :PROMPT] = 0
    batch = {"input_ids": ids, "attention_mask": mask}

    def answer(rows: Any) -> Tensor:
        with dynadepth.fixed_routes(model, dict.fromkeys(sites, True)):
            cache = forward(model, batch, 0, PROMPT, None, rows).past_key_values
        with dynadepth.fixed_routes(model, dict.fromkeys(sites, False)):
            return forward(model, batch, PROMPT, TOKENS, cache, rows).logits

    torch.testing.assert_close(answer([0, 1])[:1], answer([0]))
