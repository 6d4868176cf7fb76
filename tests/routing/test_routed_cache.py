"""`RoutedCache` as a set of logical rows: random reorderings, selections, repetitions and crops against a slow one.

The slow one keeps, for each logical row, its tokens and the route that its prompt got when it was prefilled
alone; what a row must answer next is a fresh forward of those tokens under that route, without any cache.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from dynadepth import Site, StaticConfig, attach, fixed_routes, routing_of
from dynadepth.errors import UnsupportedCacheError
from dynadepth.routing import roomy
from dynadepth.routing.cache import RoutedCache
from dynadepth.routing.sparse_layer import SparseLayer
from small import ALL, FAMILIES, KINDS, LAYERS, WINDOW, bare, ids, mixed, paths, ragged, routed

KIND = pytest.mark.parametrize(("granularity", "kv_policy"), KINDS)
SKIP_PATH = pytest.mark.parametrize("skip_path", ["identity", "linear"])
FAMILY = pytest.mark.parametrize("family", FAMILIES)
SITE_BYTES = 2 * 1 * 8 * 4  # keys and values, one head of 8 float32


@dataclass(frozen=True)
class Row:
    padding: int
    tokens: tuple[int, ...]
    route: tuple[bool, ...]


class Rows:
    """Logical rows beside the cache under test."""

    def __init__(self, model: Any, lengths: list[int], cache: DynamicCache) -> None:
        self.model, self.cache, self.sites = model, cache, routing_of(model).sites
        self.sticky, self.since_crop = routing_of(model).granularity.sticky, 10**6
        batch = ragged(lengths)
        self.rows = []
        for tokens, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
            routes = model(input_ids=tokens[None, mask]).past_key_values.routes
            route = tuple(routes[site][0] for site in self.sites) if self.sticky else ()
            self.rows.append(Row(int((~mask).sum()), tuple(tokens[mask].tolist()), route))
        self.check(batch["input_ids"])
        self.cache.activate_past_recording()  # again: an ordinary cache without windows does not note it
        assert isinstance(self.cache, RoutedCache)
        if routing_of(model).paths():
            self.since_crop = 0

    def check(self, new: Tensor) -> None:
        """Runs new tokens `[rows, t]`, already part of the rows, and compares every row's last logits."""
        longest = len(self.rows[0].tokens) + self.rows[0].padding
        mask = torch.tensor([[0] * row.padding + [1] * len(row.tokens) for row in self.rows])
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, longest - new.shape[1] :]
        found = self.model(input_ids=new, attention_mask=mask, position_ids=positions, past_key_values=self.cache)
        assert self.cache.get_seq_length() == longest
        if self.sticky:
            assert [list(route) for route in zip(*(row.route for row in self.rows), strict=True)] == [
                self.cache.routes[site] for site in self.sites
            ]
        answers = {row: self.answer(row) for row in set(self.rows)}
        wanted = torch.stack([answers[row] for row in self.rows])
        torch.testing.assert_close(found.logits[:, -1], wanted, atol=2e-4, rtol=2e-4)

    def answer(self, row: Row) -> Tensor:
        tokens = torch.tensor([row.tokens])
        if not self.sticky:
            return self.model(input_ids=tokens, use_cache=False).logits[0, -1]
        with fixed_routes(self.model, dict(zip(self.sites, row.route, strict=True))):
            return self.model(input_ids=tokens, use_cache=False).logits[0, -1]

    def step(self, seed: int) -> None:
        new = ids(len(self.rows), 1 + seed % 2, seed)
        self.since_crop += new.shape[1]
        extended = zip(self.rows, new.tolist(), strict=True)
        self.rows = [Row(row.padding, row.tokens + tuple(more), row.route) for row, more in extended]
        self.check(new)

    # ---- the operations under test

    def reorder(self, seed: int) -> None:
        order = torch.randint(len(self.rows), (len(self.rows),), generator=torch.Generator().manual_seed(seed))
        self.cache.reorder_cache(order)
        self.rows = [self.rows[i] for i in order]

    def select(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randint(-len(self.rows), len(self.rows), (1 + seed % 4,), generator=generator)
        self.cache.batch_select_indices(order)
        self.rows = [self.rows[i] for i in order]

    def mask(self, seed: int) -> None:
        keep = torch.rand(len(self.rows), generator=torch.Generator().manual_seed(seed)) < 0.6
        keep[seed % len(self.rows)] = True
        self.cache.batch_select_indices(keep)
        self.rows = [row for row, kept in zip(self.rows, keep, strict=True) if kept]

    def repeat(self, seed: int) -> None:
        if len(self.rows) < 5:
            self.cache.batch_repeat_interleave(2)
            self.rows = [row for row in self.rows for _ in range(2)]

    def crop(self, seed: int) -> None:
        count = min(1 + seed % 5, min(len(row.tokens) for row in self.rows) - 1)
        try:
            self.cache.crop(-count)
        except UnsupportedCacheError:  # windows remember what came since the last crop; the rows are as before
            assert count > self.since_crop
            return
        self.since_crop = 0
        if count:
            self.rows = [Row(row.padding, row.tokens[:-count], row.route) for row in self.rows]

    def copied(self, seed: int) -> None:
        self.cache = copy.deepcopy(self.cache)


OPERATIONS = st.sampled_from(["reorder", "select", "mask", "repeat", "crop", "copied", "step"])


@FAMILY
@KIND
@SKIP_PATH
def test_rows_survive_whatever_is_done_to_the_cache(
    family: str, granularity: str, kv_policy: str, skip_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = routed(family, granularity=granularity, kv_policy=kv_policy, skip_path=skip_path).requires_grad_(False)

    monkeypatch.setattr(roomy, "CHUNK", 3)

    @torch.no_grad()  # with gradients a cache keeps no room
    @settings(max_examples=15, deadline=None, derandomize=True, database=None)
    @given(
        st.lists(st.integers(1, 6), min_size=1, max_size=4),
        st.lists(st.tuples(OPERATIONS, st.integers(0, 99)), min_size=1, max_size=5),
    )
    def check(lengths: list[int], operations: list[tuple[str, int]]) -> None:
        cache = DynamicCache(config=model.config)
        cache.activate_past_recording()
        rows = Rows(model, lengths, cache)
        for name, seed in operations:
            getattr(rows, name)(seed)
            if name != "step":
                rows.step(seed)

    check()


@KIND
@SKIP_PATH
def test_a_uniform_batch_is_reordered_too(granularity: str, kv_policy: str, skip_path: str) -> None:
    # All rows on one route: no layer holds some of the rows, and the order stays on the device.
    model = routed(granularity=granularity, kv_policy=kv_policy, skip_path=skip_path)
    prompt, order, new = ids(3, 5), torch.tensor([2, 0, 0]), ids(3, 1, seed=1)
    with fixed_routes(model, {Site(2, "attention"): False}):
        cache = model(input_ids=prompt).past_key_values
        cache.reorder_cache(order)
        found = model(input_ids=new, past_key_values=cache).logits[:, -1]
        wanted = model(input_ids=torch.cat([prompt[order], new], 1)).logits[:, -1]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_rows_of_a_layer_left_without_keys_follow() -> None:
    # Every executed token is cropped away, then the rows are repeated: a layer without slots must still know its rows.
    model, prompt = routed(granularity="token", kv_policy="drop"), ids(2, 4)
    only_last = torch.tensor([[False, False, False, True]]).expand(2, -1)
    with fixed_routes(model, dict.fromkeys(routing_of(model).sites, only_last)):
        cache = model(input_ids=prompt).past_key_values
    cache.crop(-1)
    assert cache.kv_bytes() == 0
    cache.batch_repeat_interleave(2)
    new = ids(4, 1, seed=1)
    with fixed_routes(model, {}):
        found = model(input_ids=new, past_key_values=cache).logits[:, -1]
    whole = torch.cat([prompt.repeat_interleave(2, 0)[:, :3], new], 1)
    with fixed_routes(model, dict.fromkeys(routing_of(model).sites, only_last.repeat(2, 1))):
        wanted = model(input_ids=whole).logits[:, -1]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@KIND
def test_deepcopies_go_separate_ways(granularity: str, kv_policy: str) -> None:
    model = routed(granularity=granularity, kv_policy=kv_policy)
    cache = model(**ragged([5, 2])).past_key_values
    twin, seen, routes = copy.deepcopy(cache), cache.seen, {s: list(r) for s, r in cache.routes.items()}
    model(input_ids=ids(2, 3), past_key_values=twin)
    twin.batch_select_indices(torch.tensor([1]))
    assert (cache.seen, cache.routes) == (seen, routes)
    assert twin.seen == seen + 3
    one = model(input_ids=ids(2, 1, seed=5), past_key_values=cache).logits
    assert one.shape[0] == 2


# ---- bytes


@FAMILY
def test_kv_bytes_are_those_of_executed_rows(family: str) -> None:
    model, tokens = routed(family), 7
    with fixed_routes(model, mixed(3)):
        cache = model(input_ids=ids(3, tokens)).past_key_values
    held = [min(tokens, WINDOW - 1) if family == "gemma3" and layer % 2 == 0 else tokens for layer in ALL]
    executed = [sum(mixed(3)[Site(layer, "attention")].tolist()) for layer in ALL]
    assert (
        cache.kv_bytes()
        == cache.reserved_bytes()
        == SITE_BYTES * sum(h * n for h, n in zip(held, executed, strict=True))
    )
    assert 0 < sum(executed) < 3 * LAYERS


@FAMILY
def test_kv_bytes_under_drop_are_those_of_executed_tokens_within_the_window(family: str) -> None:
    model = routed(family, granularity="token", kv_policy="drop")
    execute = torch.rand(3, 20, generator=torch.Generator().manual_seed(0)) < 0.5
    given_ = dict.fromkeys(routing_of(model).sites, execute)
    with fixed_routes(model, given_):
        cache = model(input_ids=ids(3, 20)).past_key_values
    full, window = int(execute.sum()), int(execute[:, 20 - WINDOW + 1 :].sum())
    sites = (window + full + window + full) if family == "gemma3" else LAYERS * full
    assert cache.kv_bytes() == SITE_BYTES * sites <= cache.reserved_bytes()


def test_sliding_layers_under_drop_do_not_grow_for_ever() -> None:
    model, new = routed("gemma3", granularity="token", kv_policy="drop"), ids(2, 30)
    cache = DynamicCache(config=model.config)
    for step in range(30):
        found = model(input_ids=new[:, step : step + 1], past_key_values=cache).logits[:, -1]
    assert isinstance(cache.layers[0], SparseLayer)
    assert cache.layers[0].keys.shape[2] <= 2 * WINDOW + 1
    torch.testing.assert_close(found, model(input_ids=new).logits[:, -1], atol=1e-4, rtol=1e-4)


def test_what_a_skip_path_forgot_cannot_be_taken_back() -> None:
    model = routed(skip_path="linear")
    with fixed_routes(model, {Site(1, "attention"): False}):
        cache = model(input_ids=ids(2, 5)).past_key_values
        with pytest.raises(UnsupportedCacheError, match="skip paths of this cache have forgotten"):
            cache.crop(-1)
        assert cache.get_seq_length() == 5


def test_a_skip_path_remembers_no_more_after_a_thousand_tokens() -> None:
    model = routed(skip_path="linear", skip_rank=3)
    with fixed_routes(model, dict.fromkeys(routing_of(model).sites, False)), torch.no_grad():
        cache = model(input_ids=ids(2, 5)).past_key_values
        held = cache.memories.bytes()
        assert held == LAYERS * 2 * (2 * 3 + 1) * 4
        for _ in range(3):
            cache = model(input_ids=ids(2, 30), past_key_values=cache).past_key_values
        assert cache.memories.bytes() == held
        assert cache.kv_bytes() == 0
        cache.reset()
        assert cache.memories.bytes() == 0


def test_rows_that_began_in_a_later_chunk_leave_nothing_where_they_execute() -> None:
    model = paths(attach(bare(), StaticConfig(skip=(1, 2), layers=ALL, skip_path="linear")))
    batch, options = ragged([2, 3, 2]), {"max_new_tokens": 3, "num_beams": 2, "do_sample": False}
    whole = model.generate(**batch, **options)
    assert torch.equal(model.generate(**batch, **options, prefill_chunk_size=1), whole)


def test_when_the_rows_that_skip_are_gone_the_others_can_be_reordered() -> None:
    model, site = routed(skip_path="linear"), Site(1, "attention")
    with fixed_routes(model, {site: [True, False]}), torch.no_grad():
        cache = model(input_ids=ids(2, 4)).past_key_values
        cache.batch_select_indices(torch.tensor([0]))
        cache.reorder_cache(torch.tensor([0]))
        assert cache.routes[site] == [True]
        assert cache.memories.bytes() == 0


def test_a_mixed_route_found_in_inference_mode_serves_a_step_with_gradients() -> None:
    model = routed(skip_path="linear")
    model.requires_grad_(True)
    with fixed_routes(model, {site: [True, False] for site in routing_of(model).sites}):
        with torch.inference_mode():
            cache = model(input_ids=ids(2, 4)).past_key_values
        model(input_ids=ids(2, 1), past_key_values=cache)
