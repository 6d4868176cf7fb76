"""Training FLOPs by formula against PyTorch's own counter, forward and backward, with eager attention."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dynadepth.methods import config_from_dict
from dynadepth.model import attach, expert_choice
from dynadepth.pretraining.flops import FlopMeter, executed_of
from dynadepth.routed import routing_of
from parity.models import tiny
from small import VOCABULARY, bare

ROWS, TOKENS = 3, 16
MOD = {"method": "mod", "predictor_width": 4}


def vectors(model: torch.nn.Module) -> int:
    """Elements of the routers' single vectors, whose products PyTorch's counter has no formula for."""
    return sum(p.numel() for r in routing_of(model).routers().values() for p in r.parameters() if p.dim() == 1)


def assert_exact(model, method):
    """The meter's figures of a training step are those of torch's counter, and a route spends less than everything."""
    if method:
        attach(model, config_from_dict(method))
    model.train()
    ids = torch.randint(1, VOCABULARY, (ROWS, TOKENS))
    with FlopCounterMode(display=False) as counter:
        outputs = model(input_ids=ids, labels=ids)
        forward = counter.get_total_flops()
        outputs.loss.backward()
    executed = executed_of(getattr(outputs, "depth_trace", None))
    meter, uncounted = FlopMeter(model), ROWS * TOKENS * (vectors(model) if method else 0)
    assert meter.forward(ROWS, TOKENS, executed) - 2 * uncounted == forward
    assert meter.training(ROWS, TOKENS, executed) - 6 * uncounted == counter.get_total_flops()
    if method:
        assert meter.training(ROWS, TOKENS, executed) < meter.training(ROWS, TOKENS)
    return meter


@pytest.mark.parametrize(
    "method",
    [
        {},
        {**MOD, "capacity": 0.125},
        {**MOD, "capacity": 0.5, "every": 1},
        {**MOD, "capacity": 0.3, "sampling": "aux_loss"},
        {**MOD, "capacity": 0.25, "routing": "stochastic"},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_formula_is_the_counter(family, method):
    """Exactly: nothing is counted twice or left out, and what is routed around is not run."""
    torch.manual_seed(0)
    model = bare(family, attn_implementation="eager")
    model.set_attn_implementation("eager")
    meter = assert_exact(model, method)
    if method:
        assert meter.forward(1, TOKENS) > meter.dense(TOKENS) or method.get("routing") == "stochastic"


def test_evaluation_with_the_choice_of_training_costs_a_forward():
    model = bare()
    model.set_attn_implementation("eager")
    attach(model, config_from_dict({**MOD, "capacity": 0.25})).eval()
    ids = torch.randint(1, VOCABULARY, (ROWS, TOKENS))
    with torch.no_grad(), expert_choice(model), FlopCounterMode(display=False) as counter:
        outputs = model(input_ids=ids, use_cache=False)
    executed = executed_of(outputs.depth_trace)
    assert {int(n) for counts in executed.values() for n in counts} == {4}
    expected = FlopMeter(model).forward(ROWS, TOKENS, executed) - 2 * ROWS * TOKENS * vectors(model)
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
@pytest.mark.parametrize(
    "method",
    [
        {},
        {"method": "mode-staged", "capacity": 0.25, "predictor_width": 4},
        {"method": "mode-integrated", "no_ops": 3},
    ],
    ids=lambda method: method.get("method", "moe"),
)
def test_of_experts_those_count_that_compute(family, method):
    torch.manual_seed(0)
    model = tiny(family)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    assert_exact(model, method)
