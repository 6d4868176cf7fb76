"""Tuning a static route: its skip paths alone learn, under routes of every budget asked for."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from dynadepth import StaticConfig, attach, is_attached, load, recording, routing_of, set_budget
from dynadepth.budget import in_order
from dynadepth.errors import BudgetError, ConfigError
from dynadepth.tuning import Collator, tune
from dynadepth.tuning.controller import QuantileController, RouteController
from dynadepth.tuning.orders import scores_of
from dynadepth.tuning.trainer import RouterTrainer
from tuning_runs import LINEAR, STATIC, Tokenizer, examples, fingerprint, tiny

LINEAR_SETTINGS = {"method": "static", "skip_path": "linear", "skip_rank": 4}


def test_skip_paths_learn_and_nothing_else(tmp_path):
    model = tiny()
    before = fingerprint(model)
    result = tune(model, Tokenizer(), examples(), STATIC, out=tmp_path, budget=0.5)
    assert fingerprint(model) == before
    assert result.n_trainable == 4 * (4 * 32 * 4 + 32)
    assert all(".depth_path." in name for name, p in model.named_parameters() if p.requires_grad)
    assert result.kl_after < result.kl_before
    assert result.keep_before == result.keep_after
    assert result.keep_after.all == 0.5
    assert (result.moved, result.kl_static, result.choice) == (0.0, None, None)
    order = in_order(scores_of(tiny(), examples(), 0, "attention"))
    config = StaticConfig(skip_path="linear", skip_rank=4, order=order, skip=order[:2])
    assert routing_of(model).config == config
    assert result.static_skip == sorted(order[:2])
    assert routing_of(model).calibration is None


def test_saved_routes_serve_every_budget(tmp_path):
    model = tiny()
    tune(model, Tokenizer(), examples(), STATIC, out=tmp_path, budget=0.75)
    again, batch = load(tiny(), tmp_path).eval(), Collator(0)(examples(6, seed=9))
    assert routing_of(again).budget == 0.75
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
        for budget in (0.25, 0.5, 1.0):
            set_budget(again, attention=budget)
            with recording() as record:
                again(**batch)
            assert record.keep_ratio("prefill").all == budget


def test_every_step_has_one_of_the_budgets_and_runs_what_executes_alone(tmp_path, monkeypatch):
    model, seen = tiny(), []
    step = RouterTrainer.training_step

    def look(self, *args, **kwargs):
        routing = routing_of(self.model)
        ran = []
        hooks = [
            layer.self_attn.o_proj.register_forward_hook(lambda *_, layer=number: ran.append(layer))
            for number, layer in enumerate(self.model.model.layers)
        ]
        loss = step(self, *args, **kwargs)
        for hook in hooks:
            hook.remove()
        routed = set(range(4)) - set(routing.config.skip)
        assert sorted(ran) == sorted([*range(4), *routed])  # the dense teacher, and then the route
        seen.append(routing.budget)
        return loss

    monkeypatch.setattr(RouterTrainer, "training_step", look)
    tune(model, Tokenizer(), examples(), STATIC, out=tmp_path, budget=1.0, seed=3)
    assert set(seen) == {0.75, 0.5}
    assert routing_of(model).budget == 1.0


def test_the_budgets_drawn_are_those_of_a_twin_with_routers(monkeypatch):
    """So that a static route and routers of one seed are tuned at the same budgets."""
    model, drawn = attach(tiny(), StaticConfig(order=(0, 1))), []
    monkeypatch.setattr("dynadepth.tuning.controller.set_budget", lambda _, attention: drawn.append(attention))
    choices = [0.5, 0.75, 1.0]
    static, routers = RouteController(model, choices, seed=3), QuantileController(model, choices, seed=3)
    for step in range(20):
        static.on_step_begin(None, SimpleNamespace(global_step=step), None)
    assert drawn == [routers.keep_at(step) for step in range(20)]


def test_an_interrupted_run_is_left_at_the_budget_asked_for(tmp_path, monkeypatch):
    def stop(self, *args, **kwargs):
        assert routing_of(self.model).budget in (0.75, 0.5)
        raise KeyboardInterrupt

    monkeypatch.setattr(RouterTrainer, "training_step", stop)
    with pytest.raises(KeyboardInterrupt):
        tune(tiny(), Tokenizer(), examples(), STATIC, out=tmp_path, budget=0.25)
    assert routing_of(load(tiny(), tmp_path)).budget == 0.25


def test_an_order_may_be_given(tmp_path):
    recipe = dataclasses.replace(STATIC, init="zeros", method={**LINEAR_SETTINGS, "order": (3, 0, 1)})
    model = tiny()
    result = tune(model, Tokenizer(), examples(), recipe, out=tmp_path, budget=0.5)
    assert routing_of(model).config.order == (3, 0, 1)
    assert result.static_skip == [0, 3]
    with pytest.raises(BudgetError, match=r"0\.2 cannot be reached: only 3 of 4"):
        tune(tiny(), Tokenizer(), examples(), recipe, out=tmp_path, budget=0.2)
    model, lower = tiny(), dataclasses.replace(recipe, budgets=(0.5, 0.1))
    with pytest.raises(BudgetError, match=r"0\.1 cannot be reached: only 3 of 4"):
        tune(model, Tokenizer(), examples(), lower, out=tmp_path, budget=0.5)
    assert not is_attached(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"method": "static"}}, "nothing to tune: method 'static'.*set skip_path to linear"),
        ({"method": {**LINEAR_SETTINGS, "skip": (1,)}}, r"skip \[1\] is a bare route"),
        ({"method": {**LINEAR_SETTINGS, "order": (1, 0)}}, r"method\.order \[1, 0\] gives one: leave one out"),
        ({"method": {**LINEAR_SETTINGS, "granularity": "token"}}, "tune it at sequence granularity, not token"),
        ({"init": "zeros"}, "needs an order: set init to importance"),
        ({"choose": True}, "'test' cannot choose between routers and a static route: its method is static"),
    ],
)
def test_what_cannot_be_tuned_is_said(tmp_path, changes, message):
    model = tiny()
    with pytest.raises(ConfigError, match=message):
        tune(model, Tokenizer(), examples(), dataclasses.replace(STATIC, **changes), out=tmp_path)
    assert not is_attached(model)


def test_budgets_need_no_controller(tmp_path):
    recipe = dataclasses.replace(STATIC, controller="none")
    assert tune(tiny(), Tokenizer(), examples(), recipe, out=tmp_path).steps == 12
    with pytest.raises(ConfigError, match="set controller to quantile"):
        dataclasses.replace(LINEAR, controller="none").config()
