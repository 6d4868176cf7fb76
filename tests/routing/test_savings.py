"""Skipping is real: no kernel of the base module runs for what skips, and the host hardly waits for the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from dynadepth import Site, StaticConfig, attach, disabled, fixed_routes, routing_of, set_budget
from dynadepth.budget import calibrate
from dynadepth.routing import token_kv, token_parts
from small import ALL, FAMILIES, LAYERS, WINDOW, alone, bare, ids, mixed, ragged, routed
from transfers import transfers

FAMILY = pytest.mark.parametrize("family", FAMILIES)
PARTS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.down_proj",
)


@pytest.mark.parametrize("target", ["attention", "mlp", "block"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("granularity", "most"), [("sequence", LAYERS), ("route", 1)])
def test_one_host_transfer_a_site_at_prefill_and_none_at_decode(
    monkeypatch: pytest.MonkeyPatch, target: str, padded: bool, granularity: str, most: int
) -> None:
    """Of whole routes one for all sites."""
    model, dense = routed(target=target, granularity=granularity), bare()
    batch = ragged([6, 2, 4] if padded else [5, 5, 5])
    steps = [batch, {"input_ids": ids(3, 1), "attention_mask": torch.ones(3, batch["input_ids"].shape[1] + 1)}]
    counts = []
    for subject in (dense, model):
        cache = None
        for step in steps:
            with transfers(monkeypatch) as counted:
                cache = subject(**step, past_key_values=cache, use_cache=True).past_key_values
            counts.append(counted.count)
    dense_prefill, dense_decode, prefill, decode = counts
    assert 0 < prefill - dense_prefill <= most
    assert decode == dense_decode
    assert len(set(zip(*cache.routes.values(), strict=True))) > 1


def test_the_counter_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    with transfers(monkeypatch) as counted:
        ones = torch.ones(3)
        ones.tolist(), ones.sum().item(), bool(ones.all()), ones.nonzero(), int(ones[0])
    assert counted.count == 5


def test_known_routes_need_at_most_one_transfer_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, static = bare(), attach(bare(), StaticConfig(skip=(1, 2)))
    counts = []
    for subject in (dense, static):
        with transfers(monkeypatch) as counted:
            subject(**ragged([6, 2, 4]))
        counts.append(counted.count)
    assert counts[1] - counts[0] <= 1


@contextmanager
def kernels(model: Any) -> Iterator[Counter[tuple[int, str]]]:
    """Counts tokens (rows x length) that each projection of each layer computes."""
    seen: Counter[tuple[int, str]] = Counter()
    hooks = []
    for index, layer in enumerate(model.model.layers):
        for part in PARTS:

            def count(module: Any, args: Any, output: Any, key: tuple[int, str] = (index, part)) -> None:
                seen[key] += output.shape[:-1].numel()

            hooks.append(layer.get_submodule(part).register_forward_hook(count))
    yield seen
    for hook in hooks:
        hook.remove()


@FAMILY
@pytest.mark.parametrize("target", ["attention", "mlp", "block"])
def test_skipped_rows_run_nothing_and_store_nothing(family: str, target: str) -> None:
    model, decisions = routed(family, target=target), {Site(s.layer, target): d for s, d in mixed(3).items()}
    decisions[Site(3, target)] = torch.zeros(3, dtype=torch.bool)
    with fixed_routes(model, decisions), kernels(model) as seen:
        cache = model(input_ids=ids(3, 5)).past_key_values
        model(input_ids=ids(3, 1), past_key_values=cache)
    for layer in ALL:
        rows = int(decisions[Site(layer, target)].sum())
        for part in PARTS:
            is_routed = target == "block" or (target == "attention") == part.startswith("self_attn")
            assert seen[layer, part] == 6 * (rows if is_routed else 3)
        if target != "mlp":
            held = cache.layers[layer]
            assert (held.keys.shape[0] if held.is_initialized else 0) == rows


@FAMILY
@pytest.mark.parametrize(
    ("target", "kv_policy"), [("attention", "project"), ("attention", "drop"), ("mlp", "project"), ("block", "drop")]
)
def test_skipped_tokens_run_nothing(family: str, target: str, kv_policy: str) -> None:
    model = routed(family, target=target, granularity="token", kv_policy=kv_policy)
    # As many tokens in each row, so that no row is filled up to the longest.
    execute = torch.tensor([[1, 0, 1, 0, 0, 1], [0, 1, 0, 0, 1, 1]], dtype=torch.bool)
    with fixed_routes(model, dict.fromkeys(routing_of(model).sites, execute)), kernels(model) as seen:
        model(input_ids=ids(2, 6))
    for layer in ALL:
        for part in PARTS:
            is_routed = target == "block" or (target == "attention") == part.startswith("self_attn")
            projected = kv_policy == "project" and part in ("self_attn.k_proj", "self_attn.v_proj")
            assert seen[layer, part] == (6 if is_routed and not projected else 12), part


@FAMILY
@pytest.mark.parametrize("target", ["attention", "block"])
def test_skipped_tokens_of_parts_run_nothing(monkeypatch: pytest.MonkeyPatch, family: str, target: str) -> None:
    monkeypatch.setattr(token_parts, "LEAST", 3)
    model = routed(family, target=target, granularity="token")
    # As many tokens of each row in each part, and none in the middle one.
    execute = torch.tensor([[1, 0, 1, 0, 0, 0, 0, 1], [0, 1, 1, 0, 0, 0, 1, 0]], dtype=torch.bool)
    given = dict.fromkeys(routing_of(model).sites, execute)
    keys: list[int] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def watched(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        keys.append(key.shape[2])
        return plain(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    with torch.no_grad(), fixed_routes(model, given), kernels(model) as seen:
        model(input_ids=ids(2, 8))
    for layer in ALL:
        for part in PARTS:
            is_routed = target == "block" or part.startswith("self_attn")
            projected = part in ("self_attn.k_proj", "self_attn.v_proj")
            assert seen[layer, part] == (6 if is_routed and not projected else 16), part
    sliding = [3, WINDOW + 1] if family == "gemma3" else [3, 8]  # a part of 2 tokens and the window before it
    assert keys == [*sliding, 3, 8] * (LAYERS // 2)


def test_parts_need_no_more_transfers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, counts = routed(granularity="token"), []
    for least in (256, 2):
        monkeypatch.setattr(token_parts, "LEAST", least)
        with torch.no_grad(), transfers(monkeypatch) as counted:
            model(**ragged([9, 4, 7]))
        counts.append(counted.count)
    assert counts[0] == counts[1] > 0


def test_parts_are_for_inference_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where gradients are recorded, what a part has read must not change."""
    monkeypatch.setattr(token_parts, "LEAST", 2)
    model = routed(granularity="token", skip_path="linear")
    batch = ragged([9, 4, 7])
    loss = model(**batch).logits[batch["attention_mask"].bool()].square().mean()
    loss.backward()
    with torch.no_grad():
        again = model(**batch).logits[batch["attention_mask"].bool()].square().mean()
    assert torch.isclose(loss, again)
    assert all(path.write.grad.abs().max() > 0 for path in routing_of(model).paths().values())


