"""Caches with room for the tokens to come hold what transformers' own hold, whatever is done to them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from dynadepth import fixed_routes
from dynadepth.routing import roomy
from dynadepth.routing.roomy import Room, make_plain, make_roomy
from small import FAMILIES, WINDOW, bare, ids, mixed, ragged, routed

FAMILY = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def small_rooms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roomy, "CHUNK", 3)  # rooms fill up on the way


def layer(kind: type) -> Any:
    return kind(WINDOW) if kind is DynamicSlidingWindowLayer else kind()


def roomy_layer(kind: type) -> Any:
    cache = DynamicCache()
    cache.layers = [layer(kind)]
    make_roomy(cache)
    assert isinstance(cache.layers[0], Room)
    return cache.layers[0]


def states(tokens: int, seed: int) -> Tensor:
    return torch.randn(2, 1, tokens, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", [DynamicLayer, DynamicSlidingWindowLayer])
@pytest.mark.parametrize(
    "events",
    [
        [5, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 2, 1, 5, 1, 1],
        [3, 1, "reorder", 1, 1, 1, 1, "select", 1, "repeat", 1, 1],
        ["record", 3, 1, 1, "crop", 1, 1, 1, 1, "crop", 1],
        [2, 1, 1, "reset", 4, 1, 1],
    ],
    ids=str,
)
@torch.no_grad()
def test_a_layer_with_room_holds_what_the_plain_one_holds(kind: type, events: list[Any]) -> None:
    plain, with_room = layer(kind), roomy_layer(kind)
    for seed, event in enumerate(events):
        if isinstance(event, int):
            rows = plain.keys.shape[0] if plain.is_initialized else 2
            new = [states(event, seed + 100 * i)[:1].expand(rows, -1, -1, -1) for i in (0, 1)]
            given = [one.update(*new) for one in (plain, with_room)]
            assert all(torch.equal(a, b) for a, b in zip(*given, strict=True))
        else:
            for one in (plain, with_room):
                {
                    "reorder": lambda one: one.reorder_cache(torch.tensor([1, 0])),
                    "select": lambda one: one.batch_select_indices(torch.tensor([1])),
                    "repeat": lambda one: one.batch_repeat_interleave(3),
                    "record": lambda one: getattr(one, "activate_past_recording", lambda: None)(),
                    "crop": lambda one: one.crop(-2),
                    "reset": lambda one: one.reset(),
                }[event](one)
        if plain.is_initialized:
            assert torch.equal(plain.keys, with_room.keys)
            assert torch.equal(plain.values, with_room.values)
        assert plain.get_seq_length() == with_room.get_seq_length()
        assert plain.get_mask_sizes(1) == with_room.get_mask_sizes(1)


@torch.no_grad()
def test_a_token_is_written_into_its_place() -> None:
    one = roomy_layer(DynamicLayer)
    one.update(states(4, 0), states(4, 1))
    assert one.spare_bytes() == 0  # a prefill alone reserves nothing
    one.update(states(1, 2), states(1, 3))
    address, spare = one.keys.data_ptr(), one.spare_bytes()
    assert spare == 2 * 2 * 8 * 4 * 4  # keys and values, rows, head size, places, float32
    one.update(states(1, 4), states(1, 5))
    assert one.keys.data_ptr() == address
    assert one.spare_bytes() == spare * 3 // 4


@torch.no_grad()
def test_what_was_handed_out_is_never_overwritten() -> None:
    one = roomy_layer(DynamicLayer)
    one.update(states(4, 0), states(4, 1))
    for seed in range(2, 5):
        seen, _ = one.update(states(1, seed), states(1, seed))
    before = seen.clone()
    one.crop(-2)
    one.update(states(1, 9), states(1, 9))  # takes the place of a token that `seen` shows
    assert torch.equal(seen, before)


@torch.no_grad()
def test_a_copy_fills_room_of_its_own() -> None:
    one = roomy_layer(DynamicLayer)
    one.update(states(4, 0), states(4, 1))
    one.update(states(1, 2), states(1, 2))
    other = copy.deepcopy(one)
    keys, _ = one.update(states(1, 3), states(1, 3))
    other.update(states(1, 4), states(1, 4))
    assert torch.equal(keys[:, :, -1:], states(1, 3))


def test_gradients_go_through_as_in_the_plain_layer() -> None:
    one = roomy_layer(DynamicLayer)
    with torch.no_grad():
        one.update(states(4, 0), states(4, 1))
        one.update(states(1, 2), states(1, 2))
    new = states(1, 3).requires_grad_()
    keys, _ = one.update(new, new)
    keys.sum().backward()
    assert torch.equal(new.grad, torch.ones_like(new))


@torch.no_grad()
def test_room_made_in_inference_mode_is_left_outside_it() -> None:
    one = roomy_layer(DynamicLayer)
    with torch.inference_mode():
        one.update(states(4, 0), states(4, 1))
        one.update(states(1, 2), states(1, 2))
    keys, _ = one.update(states(1, 3), states(1, 3))
    assert keys.shape[2] == 6
    assert not keys.is_inference()


def test_an_empty_layer_becomes_plain_again() -> None:
    for kind in (DynamicLayer, DynamicSlidingWindowLayer):
        one = roomy_layer(kind)
        make_plain(one)
        assert type(one) is kind
        assert not vars(one).keys() & {"_room", "_lent", "_start"}


@FAMILY
def test_generation_with_room_is_that_without(family: str) -> None:
    model, batch = bare(family), ragged((3, 7, 5))
    expected = model.generate(**batch, max_new_tokens=12, do_sample=False)
    cache = DynamicCache(config=model.config)
    make_roomy(cache)
    assert torch.equal(model.generate(**batch, past_key_values=cache, max_new_tokens=12, do_sample=False), expected)


@FAMILY
def test_a_routed_cache_counts_its_room_apart(family: str) -> None:
    model = routed(family)
    with torch.no_grad():
        cache = model(input_ids=ids(2, 5)).past_key_values
        for seed in range(2):
            model(input_ids=ids(2, 1, seed), past_key_values=cache)
    held = [one for one in cache.layers if one.is_initialized]
    assert cache.kv_bytes() == sum(t.numel() * t.element_size() for one in held for t in (one.keys, one.values))
    spare = sum(one.spare_bytes() for one in held)
    assert spare > 0
    assert cache.reserved_bytes() == cache.kv_bytes() + spare


@pytest.mark.parametrize("routes", [{}, mixed(4)], ids=["alike", "mixed"])
def test_rows_that_change_places_leave_their_room_at_once(routes: dict[Any, Any]) -> None:
    """Beams are reordered at every step: old rooms of all layers would be held beside the new keys of all."""
    model = routed()
    with torch.no_grad(), fixed_routes(model, routes):
        cache = model(input_ids=ids(4, 9)).past_key_values
        model(input_ids=ids(4, 1), past_key_values=cache)
        assert cache.reserved_bytes() > cache.kv_bytes()
        cache.reorder_cache(torch.tensor([1, 0, 3, 2]))
        assert cache.reserved_bytes() == cache.kv_bytes()
        model(input_ids=ids(4, 1), past_key_values=cache)
        cache.batch_select_indices(torch.tensor([0, 2]))
        assert cache.reserved_bytes() == cache.kv_bytes() > 0
        model(input_ids=ids(2, 1), past_key_values=cache)


def test_cached_steps_are_differentiable_when_queries_alone_learn() -> None:
    model = routed()
    model.requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    outputs = model(input_ids=ids(2, 5))
    logits = [outputs.logits[:, -1]]
    for step in range(3):
        outputs = model(input_ids=ids(2, 1, seed=step), past_key_values=outputs.past_key_values)
        logits.append(outputs.logits[:, -1])
    torch.stack(logits).logsumexp(-1).sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
