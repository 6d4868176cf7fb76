"""The matrix's main claims once more, on a real model: SmolLM2-135M-Instruct."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dynadepth
from dynadepth import MindSkipConfig, hub

from .test_execute_all import form

PROMPTS = ("The capital of France is", "Write one sentence about the sea, then one about mountains.", "2 + 2 =")
NEW = 6


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> Any:
    return hub.load_tokenizer(str(smollm2_path))


@pytest.fixture(scope="module")
def batch(tokenizer: Any) -> Any:
    return tokenizer(list(PROMPTS), return_tensors="pt", padding=True, padding_side="left")


def generated(model: Any, batch: Any) -> tuple[torch.Tensor, Any]:
    """New tokens `[B, NEW]` of a greedy generation, and its cache."""
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    out = model.generate(**batch, **options)
    return out.sequences[:, -NEW:], out.past_key_values


@pytest.mark.model
@torch.no_grad()
def test_execute_all_is_the_bare_model(smollm2_path: Path, batch: Any) -> None:
    model = hub.load_model(str(smollm2_path), dtype=torch.bfloat16)
    before, logits, tokens = form(model), model(**batch).logits, generated(model, batch)[0]
    for cell in ("attention sequence", "attention token", "mlp token", "block sequence"):
        target, granularity = cell.split()
        dynadepth.attach(model, MindSkipConfig(target=target, granularity=granularity, layers=tuple(range(30))))
        assert torch.equal(model(**batch).logits, logits)
        if target == "attention":
            assert torch.equal(generated(model, batch)[0], tokens)
        dynadepth.detach(model)
        assert form(model) == before
    assert torch.equal(model(**batch).logits, logits)


@pytest.mark.model
@torch.no_grad()
def test_a_batch_is_its_sequences(smollm2_path: Path, tokenizer: Any, batch: Any) -> None:
    model = hub.load_model(str(smollm2_path), dtype=torch.float32)
    dynadepth.attach(model, MindSkipConfig(layers=tuple(range(0, 30, 3))))
    generator = torch.Generator().manual_seed(0)
    for site, router in dynadepth.routing_of(model).routers().items():
        router.weight.copy_(torch.randn(router.weight.shape, generator=generator))
        logits = model(**batch).depth_logits[site].sort().values
        router.threshold.copy_(logits[:2].mean())  # one of the three skips
    together, cache = generated(model, batch)
    assert all(sum(route) == len(PROMPTS) - 1 for route in cache.routes.values())
    kv_bytes = 0
    for row, prompt in enumerate(PROMPTS):
        alone, own = generated(model, tokenizer(prompt, return_tensors="pt"))
        assert torch.equal(alone[0], together[row])
        assert own.routes == {site: [route[row]] for site, route in cache.routes.items()}
        kv_bytes += own.kv_bytes() // own.seen * cache.seen
    assert cache.kv_bytes() == kv_bytes
