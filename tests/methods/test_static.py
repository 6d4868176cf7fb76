"""Static routes with an order: any budget it reaches, the same after loading, and no router asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dynadepth import StaticConfig, attach, load, recording, routing_of, save, set_budget
from dynadepth.adapter import CONFIG
from dynadepth.errors import BudgetError, ConfigError
from dynadepth.methods import config_from_dict
from dynadepth.routing.router import ConstantRouter
from small import bare, ids, paths, ragged

ORDER = (2, 0, 3)


def ordered(**more: Any) -> Any:
    return paths(attach(bare(), StaticConfig(order=ORDER, **more)))


def test_an_order_stays_in_its_order_and_says_what_is_routed() -> None:
    config = StaticConfig(order=[2, 0, 3])
    assert config.order == ORDER
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config
    model = ordered()
    assert [site.layer for site in routing_of(model).sites] == [0, 2, 3]
    assert torch.equal(model(**ragged([6, 3])).logits, bare()(**ragged([6, 3])).logits)  # until a budget is set


@pytest.mark.parametrize(
    ("budget", "skipped"),
    [
        (1.0, ()),
        (0.9, ()),
        (0.8, (2,)),
        (0.75, (2,)),
        (0.6, (0, 2)),
        (0.5, (0, 2)),
        (0.26, (0, 2, 3)),
        (0.25, (0, 2, 3)),
    ],
)
@pytest.mark.parametrize("target", ["attention", "mlp", "block"])
def test_a_budget_skips_the_first_of_the_order(budget: float, skipped: tuple[int, ...], target: str) -> None:
    batch = ragged([6, 3])
    model = ordered(target=target, skip_path="linear", skip_rank=3)
    set_budget(model, **{target: 0.25})  # what was set before leaves no trace
    set_budget(model, **{target: budget})
    fixed = attach(bare(), StaticConfig(target=target, skip=skipped, layers=(0, 2, 3), skip_path="linear", skip_rank=3))
    routing_of(fixed).take_paths(routing_of(model))
    with recording() as record:
        found = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert torch.equal(found, fixed.generate(**batch, max_new_tokens=4, do_sample=False))
    assert torch.equal(model(**batch).logits, fixed(**batch).logits)
    assert record.keep_ratio().all == 1 - len(skipped) / 4
    assert routing_of(model).budget == budget


def test_no_router_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ordered()
    set_budget(model, attention=0.5)
    monkeypatch.setattr(ConstantRouter, "forward", lambda *_: pytest.fail("asked"))
    model.generate(**ragged([6, 3]), max_new_tokens=4, do_sample=False)


@pytest.mark.parametrize("budget", [None, 0.5, 1.0])
def test_a_loaded_route_is_the_saved_one(tmp_path: Path, budget: float | None) -> None:
    model = ordered(skip_path="linear", skip_rank=3)
    if budget is not None:
        set_budget(model, attention=budget)
    again = load(bare(), save(model, tmp_path))
    assert routing_of(again).budget == budget
    assert routing_of(again).config == routing_of(model).config
    batch = ragged([6, 3])
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    for each in (again, model):
        set_budget(each, attention=0.25)
    assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_routes_saved_before_there_were_orders_load(tmp_path: Path) -> None:
    model = attach(bare(), StaticConfig(skip=(1, 3)))
    file = save(model, tmp_path) / CONFIG
    document = json.loads(file.read_text(encoding="utf-8"))
    del document["config"]["order"]
    file.write_text(json.dumps(document), encoding="utf-8")
    again = load(bare(), tmp_path)
    assert routing_of(again).config == StaticConfig(skip=(1, 3))
    assert torch.equal(again(ids(2, 5)).logits, model(ids(2, 5)).logits)


def test_budgets_beyond_the_order() -> None:
    model = ordered()
    with pytest.raises(BudgetError, match=r"0\.2 cannot be reached: only 3 of 4 attention.*0\.250 always executes"):
        set_budget(model, attention=0.2)
    with pytest.raises(BudgetError, match=r"A static route is what it is.*or one with an order"):
        set_budget(attach(bare(), StaticConfig(skip=(1,))), attention=0.75)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": (1, 1)}, r"order must be distinct whole numbers, not \(1, 1\)"),
        ({"order": "all"}, "order must be distinct whole numbers, not 'all'"),
        ({"order": (2, 0), "skip": (0,)}, r"skip \[0\] and order \[2, 0\] contradict each other.*this number \[2\]"),
        ({"order": (2, 0), "skip": (0, 2, 3)}, "contradict each other"),
        ({"order": (2, 0), "layers": "all"}, "leave layers out, which is 'all'"),
    ],
)
def test_contradictions_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StaticConfig(**settings)
    assert StaticConfig(order=(2, 0, 3), skip=(0, 2)).skip == (0, 2)


def test_an_order_of_layers_that_do_not_exist() -> None:
    with pytest.raises(ConfigError, match=r"layers \[9\] do not exist"):
        attach(bare(), StaticConfig(order=(9, 0)))


@pytest.mark.parametrize("setting", [{"skip": (1, 99)}, {"repeat": (99,), "target": "block"}], ids=str)
@pytest.mark.parametrize("layers", [None, "all"])
def test_a_static_route_of_layers_that_do_not_exist_is_refused(setting, layers):
    with pytest.raises(ConfigError, match=r"names layers \[99\] that do not exist: the model has 4, 0 to 3"):
        attach(bare(), StaticConfig(layers=layers, **setting))
