"""Nothing that a forward makes stays on the CPU when the model is elsewhere. There is no second device here but `meta`,
whose tensors have shapes and no values: an operation on tensors of both raises there as it does on a GPU."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from dynadepth import routing_of
from dynadepth.routing.context import ForwardContext
from small import FAMILIES, KINDS, LAYERS, routed

ROWS, TOKENS, WINDOW = 3, 6, 4


@pytest.fixture(autouse=True)
def without_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """`meta` has none."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)


def inputs(family: str, tokens: int = TOKENS, keys: int = TOKENS) -> dict[str, Any]:
    """With masks that are made already: transformers looks at values to make them."""

    def mask(keys: int) -> Tensor:
        return torch.ones(ROWS, 1, tokens, keys, dtype=torch.bool, device="meta")

    masks: Any = mask(keys)
    if family == "gemma3":
        seen = WINDOW - 1 + tokens if keys > tokens else keys
        masks = {"full_attention": mask(keys), "sliding_attention": mask(seen)}
    ids = torch.zeros(ROWS, tokens, dtype=torch.long, device="meta")
    return {"input_ids": ids, "attention_mask": masks}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("granularity", "kv_policy"), KINDS)
@pytest.mark.parametrize("target", ["attention", "mlp", "block"])
@pytest.mark.parametrize("skip_path", ["identity", "linear"])
def test_a_training_step(family: str, granularity: str, kv_policy: str, target: str, skip_path: str) -> None:
    options = {"granularity": granularity, "kv_policy": kv_policy if target != "mlp" else "project"}
    model = routed(family, target=target, skip_path=skip_path, penalty=0.1, **options).train().to("meta")
    prompt = torch.zeros(ROWS, TOKENS, dtype=torch.bool, device="meta")
    out = model(**inputs(family), prompt_mask=prompt)
    (out.logits.sum() + out.depth_loss).backward()
    assert all(router.weight.grad.device.type == "meta" for router in routing_of(model).routers().values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("granularity", ["sequence", "route"])
@pytest.mark.parametrize("target", ["attention", "mlp", "block"])
@pytest.mark.parametrize("skip_path", ["identity", "linear"])
def test_a_prompt_and_a_token_of_rows_with_different_routes(
    monkeypatch: pytest.MonkeyPatch, family: str, granularity: str, target: str, skip_path: str
) -> None:
    model = routed(family, granularity=granularity, target=target, skip_path=skip_path).to("meta")

    def to_host(context: ForwardContext, times: Any) -> Any:
        context.trace.fresh = [not decided for decided in context.book.decided]
        return [[1, 0, 1]] * len(times) if times.dim() == 2 else [1, 0, 1]

    monkeypatch.setattr(ForwardContext, "to_host", to_host)
    prompt = torch.ones(ROWS, TOKENS, dtype=torch.bool, device="meta")
    with torch.no_grad():
        cache = model(**inputs(family), prompt_mask=prompt).past_key_values
        out = model(**inputs(family, 1, TOKENS + 1), prompt_mask=prompt, past_key_values=cache)
    assert out.logits.device.type == "meta"
    assert list(cache.routes.values()) == [[1, 0, 1]] * LAYERS
    assert cache.seen == TOKENS + 1
