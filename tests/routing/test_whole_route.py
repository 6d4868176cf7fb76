"""Granularity `route`: every site's router is shown what the lowest one sees, and all are asked there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dynadepth import MindSkipConfig, Site, attach, fixed_routes, load, recording, routing_of, save, set_budget
from dynadepth.methods.mindskip import LinearRouter
from dynadepth.routing.whole_route import PerRoute, decide_each
from small import ALL, FAMILIES, LAYERS, bare, checkpoint, ids, ragged, routed, scatter

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


# ---- how they are asked


def test_one_product_asks_them_all_unless_somebody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    products: list[int] = []
    product = LinearRouter.decide_each

    def counted(routers: Any, hidden: torch.Tensor) -> Any:
        products.append(len(routers))
        return product(routers, hidden)

    monkeypatch.setattr(LinearRouter, "decide_each", staticmethod(counted))
    model, batch = routed(granularity="route"), batch_of(True)
    wanted = model(**batch).depth_logits
    model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert products == [LAYERS, LAYERS]
    heard: list[Any] = []
    routing_of(model).states[Site(2, "attention")].router.register_forward_hook(lambda *args: heard.append(args))
    found = model(**batch).depth_logits
    assert (len(products), len(heard)) == (2, 1)
    for site, logits in wanted.items():
        torch.testing.assert_close(found[site], logits)


@pytest.mark.parametrize("bias", [False, True])
def test_the_product_is_what_each_would_say(bias: bool) -> None:
    model = scatter(attach(bare(), MindSkipConfig(layers=ALL, granularity="route", bias=bias)))
    routers = list(routing_of(model).routers().values())
    hidden = torch.randn(3, routers[0].weight.shape[0])
    for router, decision in zip(routers, decide_each(routers, hidden), strict=True):
        alone = router.decide(hidden, with_gate=False)
        assert torch.equal(decision.logits, alone.logits)
        assert torch.equal(decision.execute, alone.execute)


class Other(LinearRouter):
    """Of another class than its neighbours, with an answer of its own."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) + 5


def test_routers_of_several_classes() -> None:
    model, batch = routed(granularity="route"), batch_of(True)
    before = model(**batch).depth_logits
    routing_of(model).states[Site(1, "attention")].router.__class__ = Other
    for site, logits in model(**batch).depth_logits.items():
        torch.testing.assert_close(logits, before[site] + 5 * (site.layer == 1))


# ---- sites that are not asked beside those that are


def with_a_site_open(lowest: bool, target: str = "attention", family: str = "llama") -> Any:
    """One site's threshold is minus infinity, so that inference need not ask it."""
    model = routed(family, target=target, granularity="route")
    routers = list(routing_of(model).routers().values())
    router = routers[0 if lowest else 2]
    router.threshold.fill_(float("-inf"))
    router.asked = False
    return model


@pytest.mark.parametrize("lowest", [False, True])
def test_saving_changes_no_route(lowest: bool, tmp_path: Any) -> None:
    model, batch = with_a_site_open(lowest), batch_of(True)
    for router in routing_of(model).routers().values():
        router.asked = True
    wanted = model(**batch)
    save(model, tmp_path)
    found = load(bare(), tmp_path)(**batch)
    assert found.depth_trace.routes == wanted.depth_trace.routes
    torch.testing.assert_close(found.logits, wanted.logits)


@FAMILY
@pytest.mark.parametrize("target", ["attention", "mlp"])
@pytest.mark.parametrize("lowest", [False, True])
def test_rows_that_come_late(family: str, target: str, lowest: bool) -> None:
    model, batch = with_a_site_open(lowest, target, family), ragged([8, 3])
    cache, logits = None, []
    for start, stop in ((0, 4), (4, 8)):
        part = {"input_ids": batch["input_ids"][:, start:stop], "attention_mask": batch["attention_mask"][:, :stop]}
        outputs = model(**part, past_key_values=cache, use_cache=True)
        cache, _ = outputs.past_key_values, logits.append(outputs.logits)
    alone = model(input_ids=batch["input_ids"][1:, 5:])
    torch.testing.assert_close(logits[1][1:, 1:], alone.logits, rtol=1e-4, atol=1e-5)


# ---- gradient checkpointing where gradients pass below the lowest site


@pytest.mark.parametrize("target", ["attention", "mlp", "block"])
@pytest.mark.parametrize("layers", [ALL, ALL[1:]])
@pytest.mark.parametrize("skip_path", ["identity", "linear"])
@pytest.mark.parametrize("learning", [True, False], ids=["routers learn", "routers rest"])
def test_checkpointing_of_a_base_that_learns(
    target: str, layers: tuple[int, ...], skip_path: str, learning: bool
) -> None:
    config = {"target": target, "layers": layers, "skip_path": skip_path, "granularity": "route", "penalty": 0.1}
    batch = {**batch_of(True), "prompt_mask": torch.arange(6).expand(3, -1) < 5}
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    gradients = []
    for checkpointing in (False, True):
        model = routed(**config).train().requires_grad_(True)
        for router in routing_of(model).routers().values():
            router.requires_grad_(learning)
        if checkpointing:
            checkpoint(model, {"use_reentrant": False})
        model(**batch).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, replayed = gradients
    assert plain.keys() == replayed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(replayed[name], gradient, rtol=1e-4, atol=1e-6)
