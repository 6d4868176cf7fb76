"""Budgets of routers are measured anew on other prompts, and met there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dynadepth import MindSkipConfig, StaticConfig, attach, budget, load, routing_of, save, set_budget, set_control
from dynadepth.errors import BudgetError
from dynadepth.routing.calibration import TOLERANCE
from dynadepth.tuning.data import Example
from dynadepth.tuning.recalibrate import CHECKED, recalibrate
from small import ALL, bare, routed


def texts(low: int, high: int, count: int = 240) -> list[Example]:
    """Plain texts of one kind: the ids from `low` to before `high`."""
    generator = torch.Generator().manual_seed(low)
    return [Example(torch.randint(low, high, (24,), generator=generator).tolist(), 0) for _ in range(count)]


@pytest.mark.parametrize("granularity", ["token", "sequence", "route"])
def test_budgets_are_met_on_the_prompts_given(granularity: str) -> None:
    model = routed(granularity=granularity)
    with torch.no_grad():
        for router in routing_of(model).routers().values():
            router.threshold.fill_(0.25)
    first = recalibrate(model, texts(1, 12), 0)
    assert [one.before for one in first.checked] == [None] * 4
    assert all(router.threshold == 0.25 for router in routing_of(model).routers().values()), "no budget was in force"
    set_budget(model, attention=0.5)
    old = [float(router.threshold) for router in routing_of(model).routers().values()]

    found = recalibrate(model, texts(30, 60), 0)
    assert (found.n_calibrated, found.n_held_back) == (180, 60)
    assert [one.budget for one in found.checked] == list(CHECKED)
    # Decisions of a sequence are few: what is off by less is luck.
    allowed = TOLERANCE if granularity == "token" else 4 * TOLERANCE
    assert max(abs(one.after - one.budget) for one in found.checked) <= allowed
    assert max(abs((one.before or 0) - one.budget) for one in found.checked) > allowed
    routing = routing_of(model)
    assert routing.budget == 0.5
    assert [float(router.threshold) for router in routing.routers().values()] != old
    assert routing.calibration is not None
    assert routing.calibration.n_sequences == 180


def test_a_control_stays(tmp_path: Any) -> None:
    model = routed()
    set_control(model, 0.2)
    before = [float(router.threshold) for router in routing_of(model).routers().values()]
    recalibrate(model, texts(1, 60, 40), 0)
    assert routing_of(model).control == 0.2
    assert [float(router.threshold) for router in routing_of(model).routers().values()] == before
    save(model, tmp_path)
    assert routing_of(load(bare(), tmp_path)).calibration == routing_of(model).calibration


def test_budgets_out_of_reach_are_not_checked() -> None:
    model = attach(bare(), MindSkipConfig(layers=ALL[:1], granularity="token"))
    with torch.no_grad():
        routing_of(model).routers().popitem()[1].weight.copy_(torch.randn(16))
    assert [one.budget for one in recalibrate(model, texts(1, 60, 40), 0).checked] == [0.875, 0.75]


def test_what_has_no_thresholds_and_too_few_prompts_are_refused() -> None:
    with pytest.raises(BudgetError, match="has no thresholds to calibrate"):
        recalibrate(attach(bare(), StaticConfig(skip=(1,))), texts(1, 60, 40), 0)
    with pytest.raises(BudgetError, match=r"9 prompts are too few to calibrate 7 budgets and.*at least 10,"):
        recalibrate(routed(), texts(1, 60, 9), 0)


def test_as_many_prompts_as_are_asked_for_are_enough() -> None:
    assert recalibrate(routed(), texts(1, 60, 10), 0).n_calibrated == 8


def test_plain_texts_are_whole_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    forward = budget.forward
    monkeypatch.setattr(
        budget, "forward", lambda model, batch: seen.append(batch["input_ids"].shape[1]) or forward(model, batch)
    )
    recalibrate(routed(), texts(1, 60, 20), 0)
    assert set(seen) == {24}