@contextmanager
def masks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Of each attention, whether it read a mask."""
    seen: list[bool] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def watched(*args: Any, attn_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        seen.append(attn_mask is not None)
        return plain(*args, attn_mask=attn_mask, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
        yield seen


TARGET = pytest.mark.parametrize("target", ["attention", "block"])


@TARGET
def test_dropped_keys_leave_a_prompt_to_the_causal_kernel(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen tokens of a first forward see one another alone: no mask is read, and the outcome is that of masks."""
    model, tokens = routed(target=target, granularity="token", kv_policy="drop"), ids(2, 9)
    sites = routing_of(model).sites
    execute = torch.tensor([[1, 0, 1, 0, 0, 1, 1, 0, 1], [0, 1, 0, 0, 1, 1, 0, 0, 0]], dtype=torch.bool)
    with fixed_routes(model, dict.fromkeys(sites, execute)), masks(monkeypatch) as seen:
        whole = model(input_ids=tokens).logits
    assert seen == [False] * LAYERS
    cache = None
    with masks(monkeypatch) as seen:
        for cut in (slice(4), slice(4, 9)):  # the second part sees keys that are held, and needs masks
            with fixed_routes(model, dict.fromkeys(sites, execute[:, cut])):
                part = model(input_ids=tokens[:, cut], past_key_values=cache, use_cache=True)
            torch.testing.assert_close(part.logits, whole[:, cut])
            cache = part.past_key_values
    assert seen == [False] * LAYERS + [True] * LAYERS
    monkeypatch.setattr(token_kv, "mask_among", token_kv.causal_mask)
    with fixed_routes(model, dict.fromkeys(sites, execute)):
        torch.testing.assert_close(model(input_ids=tokens).logits, whole)


