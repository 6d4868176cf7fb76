"""What cannot hold a route is refused by name, and the message says what to do instead."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig, StaticCache

from dynadepth import Site, StaticConfig, attach, detach, disabled, fixed_routes
from dynadepth.errors import ConfigError, UnsupportedCacheError
from dynadepth.routing.call import SublayerCall
from small import KINDS, bare, ids, ragged, routed

PROMPT = {"input_ids": ids(2, 4), "max_new_tokens": 2, "do_sample": False}
DENSE = re.escape("dynadepth.disabled(model)")


@pytest.mark.parametrize("name", ["static", "quantized", "paged", "offloaded_static"])
def test_cache_implementations(name: str) -> None:
    model = routed()
    ways: list[Callable[[], Any]] = [
        lambda: model.generate(**PROMPT, cache_implementation=name),
        lambda: model.generate(PROMPT["input_ids"], generation_config=GenerationConfig(cache_implementation=name)),
        lambda: model.generate(PROMPT["input_ids"], GenerationConfig(cache_implementation=name)),
    ]
    for way in ways:
        with pytest.raises(UnsupportedCacheError, match=f"'{name}'.*{DENSE}"):
            way()
    model.generation_config.cache_implementation = name
    with pytest.raises(UnsupportedCacheError, match=f"'{name}'.*{DENSE}"):
        model.generate(**PROMPT)


def test_a_static_cache_works_dense() -> None:
    model = routed()
    with disabled(model):
        found = model.generate(**PROMPT, cache_implementation="static", disable_compile=True)
    assert torch.equal(found, bare().generate(**PROMPT))


@pytest.mark.parametrize(
    "method", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"]
)
def test_continuous_batching(method: str) -> None:
    model, arguments = routed(), ([[1, 2]],) if method == "generate_batch" else ()
    for _ in range(2):
        with pytest.raises(UnsupportedCacheError, match=re.escape("dynadepth.detach(model)")):  # noqa: PT012
            entered = getattr(model, method)(*arguments)
            entered.__enter__()
    # Its threads see nothing of `disabled`, so that is no way out.
    with disabled(model), pytest.raises(UnsupportedCacheError, match="detach"):
        model.generate_batch([[1, 2]])


def test_generation_without_a_cache_needs_token_granularity() -> None:
    with pytest.raises(UnsupportedCacheError, match=f"use_cache=False.*{DENSE}.*token granularity"):
        routed().generate(**PROMPT, use_cache=False)
    with pytest.raises(UnsupportedCacheError, match="use_cache=False"):
        routed().generate(PROMPT["input_ids"], GenerationConfig(use_cache=False, max_new_tokens=2))
    model = routed()
    model.generation_config.use_cache = False  # what the caller's configuration leaves open comes from here
    with pytest.raises(UnsupportedCacheError, match="use_cache=False"):
        model.generate(PROMPT["input_ids"], GenerationConfig(max_new_tokens=2))
    found = model.generate(PROMPT["input_ids"], GenerationConfig(max_new_tokens=2, use_cache=True, pad_token_id=0))
    assert torch.equal(found, routed().generate(**PROMPT))


@pytest.mark.parametrize("kv_policy", ["project", "drop"])
def test_at_token_granularity_generation_works_without_a_cache(kv_policy: str) -> None:
    model, batch = routed(granularity="token", kv_policy=kv_policy), ragged([5, 2])
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**batch, **options, use_cache=False), model.generate(**batch, **options))


@pytest.mark.parametrize("make", [StaticCache, EncoderDecoderCache], ids=lambda kind: kind.__name__)
def test_caches_of_another_class(make: type) -> None:
    model = routed()
    if make is StaticCache:
        cache = StaticCache(config=model.config, max_cache_len=16)
    else:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    with pytest.raises(UnsupportedCacheError, match=f"not in a {make.__name__}.*{DENSE}"):
        model(input_ids=PROMPT["input_ids"], past_key_values=cache)


def test_a_cache_with_unrouted_tokens() -> None:
    model, cache = routed(), DynamicCache()
    with disabled(model):
        model(input_ids=ids(2, 3), past_key_values=cache)
    with pytest.raises(UnsupportedCacheError, match=f"already holds 3 tokens.*empty cache.*{DENSE}"):
        model(input_ids=ids(2, 1), past_key_values=cache)
    assert type(cache) is DynamicCache


@pytest.mark.parametrize(("granularity", "kv_policy"), KINDS)
def test_another_number_of_sequences(granularity: str, kv_policy: str) -> None:
    model = routed(granularity=granularity, kv_policy=kv_policy)
    cache = model(input_ids=ids(2, 3)).past_key_values
    with pytest.raises(UnsupportedCacheError, match=r"holds 2 sequences but this forward brings 3.*same batch.*empty"):
        model(input_ids=ids(3, 1), past_key_values=cache)


@pytest.mark.parametrize(("granularity", "kv_policy"), KINDS)
def test_a_dense_forward_on_a_routed_cache(granularity: str, kv_policy: str) -> None:
    model = routed(granularity=granularity, kv_policy=kv_policy)
    cache = model(input_ids=ids(2, 3)).past_key_values
    with disabled(model), pytest.raises(UnsupportedCacheError, match=r"holds 3 tokens of a routed forward.*empty"):
        model(input_ids=ids(2, 1), past_key_values=cache)
    # Nor by the same model after its routers are gone, nor by any other that knows nothing of routes.
    for other in (detach(model), bare()):
        with pytest.raises(UnsupportedCacheError, match=r"holds 3 tokens of a routed forward.*empty"):
            other(input_ids=ids(2, 1), past_key_values=cache)


@pytest.mark.parametrize("other", [{"layers": (1, 2)}, {"granularity": "token"}, {"target": "mlp"}], ids=str)
def test_a_cache_of_another_routing(other: dict[str, Any]) -> None:
    cache = routed()(input_ids=ids(2, 3)).past_key_values
    with pytest.raises(UnsupportedCacheError, match=r"other sublayers.*empty cache"):
        routed(**other)(input_ids=ids(2, 1), past_key_values=cache)
    cache.reset()  # emptied, it is anyone's
    assert routed(**other)(input_ids=ids(3, 2), past_key_values=cache).past_key_values is cache


def test_positive_crops_say_what_to_pass() -> None:
    cache = routed()(input_ids=ids(1, 3)).past_key_values
    with pytest.raises(UnsupportedCacheError, match="negative number"):
        cache.crop(2)


def test_padding_that_a_mask_does_not_show() -> None:
    model = routed()
    causal = torch.ones(4, 4, dtype=torch.bool).tril().expand(2, 1, 4, 4)
    with pytest.raises(ConfigError, match=r"padding.*\[batch, tokens\].*prompt_mask"):
        model(input_ids=ids(2, 4), attention_mask=causal)
    known = model(input_ids=ids(2, 4), attention_mask=causal, prompt_mask=torch.ones(2, 4, dtype=torch.bool))
    assert torch.equal(known.logits, model(input_ids=ids(2, 4)).logits)
    attach(detach(model), StaticConfig(skip=(1,)))(input_ids=ids(2, 4), attention_mask=causal)  # pools nothing


def test_masks_that_cannot_be_split_by_row() -> None:
    class BlockMask:  # flex attention's
        pass

    call = SublayerCall(lambda *_, **__: None, (torch.zeros(2, 3, 4),), {"attention_mask": BlockMask()})
    with pytest.raises(ConfigError, match=r"BlockMask.*sdpa"):
        call.rows(torch.tensor([1]))


def test_sites_that_are_not_routed_cannot_be_fixed() -> None:
    model, decisions = routed(layers=(1, 2)), {Site(0, "attention"): True}
    with pytest.raises(ConfigError, match=r"'0.attention'.*routed: 1.attention, 2.attention"):
        fixed_routes(model, decisions).__enter__()


class _Logits(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


@pytest.mark.parametrize("granularity", ["sequence", "token"])
def test_graphs_that_would_keep_an_examples_route(granularity: str) -> None:
    wrapper, example = _Logits(routed(granularity=granularity)), (ids(1, 5),)
    for capture in (torch.jit.trace, torch.export.export):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing is deprecated
            with pytest.raises(ConfigError, match=r"keep the route of the example.*static"):
                capture(wrapper, example)
    static = _Logits(attach(bare(), StaticConfig(skip=(1,))))
    exported = torch.export.export(static, example).module()
    assert torch.equal(exported(ids(1, 5, seed=3)), static(ids(1, 5, seed=3)))
