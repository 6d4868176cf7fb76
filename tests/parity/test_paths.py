"""Semantic 2: one decision, three paths. Dense masked, sparse, and prefill + decode do what an independent oracle
does."""

from __future__ import annotations

import pytest
import torch

import dynadepth
from dynadepth.routing import token_parts

from .matrix import MATRIX, TOKENS, Cell, assert_same, decisions, in_chunks, inputs, over, routed
from .models import tiny
from .oracle import reference

PROMPT = 7


@pytest.mark.parametrize("side", ["left", "right"])
@over(MATRIX)
def test_injected_decisions(name: str, cell: Cell, side: str) -> None:
    model, batch, given = tiny(name), inputs(side), decisions(cell)
    real = batch["attention_mask"]
    dense = model(**batch).logits
    wanted = reference(model, cell, given, batch).logits
    assert (wanted - dense)[real.bool()].abs().max() > 0.1, "these decisions change nothing"

    cell.attach(model)
    with torch.no_grad(), dynadepth.fixed_routes(model, given):
        assert_same(model(**batch).logits, wanted, real)
        assert_same(model(**batch, use_cache=False).logits, wanted, real)
        assert_same(model.train()(**batch).logits, wanted, real)
    model.eval()
    for lengths in ((PROMPT, 3, 1, 1), (3, 4, 4, 1)):  # in the latter, a row brings nothing but padding at first
        steps = in_chunks(model, batch, lengths, given)
        assert_same(torch.cat([out.logits for out in steps], 1), wanted, real)


@pytest.mark.parametrize("side", ["left", "right"])
@over([(name, cell) for name, cell in MATRIX if cell.has_policy and cell.kv_policy == "project"])
def test_prefills_in_parts(monkeypatch: pytest.MonkeyPatch, name: str, cell: Cell, side: str) -> None:
    """Long prefills of chosen tokens are carried out part by part, here of five, three or one token."""
    model, batch, given = tiny(name), inputs(side), decisions(cell)
    real = batch["attention_mask"]
    wanted = reference(model, cell, given, batch).logits
    cell.attach(model)
    calls = []
    run = token_parts.run_parts
    monkeypatch.setattr(token_parts, "run_parts", lambda *given: calls.append(given) or run(*given))
    for least, lengths in ((5, (TOKENS,)), (1, (TOKENS - 2, 1, 1)), (1, (3, TOKENS - 3))):
        monkeypatch.setattr(token_parts, "LEAST", least)
        calls.clear()
        steps = in_chunks(model, batch, lengths, given)
        assert calls, "nothing was done in parts"
        assert_same(torch.cat([out.logits for out in steps], 1), wanted, real)


@pytest.mark.parametrize("side", ["left", "right"])
@over(MATRIX)
def test_routers_decide_alike(name: str, cell: Cell, side: str) -> None:
    batch = inputs(side)
    real = batch["attention_mask"].bool()
    prompt = (torch.arange(TOKENS) < PROMPT).expand(real.shape)
    model = routed(name, cell, batch, prompt_mask=prompt)
    with torch.no_grad():
        sparse = model(**batch, prompt_mask=prompt)
        masked = model.train()(**batch, prompt_mask=prompt, labels=batch["input_ids"])
        model.eval()
    steps = in_chunks(model, batch, (PROMPT, 3, 1, 1))
    for site, router in dynadepth.routing_of(model).routers().items():
        logits = [out.depth_logits[site] for out in (steps[:1] if cell.sticky else steps)]
        wanted, units = torch.cat(logits, -1), torch.ones(len(real)) if cell.sticky else real
        for out in (sparse, masked):
            assert out.depth_logits[site].dtype == torch.float32
            assert_same(out.depth_logits[site], wanted, units, atol=1e-4)
        margin = (wanted - router.threshold)[units.bool()]
        assert margin.abs().min() > 1e-4, "another seed: too near to the threshold to compare decisions"
        assert margin.min() < 0 < margin.max(), "another seed: all decide alike"
    assert_same(masked.logits, sparse.logits, real)
    assert_same(torch.cat([out.logits for out in steps], 1), sparse.logits, real)
