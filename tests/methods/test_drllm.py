"""Dr.LLM's routers: three actions on windows of the prompt, their loss, and the control that shifts them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dynadepth import DrLLMConfig, StaticConfig, attach, load, recording, routing_of, save, set_budget, set_control
from dynadepth.benchmark.latency import execute_all_copy
from dynadepth.budget import calibrate
from dynadepth.cost import router_flops
from dynadepth.errors import BudgetError, ConfigError
from dynadepth.methods.drllm import class_weights, focal_loss
from dynadepth.routing.windows import pool_windows
from small import ALL, LAYERS, bare, ragged

PADDED = ragged([9, 4, 14, 7, 11, 5])


def routed(seed: int = 0, **settings):
    torch.manual_seed(seed)
    model = attach(bare(), DrLLMConfig(**{"hidden": 6, "windows": 3, **settings}))
    with torch.no_grad():
        for router in routing_of(model).routers().values():
            for parameter in router.parameters():
                parameter.mul_(4).add_(0.5 * torch.randn_like(parameter))
    return model


def passes(model):
    with torch.no_grad(), recording() as record:
        model(**PADDED)
    return record


def test_the_papers_router():
    config = DrLLMConfig()
    router = config.build_router(None, 576)
    assert (config.hidden, config.windows, config.routed_layers(4)) == (128, 8, ALL)
    assert [p.shape for p in router.parameters()] == [(128, 576), (128,), (3, 128), (3,)]
    assert not any(layer.bias.any() for layer in (router.inner, router.outer))
    limit = math.sqrt(6 / (576 + 128))  # Xavier, uniform
    assert 0.95 * limit < router.inner.weight.abs().max() <= limit
    states = torch.randn(2, 8, 576)
    by_window = torch.stack([router.outer(nn.functional.gelu(router.inner(states[:, w]))) for w in range(8)])
    torch.testing.assert_close(router(states), by_window.mean(0))


def test_the_length_of_a_state_may_be_left_out():
    states = torch.randn(2, 3, 16)
    for unit in (False, True):
        router = DrLLMConfig(hidden=6, windows=3, unit_input=unit).build_router(None, 16)
        torch.nn.init.normal_(router.inner.bias)
        assert torch.allclose(router(states), router(50 * states), atol=1e-4) == unit


def test_the_likeliest_action_is_taken():
    router = routing_of(routed()).routers().popitem()[1]
    states = torch.randn(200, 3, 16, generator=torch.Generator().manual_seed(1))
    decision = router.decide(states, with_gate=False)
    assert torch.equal(decision.times, router(states).argmax(-1))
    assert set(decision.times.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("length", [3, 8, 13, 16, 21])
def test_windows_are_contiguous_and_leave_out_the_rest(length):
    hidden = torch.randn(1, length, 4)
    size = length // 8
    if size:
        wanted = torch.stack([hidden[:, w * size : (w + 1) * size].mean(1) for w in range(8)], 1)
    else:
        wanted = hidden[:, [w * length // 8 for w in range(8)]]
    torch.testing.assert_close(pool_windows(hidden, None, 8), wanted)
    for left, right in ((5, 0), (0, 5), (2, 3)):
        nan = torch.full((1, 1, 4), torch.nan)
        padded = torch.cat([nan.expand(-1, left, -1), hidden, nan.expand(-1, right, -1)], 1)
        mask = torch.zeros(1, padded.shape[1], dtype=torch.bool)
        mask[:, left : left + length] = True
        torch.testing.assert_close(pool_windows(padded, mask, 8), wanted)


def test_weights_by_effective_numbers():
    weights = class_weights(torch.tensor([4399, 120956, 1457]), 0.999)  # the paper's classes
    raw = [(1 - 0.999) / (1 - 0.999**n) for n in (4399, 120956, 1457)]
    assert weights.tolist() == pytest.approx([3 * w / sum(raw) for w in raw])
    assert class_weights(torch.tensor([10, 30, 0]), 0.0).tolist() == [1, 1, 0]


def test_focal_loss_is_weighted_cross_entropy_at_zero_and_forgets_the_sure_ones():
    actions = torch.tensor([[2.0, 0.0, -1.0], [0.0, 3.0, 0.0]])
    labels, weights = torch.tensor([0, 2]), torch.tensor([0.5, 1.0, 2.0])
    ce = nn.functional.cross_entropy(actions, labels, reduction="none")
    torch.testing.assert_close(focal_loss(actions, labels, weights, 0.0), (ce * weights[labels]).mean())
    p = (-ce).exp()
    torch.testing.assert_close(focal_loss(actions, labels, weights, 2.0), (ce * weights[labels] * (1 - p) ** 2).mean())


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_loss_learns_from_sure_ones_too(gamma):
    actions = torch.tensor([[200.0, 0.0, 0.0], [0.0, 200.0, 0.0]], requires_grad=True)
    focal_loss(actions, torch.tensor([0, 2]), torch.ones(3), gamma).backward()
    assert actions.grad.isfinite().all()
    assert actions.grad[1].any(), "a wrong one that is sure"


def test_the_control_trades_skips_for_executions():
    model = routed()
    own = passes(model)
    kept = []
    for control in (-1, -0.5, 0, 0.5, 1):
        set_control(model, control)
        assert routing_of(model).control == control
        kept.append(passes(model).keep_ratio().routed)
    assert kept == sorted(kept, reverse=True)
    assert (kept[0], kept[-1]) == (1.0, 0.0)
    assert 0 < kept[2] < 1
    assert kept[2] == own.keep_ratio().routed
    set_control(model, -1)
    assert passes(model).depth() > LAYERS, "layers still repeat where none is skipped"
    set_control(model, 0.5)
    with torch.no_grad():
        logits = model(**PADDED).depth_logits
    skipped = [route[site] == 0 for route in passes(model).sequences for site in logits]
    probabilities = torch.stack([torch.sigmoid(logit) for logit in logits.values()], 1).flatten()
    assert skipped == (probabilities < 0.75).tolist()


def test_controls_that_cannot_be():
    with pytest.raises(BudgetError, match=r"between -1 and 1, not 1\.5"):
        set_control(routed(), 1.5)
    with pytest.raises(BudgetError, match="static route has no probabilities"):
        set_control(attach(bare(), StaticConfig(target="block", skip=(1,))), 0.1)


def test_budgets_and_controls_are_saved_and_the_latest_counts(tmp_path):
    model = routed()
    calibrate(model, [PADDED], (0.5, 0.75))
    set_control(model, 0.25)
    set_budget(model, block=0.75)
    assert (routing_of(model).control, routing_of(model).budget) == (None, 0.75)
    set_control(model, -0.25)
    save(model, tmp_path)
    again = load(bare(), tmp_path)
    assert (routing_of(again).control, routing_of(again).budget) == (-0.25, None)
    assert passes(again).sequences == passes(model).sequences
    assert {count for route in passes(again).sequences for count in route.values()} == {0.0, 1.0, 2.0}
    set_control(model, -1)
    save(model, tmp_path)
    assert passes(load(bare(), tmp_path)).depth() == passes(model).depth() > LAYERS


def test_routers_stay_float32_and_their_cost_is_counted():
    model = routed().to(torch.bfloat16)
    assert {p.dtype for r in routing_of(model).routers().values() for p in r.parameters()} == {torch.float32}
    states = torch.randn(1, 3, 16)
    with FlopCounterMode(display=False) as counter:
        for router in routing_of(model).routers().values():
            router(states)
    assert router_flops(model, 12) == counter.get_total_flops()
    assert router_flops(model, 1, past=12) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "attention"}, "Only whole layers can repeat.*not 'attention', 'sequence' and 'identity'"),
        ({"granularity": "token"}, "Only whole layers can repeat"),
        ({"skip_path": "linear"}, "Only whole layers can repeat"),
        ({"hidden": 0}, "hidden must be a whole number of at least 1, not 0"),
        ({"windows": 2.5}, "windows must be a whole number of at least 1, not 2.5"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ConfigError, match=message):
        DrLLMConfig(**settings)


def test_a_static_route_repeats():
    model = attach(bare(), StaticConfig(target="block", skip=(1,), repeat=(0, 2)))
    record = passes(model)
    assert {site.layer: count for site, count in record.site_passes().items()} == {0: 2, 1: 0, 2: 2}
    assert record.depth() == 5
    with pytest.raises(ConfigError, match=r"layers \[1\] are named by skip and by repeat"):
        StaticConfig(target="block", skip=(1,), repeat=(1,))
    with pytest.raises(ConfigError, match="Only whole layers can repeat"):
        StaticConfig(repeat=(1,))
    with pytest.raises(ConfigError, match="leave repeat"):
        StaticConfig(target="block", order=(1, 2), repeat=(3,))


def test_a_budget_of_one_executes_every_layer_once_in_training_too():
    model = routed()
    batch = ragged([5, 3, 4])
    set_budget(model, block=1.0)
    with torch.no_grad(), recording() as record:
        sparse = model(**batch).logits
    assert set(record.site_passes().values()) == {1.0}
    with torch.no_grad(), recording() as record:
        masked = model.train()(**batch).logits
    assert set(record.site_passes().values()) == {1.0}
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(masked[real], sparse[real])


def test_the_benchmark_of_executing_everything_asks_and_repeats_nothing():
    model = execute_all_copy(routed())
    with torch.no_grad(), recording() as record:
        trace = model(**ragged([5, 3, 4])).depth_trace
    assert set(record.site_passes().values()) == {1.0}
    assert len(trace.logits) == LAYERS
