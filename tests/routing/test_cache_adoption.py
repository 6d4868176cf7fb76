"""Caches of the caller's own: adopted in place with their flags, given back empty, filled by nobody else."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from dynadepth import Site, disabled, fixed_routes, routing_of
from dynadepth.errors import UnsupportedCacheError
from dynadepth.routing.cache import RoutedCache
from small import FAMILIES, KINDS, LAYERS, ids, paths, ragged, routed

KIND = pytest.mark.parametrize(("granularity", "kv_policy"), KINDS)
FAMILY = pytest.mark.parametrize("family", FAMILIES)


@KIND
def test_cropped_to_nothing_it_decides_anew(granularity: str, kv_policy: str) -> None:
    model = routed(granularity=granularity, kv_policy=kv_policy)
    cache = model(**ragged([5, 2])).past_key_values
    cache.crop(-5)
    assert (cache.seen, cache.routes, cache.kv_bytes()) == (0, {}, 0)
    batch = {"input_ids": ids(3, 4, seed=3)}
    again, fresh = model(**batch, past_key_values=cache), model(**batch)
    assert again.past_key_values is cache
    assert torch.equal(again.logits, fresh.logits)
    assert cache.routes == fresh.past_key_values.routes


@FAMILY
@KIND
def test_a_dense_forward_may_fill_an_emptied_cache(family: str, granularity: str, kv_policy: str) -> None:
    model, prompt = routed(family, granularity=granularity, kv_policy=kv_policy), ids(2, 6)
    cache = model(input_ids=prompt).past_key_values
    cache.reset()
    with disabled(model):
        steps = [model(input_ids=prompt[:, i : i + 2], past_key_values=cache).logits for i in (0, 2, 4)]
        dense = model(input_ids=prompt).logits
    assert type(cache) is DynamicCache
    torch.testing.assert_close(torch.cat(steps, 1), dense, atol=1e-4, rtol=1e-4)


streams = pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="torch was built for a GPU that is not here",
)


@streams
def test_flags_of_the_callers_cache_survive() -> None:
    model, cache = routed("gemma3"), DynamicCache(config=routed("gemma3").config, offloading=True)
    cache.activate_past_recording()
    stream = cache.prefetch_stream
    adopted = RoutedCache.adopt(cache, LAYERS, routing_of(model).layout)
    assert adopted is cache
    assert cache.offloading
    assert cache.prefetch_stream is stream
    assert [getattr(layer, "record_past", None) for layer in cache.layers] == [True, None, True, None]


@streams
def test_offloaded_layers_come_back_although_the_layer_before_was_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without a GPU nothing moves; what is seen is that the layer is asked to come back before its keys are extended.
    class Stream:
        wait_stream = __enter__ = lambda self, *_: None
        __exit__ = __enter__

    monkeypatch.setattr(torch.cuda, "default_stream", lambda _: Stream())
    model, prompt, fetched = routed(), ids(2, 4), []
    cache = DynamicCache(config=model.config, offloading=True)
    cache.prefetch_stream = Stream()
    for index, layer in enumerate(cache.layers):
        monkeypatch.setattr(layer, "prefetch", lambda index=index: fetched.append(index))
    with fixed_routes(model, {Site(1, "attention"): False}):
        first = model(input_ids=prompt, past_key_values=cache)
        fetched.clear()
        model(input_ids=ids(2, 1), past_key_values=cache)
    assert torch.isfinite(first.logits).all()
    assert 2 in fetched


@FAMILY
@KIND
@pytest.mark.parametrize("rows", [2, 3])
def test_an_interrupted_prefill_leaves_nothing(family: str, granularity: str, kv_policy: str, rows: int) -> None:
    model, prompt = routed(family, granularity=granularity, kv_policy=kv_policy), ids(rows, 5, seed=3)
    cache = DynamicCache(config=model.config)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    def interrupt() -> None:
        handle = model.model.layers[2].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=ids(2, 7), past_key_values=cache)
        handle.remove()

    interrupt()
    assert any(layer.is_initialized for layer in cache.layers)
    again, fresh = model(input_ids=prompt, past_key_values=cache), model(input_ids=prompt)
    assert torch.equal(again.logits, fresh.logits)
    assert cache.routes == fresh.past_key_values.routes
    cache.reset()
    interrupt()
    with disabled(model):
        dense = model(input_ids=prompt, past_key_values=cache).logits
        assert torch.equal(dense, model(input_ids=prompt).logits)
    assert cache.get_seq_length() == 5


def test_what_is_recorded_for_a_crop_does_not_grow() -> None:
    """Assisted decoding crops after every round; only what came since can be cropped."""
    model = paths(routed(skip_path="linear"))
    sites = routing_of(model).sites
    with torch.no_grad(), fixed_routes(model, dict.fromkeys(sites, False)):
        cache = model(input_ids=ids(2, 9)).past_key_values
        cache.activate_past_recording()
        for round_ in range(5):
            model(input_ids=ids(2, 3, seed=round_), past_key_values=cache)
            cache.crop(-2)
        held = {memory.past[0].shape[1] for _, memory in cache.memories._held.values()}
        assert held == {0}
        kept = torch.cat([ids(2, 9), *(ids(2, 3, seed=round_)[:, :1] for round_ in range(5))], 1)
        whole = model(input_ids=torch.cat([kept, ids(2, 1, seed=9)], 1)).logits[:, -1]
        found = model(input_ids=ids(2, 1, seed=9), past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-4)


def test_a_crop_that_a_window_cannot_undo_is_refused_and_changes_nothing() -> None:
    model, prompt = routed("gemma3"), ids(1, 7)
    with fixed_routes(model, {}):
        cache = model(input_ids=prompt).past_key_values
        before = [layer.keys.clone() for layer in cache.layers]
        with pytest.raises(UnsupportedCacheError, match="activate_past_recording"):
            cache.crop(-2)
    assert cache.seen == 7
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))


def test_rows_that_join_late_can_be_cropped_across_their_window() -> None:
    # Chunked prefill: the only row that executes brings its first real token after more padding than a window holds.
    model, batch = routed("gemma3"), ragged([9, 1])
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    positions, new = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0), ids(2, 1, seed=1)
    with fixed_routes(model, dict.fromkeys(routing_of(model).sites, torch.tensor([False, True]))):
        for start in range(0, 9, 3):
            part = slice(start, start + 3)
            model(
                input_ids=batch["input_ids"][:, part],
                attention_mask=batch["attention_mask"][:, : start + 3],
                position_ids=positions[:, part],
                past_key_values=cache,
            )
        cache.crop(-4)
        mask = torch.tensor([[1] * 6, [0] * 5 + [1]])
        again = model(input_ids=new, attention_mask=mask, position_ids=torch.tensor([[5], [0]]), past_key_values=cache)
    with fixed_routes(model, {}):
        wanted = model(input_ids=new[1:]).logits[:, -1]
    torch.testing.assert_close(again.logits[1:, -1], wanted, atol=1e-4, rtol=1e-4)
