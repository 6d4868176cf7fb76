"""Mixture-of-Depths on every family: running the chosen tokens alone is what an oracle finds that runs every token and
leaves the others out; and decoding with caches is the whole sequence at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dynadepth
from dynadepth import MoDConfig

from .matrix import BATCH, TOKENS, assert_same, inputs
from .models import MODELS, tiny
from .oracle import attention_of, hide, layers_of
from .test_batch import greedy, row_alone

FAMILY = pytest.mark.parametrize("name", MODELS)
SIDE = pytest.mark.parametrize("side", ["left", "right"])


def mod(name: str, seed: int = 0, **settings: Any) -> Any:
    """A tiny model with routers that are random in all their parts."""
    model = dynadepth.attach(tiny(name), MoDConfig(**{"capacity": 0.4, **settings}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for router in dynadepth.routing_of(model).routers().values():
            for parameter in router.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * max(parameter.numel(), 1) ** -0.5)
    return model


def weighted(execute: Tensor, weight: Tensor) -> Any:
    """A layer's forward hook: x + w · (layer(x) - x) where tokens execute, x elsewhere."""

    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        first = output[0] if isinstance(output, tuple) else output
        mixed = torch.where(execute[..., None], hidden + weight[..., None] * (first - hidden), hidden)
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    return hook


@torch.no_grad()
@SIDE
@FAMILY
def test_training_is_the_oracle(name: str, side: str) -> None:
    batch, model = inputs(side), mod(name)
    out = model.train()(**batch)
    bare = tiny(name)
    for site, decision in out.depth_trace.decisions.items():
        assert decision.execute.sum(1).tolist() == [3, 4, 4]  # 0.4 of 8, 12 and 10 real tokens
        layer = layers_of(bare)[site.layer]
        attention_of(layer).register_forward_pre_hook(hide(decision.execute), with_kwargs=True)
        layer.register_forward_hook(weighted(decision.execute, decision.weight), with_kwargs=True)
    wanted = bare(**batch, use_cache=False).logits
    assert_same(out.logits, wanted, batch["attention_mask"])
    assert (wanted - tiny(name)(**batch).logits).abs().max() > 0.1


@torch.no_grad()
@FAMILY
def test_generation_batch_is_singles_and_cached_is_uncached(name: str) -> None:
    batch, model = inputs("left"), mod(name)
    with dynadepth.recording() as record:
        tokens, logits, _ = greedy(model, batch)
    keep = record.keep_ratio()
    assert keep is not None
    assert 0.05 < keep.routed < 0.95, "another seed: some of each"
    for row in range(BATCH):
        single = row_alone(batch, row)
        token, logit, _ = greedy(model, single)
        assert torch.equal(token, tokens[row : row + 1])
        assert_same(logit, logits[row : row + 1], atol=1e-4)
        whole = torch.cat([single["input_ids"], token], 1)
        found = model(input_ids=whole, use_cache=False).logits[:, -token.shape[1] - 1 : -1]
        assert_same(found, logit, atol=1e-4)


@torch.no_grad()
@FAMILY
def test_the_future_changes_no_causal_decision(name: str) -> None:
    batch, model = inputs("right"), mod(name, sampling="aux_loss")
    ids, first = batch["input_ids"], TOKENS // 2
    before = model(input_ids=ids).logits
    other = ids.clone()
    other[:, first:] = (other[:, first:] + 11) % 96 + 1
    after = model(input_ids=other).logits
    assert_same(after[:, :first], before[:, :first], atol=1e-5)
