"""MindSkip's router and loss against the paper's formulas on examples small enough for a hand, and static routes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from dynadepth import DepthConfig, MindSkipConfig, Site, StaticConfig, attach, fixed_routes, routing_of
from dynadepth.errors import ConfigError
from dynadepth.methods import config_from_dict
from dynadepth.methods.mindskip import LinearRouter
from dynadepth.routing.decision import RoutingDecision, RoutingTrace
from dynadepth.routing.granularity import PerSequence
from dynadepth.routing.router import AbstractRouter
from small import ALL, LAYERS, WIDTH, bare, ids, ragged, routed

A, B = Site(0, "attention"), Site(1, "attention")


def trace_of(gates: dict[Site, Any], mask: Any = None) -> RoutingTrace:
    first = torch.tensor(next(iter(gates.values())))
    tokens = first.shape[1] if first.dim() == 2 else 5
    trace = RoutingTrace(LAYERS, first.shape[0], tokens, None if mask is None else torch.tensor(mask, dtype=torch.bool))
    for site, gate in gates.items():
        value = torch.tensor(gate, dtype=torch.float32)
        trace.record(site, RoutingDecision(value > 0, value, value))
    return trace


def test_the_loss_is_the_papers_formula() -> None:
    # penalty * ReLU(mean gate over sites and units - capacity), Eq. 9; here the mean is (1 + 1 + 0 + 1) / 4.
    config = MindSkipConfig(capacity=0.5, penalty=0.1)
    one = trace_of({A: [1.0], B: [1.0], Site(2, "attention"): [0.0], Site(3, "attention"): [1.0]})
    assert config.depth_loss(one, torch.ones(1)).item() == pytest.approx(0.1 * 0.25)
    # Below capacity the penalty is silent.
    assert config.depth_loss(trace_of({A: [1.0], B: [0.0]}), torch.ones(1)).item() == 0


def test_the_mean_is_taken_per_sequence() -> None:
    # Rows keep 1 and 0 of their sites: together at capacity, apart one is over it.
    config = MindSkipConfig(capacity=0.5, penalty=1.0)
    trace = trace_of({A: [1.0, 0.0], B: [1.0, 0.0]})
    assert config.depth_loss(trace, torch.tensor([0.5, 0.5])).item() == pytest.approx(0.25)
    assert config.depth_loss(trace, torch.tensor([0.25, 0.75])).item() == pytest.approx(0.125)


def test_tokens_count_without_padding_and_sequences_alike() -> None:
    config = MindSkipConfig(granularity="token", capacity=0.25, penalty=1.0)
    gates = {A: [[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]}
    trace = trace_of(gates, mask=[[1, 1, 1, 1], [0, 0, 0, 1]])
    # Means 2/4 and 1/1, not 3/5.
    assert config.depth_loss(trace, torch.tensor([0.5, 0.5])).item() == pytest.approx((0.25 + 0.75) / 2)


def test_without_gates_there_is_no_loss() -> None:
    trace = RoutingTrace(LAYERS, 1, 1)
    trace.record(A, RoutingDecision(torch.ones(1, dtype=torch.bool)))
    assert MindSkipConfig().depth_loss(trace, torch.ones(1)) is None


def test_the_loss_reaches_the_models_loss() -> None:
    tokens = ids(2, 8)
    labels = tokens.masked_fill(torch.arange(8) < 4, -100)
    silent = routed(penalty=0.0).train()(input_ids=tokens, labels=labels)
    model = routed(penalty=0.3, capacity=0.1).train()
    out = model(input_ids=tokens, labels=labels)
    gates = torch.stack([decision.gate for decision in out.depth_trace.decisions.values()])
    wanted = 0.3 * torch.relu(gates.mean(0) - 0.1).mean()
    torch.testing.assert_close(out.depth_loss, wanted)
    torch.testing.assert_close(out.loss, silent.loss + wanted)
    as_tuple = model(input_ids=tokens, labels=labels, return_dict=False)
    torch.testing.assert_close(as_tuple[0], out.loss)


def test_the_router_is_one_float32_vector_and_starts_dense() -> None:
    router = MindSkipConfig().build_router(A, WIDTH)
    assert {name: p.shape for name, p in router.named_parameters()} == {"weight": (WIDTH,)}
    hidden = torch.randn(3, WIDTH)
    decision = router.decide(hidden, with_gate=True)
    assert decision.execute.all()  # sigmoid(0) = 0.5 reaches the threshold of 0.5
    assert torch.equal(decision.gate, torch.ones(3))
    with torch.no_grad():
        router.weight.copy_(torch.arange(WIDTH))
    torch.testing.assert_close(router(hidden), (hidden * torch.arange(WIDTH)).sum(1))
    assert torch.equal(router.decide(hidden, False).execute, torch.sigmoid(router(hidden)) >= 0.5)


def test_the_router_sees_the_routed_modules_own_input() -> None:
    model, tokens = routed(), ids(2, 5)
    inputs = {}
    for layer in ALL:
        module = model.model.layers[layer].self_attn
        module.register_forward_pre_hook(
            lambda _, args, kwargs, layer=layer: inputs.__setitem__(layer, kwargs["hidden_states"]), with_kwargs=True
        )
    out = model(input_ids=tokens)
    for site, logits in out.depth_logits.items():
        pooled = inputs[site.layer].float().mean(1)
        torch.testing.assert_close(logits, pooled @ routing_of(model).routers()[site].weight)


def test_a_bias_is_a_parameter_only_when_asked_for() -> None:
    assert [name for name, _ in MindSkipConfig(bias=True).build_router(A, 3).named_parameters()] == ["weight", "bias"]
    router = LinearRouter(2, bias=True)
    with torch.no_grad():
        router.bias.fill_(-3.0)
    assert torch.equal(router(torch.zeros(4, 2)), torch.full((4,), -3.0))


@pytest.mark.parametrize(
    ("n_layers", "wanted"), [(32, range(15, 31)), (30, range(14, 29)), (4, (1, 2)), (1, (0,)), (2, (0,))]
)
def test_default_layers_are_the_deepest_but_the_last(n_layers: int, wanted: Any) -> None:
    assert MindSkipConfig().default_layers(n_layers) == tuple(wanted)


def test_defaults_are_the_papers() -> None:
    config = MindSkipConfig()
    assert (config.target, config.granularity, config.capacity, config.bias) == ("attention", "sequence", 0.5, False)


# ---- static routes


@pytest.mark.parametrize("target", ["attention", "mlp", "block"])
@pytest.mark.parametrize("granularity", ["sequence", "token"])
def test_a_static_route_is_the_injected_one(target: str, granularity: str) -> None:
    batch = ragged([6, 3])
    static = attach(bare(), StaticConfig(target=target, granularity=granularity, skip=(2, 1)))
    dynamic = routed(target=target, granularity=granularity)
    with fixed_routes(dynamic, {Site(1, target): False, Site(2, target): False}):
        wanted = dynamic(**batch)
        generated = dynamic.generate(**batch, max_new_tokens=4, do_sample=False)
    torch.testing.assert_close(static(**batch).logits, wanted.logits)
    assert torch.equal(static.generate(**batch, max_new_tokens=4, do_sample=False), generated)
    torch.testing.assert_close(static.train()(**batch).logits, wanted.logits)
    assert not [p for router in routing_of(static).routers().values() for p in router.parameters()]


def test_only_what_is_skipped_is_routed() -> None:
    assert [site.layer for site in routing_of(attach(bare(), StaticConfig(skip=(3, 1)))).sites] == [1, 3]


# ---- a new method or granularity is one class, found by its name


# (the classes are made inside the tests: the parity matrix takes in every one that exists when it is collected)


def test_a_new_method_needs_no_list() -> None:
    class ByParity(AbstractRouter):
        def __init__(self, layer: int, offset: int) -> None:
            super().__init__()
            self.layer, self.offset = layer, offset

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden.new_full(hidden.shape[:-1], (-1.0) ** (self.layer + self.offset))

    @dataclass(frozen=True)
    class EveryOther(DepthConfig):
        name = "every-other-of-the-tests"

        offset: int = 0

        def build_router(self, site: Site, hidden_size: int) -> AbstractRouter:
            return ByParity(site.layer, self.offset)

    config = EveryOther(offset=1)
    assert config_from_dict(config.to_dict()) == config
    cache = attach(bare(), config)(input_ids=ids(2, 3)).past_key_values
    assert [cache.routes[Site(layer, "attention")] for layer in ALL] == [[False] * 2, [True] * 2] * 2
    with pytest.raises(ConfigError, match=r"no setting 'ofset'.*Did you mean 'offset'"):
        config_from_dict({"method": EveryOther.name, "ofset": 1})


def test_a_new_granularity_needs_no_list() -> None:
    class FirstToken(PerSequence):
        name = "first-token-of-the-tests"

        def pool(self, hidden: Tensor, context: Any) -> Tensor:
            return hidden[:, 0].float()

    model, tokens = routed(granularity=FirstToken.name), ids(4, 5)
    same_start = torch.cat([tokens[:, :1], ids(4, 4, seed=1)], 1)
    routes = [model(input_ids=t).past_key_values.routes[Site(0, "attention")] for t in (tokens, same_start)]
    assert routes[0] == routes[1]
    assert len(set(routes[0])) == 2
