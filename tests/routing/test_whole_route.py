"""Granularity `route`: every site's router is shown what the lowest one sees, and all are asked there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dynadepth import Site, fixed_routes, recording, routing_of, set_budget
from dynadepth.routing.whole_route import PerRoute
from small import ALL, FAMILIES, LAYERS, bare, ids, ragged, routed
from transfers import transfers

FAMILY = pytest.mark.parametrize("family", FAMILIES)
TARGET = pytest.mark.parametrize("target", ["attention", "mlp", "block"])
PADDED = pytest.mark.parametrize("padded", [False, True])


def batch_of(padded: bool) -> dict[str, Any]:
    return ragged([6, 2, 4] if padded else [5, 5, 5])


@FAMILY
@TARGET
@PADDED
@pytest.mark.parametrize("layers", [ALL, ALL[1:]])
def test_every_router_answers_to_the_input_of_the_lowest_site(
    family: str, target: str, padded: bool, layers: tuple[int, ...]
) -> None:
    model, batch = routed(family, target=target, granularity="route", layers=layers), batch_of(padded)
    per_site = routed(family, target=target, layers=layers)
    state = routing_of(per_site).states[Site(layers[0], target)]
    seen: list[torch.Tensor] = []
    state.router.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    outputs = model(**batch)
    per_site(**batch)  # at its lowest site nothing was skipped yet
    for site, router in routing_of(model).routers().items():
        torch.testing.assert_close(outputs.depth_logits[site], router(seen[0]))
        executes = (router(seen[0]) >= router.threshold).tolist()
        assert outputs.depth_trace.routes[site] == executes
    assert len(outputs.depth_logits) == len(layers)


@TARGET
@PADDED
def test_one_host_transfer_a_prefill_and_none_at_decode(
    monkeypatch: pytest.MonkeyPatch, target: str, padded: bool
) -> None:
    model, dense, batch = routed(target=target, granularity="route"), bare(), batch_of(padded)
    steps = [batch, {"input_ids": ids(3, 1), "attention_mask": torch.ones(3, batch["input_ids"].shape[1] + 1)}]
    counts = []
    for subject in (dense, model):
        cache = None
        for step in steps:
            with transfers(monkeypatch) as counted:
                cache = subject(**step, past_key_values=cache, use_cache=True).past_key_values
            counts.append(counted.count)
    assert [counts[2] - counts[0], counts[3] - counts[1]] == [1, 0]
    assert len(set(zip(*cache.routes.values(), strict=True))) > 1


@FAMILY
@pytest.mark.parametrize("target", ["attention", "mlp"])
def test_above_the_lowest_site_what_skips_computes_no_norm(
    family: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = routed(family, target=target, granularity="route"), ragged([5, 2, 4])
    logits = model(**batch).depth_logits[Site(3, target)].sort().values
    for site, router in routing_of(model).routers().items():
        router.threshold.fill_(float("inf") if site.layer in (0, 2) else float("-inf"))
    router.threshold.copy_((logits[0] + logits[1]) / 2)  # of the last site: two rows execute
    norms = [next(p for p in layer.modules() if hasattr(p, "depth_entry")) for layer in model.model.layers]
    computed: list[tuple[Any, int]] = []
    base = type(norms[0]).__mro__[2]  # behind the class in place and its mixin
    plain = base.forward

    def counted(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        computed.append((self, len(hidden)))
        return plain(self, hidden)

    monkeypatch.setattr(base, "forward", counted)
    model(**batch)
    rows = [[n for part, n in computed if part is norm] for norm in norms]
    assert rows == [[3], [3], [], [2]]  # the first one is what all were asked about


def test_training_and_inference_decide_alike() -> None:
    model, batch = routed(granularity="route"), batch_of(True)
    sparse = model(**batch).depth_logits
    masked = model.train()(**batch, labels=batch["input_ids"], prompt_mask=batch["attention_mask"].bool())
    for site, logits in masked.depth_logits.items():
        torch.testing.assert_close(logits, sparse[site])
    assert all(decision.gate is not None for decision in masked.depth_trace.decisions.values())


def test_rows_that_only_bring_padding_decide_later() -> None:
    model, batch = routed(granularity="route"), ragged([8, 3])
    whole = model(**batch)
    cache = None
    for start in (0, 4):
        part = {
            "input_ids": batch["input_ids"][:, start : start + 4],
            "attention_mask": batch["attention_mask"][:, : start + 4],
        }
        cache = model(**part, past_key_values=cache, use_cache=True).past_key_values
    first = model(input_ids=batch["input_ids"][:1, :4])
    for site, rows in cache.routes.items():
        assert rows == [first.depth_trace.routes[site][0], whole.depth_trace.routes[site][1]]


def test_injected_decisions_and_budgets_of_one_look_at_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = routed(granularity="route")

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is asked")

    monkeypatch.setattr(PerRoute, "pool", never)
    with fixed_routes(model, {Site(1, "attention"): False}), recording() as record:
        model(input_ids=ids(2, 5))
    assert record.keep_ratio().routed == 1 - 1 / LAYERS
    set_budget(model, attention=1.0)
    model(input_ids=ids(2, 5))