@TARGET
@pytest.mark.parametrize("rows", [1, 2])
@torch.no_grad()
def test_a_token_behind_holes(target: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sequence's next token sees every key that is held, without a mask; that of a batch needs one."""
    model, tokens = routed(target=target, granularity="token", kv_policy="drop"), ids(rows, 9)
    sites = routing_of(model).sites
    execute = torch.tensor([[1, 0, 1, 0, 0, 1, 1, 0, 1], [0, 1, 0, 0, 1, 1, 0, 0, 1]], dtype=torch.bool)[:rows]
    with fixed_routes(model, dict.fromkeys(sites, execute)):
        whole = model(input_ids=tokens).logits
    with fixed_routes(model, dict.fromkeys(sites, execute[:, :6])):
        cache = model(input_ids=tokens[:, :6], use_cache=True).past_key_values
    for place in (6, 7, 8):
        part = slice(place, place + 1)
        with fixed_routes(model, dict.fromkeys(sites, execute[:, part])), masks(monkeypatch) as seen:
            logits = model(input_ids=tokens[:, part], past_key_values=cache).logits
        torch.testing.assert_close(logits, whole[:, part])
        assert seen == [rows > 1] * (LAYERS if execute[:, part].any() else 0)
    assert cache.reserved_bytes() > cache.kv_bytes()  # room for more, so that no token copies the others


@torch.no_grad()
def test_a_row_left_of_a_ragged_batch_does_not_see_its_empty_slots() -> None:
    model, tokens = routed(granularity="token", kv_policy="drop"), ids(2, 7)
    sites = routing_of(model).sites
    execute = torch.tensor([[0, 0, 1, 0, 0, 1], [0, 1, 0, 1, 1, 1]], dtype=torch.bool)
    logits = []
    for rows in (slice(1), slice(2)):
        with fixed_routes(model, dict.fromkeys(sites, execute[rows])):
            cache = model(input_ids=tokens[rows, :6], use_cache=True).past_key_values
        if rows.stop == 2:
            cache.batch_select_indices(torch.tensor([0]))
        with fixed_routes(model, dict.fromkeys(sites, True)):
            logits.append(model(input_ids=tokens[:1, 6:], past_key_values=cache).logits)
    torch.testing.assert_close(*logits)


@FAMILY
@TARGET
@torch.no_grad()
def test_a_row_left_of_a_ragged_batch_does_not_see_empty_slots(family: str, target: str) -> None:
    model, tokens = routed(family, target=target, granularity="token", kv_policy="drop"), ids(2, 9)
    sites = routing_of(model).sites
    execute = torch.tensor([[1, 0, 1, 0, 0, 1, 1, 0], [0, 1, 0, 0, 0, 1, 0, 0]], dtype=torch.bool)
    found = []
    for rows in (slice(1, 2), slice(2)):
        with fixed_routes(model, dict.fromkeys(sites, execute[rows])):
            cache = model(input_ids=tokens[rows, :8], use_cache=True).past_key_values
        if rows == slice(2):
            cache.batch_select_indices(torch.tensor([1]))
        with fixed_routes(model, dict.fromkeys(sites, True)):
            found.append(model(input_ids=tokens[1:, 8:], past_key_values=cache).logits)
    torch.testing.assert_close(*found)


def test_what_a_crop_and_a_reset_leave_allocated_is_counted() -> None:
    model = routed(granularity="token", kv_policy="drop")
    with torch.no_grad():
        cache = model(input_ids=ids(1, 6), use_cache=True).past_key_values
        cache.activate_past_recording()
        model(input_ids=ids(1, 1), past_key_values=cache)
        roomy = cache.reserved_bytes()
        cache.crop(-1)
    assert cache.reserved_bytes() >= roomy > cache.kv_bytes()
    cache.reset()
    assert cache.reserved_bytes() == 0


@FAMILY
def test_padding_does_not_change_what_is_pooled(family: str) -> None:
    """Bit for bit at the lowest site, in bfloat16, where a sum is rounded once."""
    batch = ragged([7, 5, 3])
    model = routed(family).to(torch.bfloat16)
    lowest = routing_of(model).sites[0]
    padded = model(**batch).depth_logits[lowest]
    for row in range(3):
        assert torch.equal(model(**alone(batch, row)).depth_logits[lowest][0], padded[row])


@pytest.mark.parametrize("granularity", ["sequence", "token"])
def test_a_budget_of_one_asks_no_router_but_in_training(granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = routed(granularity=granularity), ids(2, 6)
    asked = []
    for router in routing_of(model).routers().values():
        router.register_forward_pre_hook(lambda router, _: asked.append(router))
    set_budget(model, attention=1.0)
    with disabled(model):
        dense = model(input_ids=tokens).logits
    assert torch.equal(model(input_ids=tokens).logits, dense)
    assert not asked
    model.train()(input_ids=tokens)
    assert len(asked) == LAYERS
    asked.clear()
    routing_of(model).calibration = None
    calibrate(model.eval(), [{"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}], [0.5])
    assert asked
    asked.clear()
    set_budget(model, attention=0.5)
    model(input_ids=tokens)
    assert len(asked) == LAYERS


def test_a_static_route_asks_no_router_and_pools_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from dynadepth.routing.granularity import PerSequence
    from dynadepth.routing.router import ConstantRouter

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a static route needs neither")

    monkeypatch.setattr(PerSequence, "pool", never)
    monkeypatch.setattr(ConstantRouter, "forward", never)
    model = attach(bare(), StaticConfig(skip=(1, 2)))
    with kernels(model) as seen:
        model.generate(**ragged([5, 2]), max_new_tokens=3, do_sample=False)
        model.train()(input_ids=ids(2, 4))
    assert seen[0, PARTS[0]]
    assert seen[1, "self_attn.q_proj"] == seen[2, "self_attn.q_proj"] == 0  # training too: nothing learns there
