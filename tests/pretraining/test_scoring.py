"""Held-out loss: the model's own, in both units and with both decisions; and the order in which text is read."""

import math

import numpy as np
import pytest
import torch

from dynadepth.methods import config_from_dict
from dynadepth.methods.mod import agreement
from dynadepth.model import attach, expert_choice
from dynadepth.pretraining.scoring import losses
from dynadepth.pretraining.trainer import Windows
from small import VOCABULARY, bare

WINDOWS = np.random.default_rng(0).integers(1, VOCABULARY, (5, 16))
SIZES = np.arange(VOCABULARY) % 4


def mod(**settings):
    torch.manual_seed(0)
    return attach(bare(), config_from_dict({"method": "mod", "capacity": 0.25, "predictor_width": 4, **settings}))


def test_the_loss_is_the_models_own_in_nats_and_in_bits_a_byte():
    model, ids = bare(), torch.as_tensor(WINDOWS)
    found = losses(model, WINDOWS, SIZES, rows=2)
    assert set(found) == {"causal"}
    with torch.no_grad():
        own = float(model(input_ids=ids, labels=ids).loss)
    loss = found["causal"]
    assert loss.nats == pytest.approx(own, rel=1e-5)
    assert loss.tokens == 5 * 15
    n_bytes = SIZES[WINDOWS[:, 1:]].sum()
    assert loss.bits_per_byte == pytest.approx(own * loss.tokens / math.log(2) / n_bytes, rel=1e-5)
    assert loss.accuracy is loss.executed is None


def test_both_decisions_and_how_often_they_agree():
    model, ids = mod(), torch.as_tensor(WINDOWS)
    found = losses(model, WINDOWS, SIZES, rows=2)
    model.eval()
    with torch.no_grad():
        causal = model(input_ids=ids, labels=ids, use_cache=False)
        with expert_choice(model):
            top = model(input_ids=ids, labels=ids, use_cache=False)
    assert found["causal"].nats == pytest.approx(float(causal.loss), rel=1e-5)
    assert found["top_k"].nats == pytest.approx(float(top.loss), rel=1e-5)
    assert found["causal"].nats != found["top_k"].nats
    assert found["top_k"].executed == 0.25
    assert found["top_k"].accuracy == pytest.approx(float(agreement(top.depth_trace).mean()))
    executed = torch.stack([d.execute.float().mean() for d in causal.depth_trace.decisions.values()])
    assert found["causal"].executed == pytest.approx(float(executed.mean()))


def test_scoring_leaves_no_trace():
    model = mod(routing="stochastic").train()
    torch.manual_seed(5)
    first = losses(model, WINDOWS, SIZES)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)  # noise is drawn apart, so that training goes on as it would have
    assert losses(model, WINDOWS, SIZES) == first
    assert model.training


def test_text_is_read_in_a_new_order_again_and_again():
    tokens = np.arange(7 * 4 + 3, dtype=np.uint16)
    windows = Windows(tokens, 4, 21, seed=3)
    starts = [int(windows[i]["input_ids"][0]) for i in range(21)]
    epochs = [starts[:7], starts[7:14], starts[14:]]
    assert all(sorted(epoch) == list(range(0, 28, 4)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [int(Windows(tokens, 4, 21, seed=3)[i]["input_ids"][0]) for i in (20, 0, 9)] == [
        starts[20],
        starts[0],
        starts[9],
    ]
    assert [int(Windows(tokens, 4, 21, seed=4)[i]["input_ids"][0]) for i in range(21)] != starts
    assert torch.equal(windows[0]["labels"], windows[0]["input_ids"])
