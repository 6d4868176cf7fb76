"""Semantic 11: one full-batch entry a layer in `attentions` and `hidden_states`, whatever was skipped."""

from __future__ import annotations

import torch

import dynadepth

from .matrix import MATRIX, ONCE, TOKENS, Cell, assert_same, decisions, in_chunks, inputs, over
from .models import LAYERS, WIDTH, tiny
from .oracle import reference

CHUNKS = (7, 3, 1, 1)
EAGER = [(name, cell) for name, cell in MATRIX if tiny(name).config._attn_implementation == "eager"]


@over(ONCE)
def test_hidden_states(name: str, cell: Cell) -> None:
    model, batch, given = tiny(name), inputs(), decisions(cell)
    wanted = reference(model, cell, given, batch, output_hidden_states=True).hidden_states
    cell.attach(model)
    with torch.no_grad(), dynadepth.fixed_routes(model, given):
        sparse = model(**batch, output_hidden_states=True).hidden_states
        masked = model.train()(**batch, output_hidden_states=True).hidden_states
    model.eval()
    for found in (sparse, masked):
        assert len(found) == len(wanted) == LAYERS + 1
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other, batch["attention_mask"])
    last = in_chunks(model, batch, (TOKENS - 1, 1), given, output_hidden_states=True)[-1].hidden_states
    assert [tuple(entry.shape) for entry in last] == [(len(batch["input_ids"]), 1, WIDTH)] * (LAYERS + 1)


@over(EAGER)
def test_attentions(name: str, cell: Cell) -> None:
    model, batch, given = tiny(name), inputs(), decisions(cell)
    real = batch["attention_mask"].bool()
    shapes = [
        [weights.shape for weights in out.attentions] for out in in_chunks(model, batch, CHUNKS, output_attentions=True)
    ]
    wanted = reference(model, cell, given, batch, output_attentions=True).attentions
    assert len(wanted) == LAYERS
    cell.attach(model)
    with torch.no_grad(), dynadepth.fixed_routes(model, given):
        sparse = model(**batch, output_attentions=True).attentions
        masked = model.train()(**batch, output_attentions=True).attentions
    model.eval()
    for found in (sparse, masked):
        assert len(found) == LAYERS
        for one, other in zip(found, wanted, strict=True):
            assert_same(one.transpose(1, 2), other.transpose(1, 2), real)  # [B, T, heads, K]

    start = 0
    for out, shape in zip(in_chunks(model, batch, CHUNKS, given, output_attentions=True), shapes, strict=True):
        assert [weights.shape for weights in out.attentions] == shape
        stop = start + out.logits.shape[1]
        for one, other in zip(out.attentions, wanted, strict=True):
            keys = one.shape[3]
            part = other[:, :, start:stop, stop - keys : stop]  # a sliding layer shows its last keys
            assert_same(one.transpose(1, 2), part.transpose(1, 2), real[:, start:stop])
        start = stop


@over([pair for pair in EAGER if pair[1].target != "mlp"])
def test_attentions_where_nothing_executes(name: str, cell: Cell) -> None:
    model, batch = tiny(name), inputs()
    dense = in_chunks(model, batch, CHUNKS, output_attentions=True)
    cell.attach(model)
    nothing = {site: torch.zeros_like(execute) for site, execute in decisions(cell).items()}
    for out, bare in zip(in_chunks(model, batch, CHUNKS, nothing, output_attentions=True), dense, strict=True):
        assert [weights.shape for weights in out.attentions] == [weights.shape for weights in bare.attentions]
        assert not any(weights.any() for weights in out.attentions)


@over([pair for pair in ONCE if pair[0] in ("mixtral", "olmoe", "gpt_oss")])
def test_router_logits_of_experts_stay_the_models_own(name: str, cell: Cell) -> None:
    model, batch, given = tiny(name), inputs(), decisions(cell)
    # Scored after a prompt, which a sequence-level router pools: without one it would take some of the scored tokens.
    batch["labels"] = batch["input_ids"].masked_fill(torch.arange(TOKENS) < 6, -100)
    wanted = reference(model, cell, given, batch, output_router_logits=True)
    real_shape = batch["attention_mask"].shape
    cell.attach(model)
    with torch.no_grad(), dynadepth.fixed_routes(model, given):
        for training in (False, True):
            out = model.train(training)(**batch, output_router_logits=True)
            assert_same(out.aux_loss, wanted.aux_loss)
            assert_same(out.loss, wanted.loss)
            for found, want in zip(out.router_logits, wanted.router_logits, strict=True):
                assert_same(found.view(*real_shape, -1), want.view(*real_shape, -1), batch["attention_mask"])
