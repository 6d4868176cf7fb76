"""Speed-ups as budgets: solved from a table that is measured once, kept, and measured again where it is damaged.

Times of this machine are never asserted: where figures matter, the table is a made-up one.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import dynadepth
from dynadepth import MindSkipConfig, StaticConfig, routing_of
from dynadepth.benchmark import machine
from dynadepth.benchmark.cost_table import CostTable, Times, Workload
from dynadepth.benchmark.machine import DrawnRouter, cost_table, drawn_copy, measure_table, measured_keeps
from dynadepth.benchmark.speedup import speedup_of
from dynadepth.budget import calibrate, prompts_to_batches
from dynadepth.errors import BudgetError, ConfigError, UnsupportedModelError
from dynadepth.lora import LoraSettings
from dynadepth.model import add_lora
from dynadepth.report.stamp import stamp
from dynadepth.routing.router import ConstantRouter
from small import KINDS, LAYERS, bare, ids, paths, routed, scatter

SMALL = Workload(context=9, new_tokens=6)


def made_up(dense: float = 2.0, all_: float = 2.2, none: float = 1.2, spread: float = 0.0) -> CostTable:
    """Linear, at the workload that `1.3x` means."""
    routed_times = {0.0: Times(none, 0.0), 1.0: Times(all_, 0.0)}
    return CostTable(Workload(), Times(dense, 0.0), routed_times, spread)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("DYNADEPTH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cost-tables"


@pytest.fixture
def measured(monkeypatch) -> list[Workload]:
    """Replaces measuring by `made_up`, and tells which workloads were measured."""
    calls: list[Workload] = []

    def measure(model, workload, progress=None):
        calls.append(workload)
        return made_up()

    monkeypatch.setattr(machine, "measure_table", measure)
    return calls


def calibrated(**config):
    """A tiny routed model whose context is long enough for the usual workload."""
    model = routed(base=bare(max_position_embeddings=4096), bias=True, **config)
    calibrate(model, prompts_to_batches(ids(32, 9).tolist(), pad=0), keeps=(0.5,))
    return model


# ---- solving


def test_the_budget_is_set_and_meets_the_speedup(measured):
    model = calibrated()
    found = dynadepth.set_speedup(model, 1.3)
    assert dynadepth.routing_of(model).budget == found.budget
    assert found.budget == 0.33  # 2 / 1.3 = 1.538 = 1.2 + 0.338 of the 1.0 s that routing costs or saves
    assert found.expected == pytest.approx(2 / 1.53)
    assert (
        str(found) == "1.3x asked: budget 0.33 of the attentions (expected 1.31x at 1,024 + 64 tokens on this machine)"
    )


@pytest.mark.parametrize("times", [1.01, 1.1, 1.25, 1.6])
@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (1, 2, 3), (2,)])
def test_budgets_count_unrouted_sublayers(measured, times, layers):
    model = calibrated(layers=layers)
    routing = dynadepth.routing_of(model)
    if times == 1.6 and layers == (0, 1, 2, 3):  # one sublayer of four executes at least
        with pytest.raises(BudgetError, match=r"1\.6x cannot be reached"):
            dynadepth.set_speedup(model, times)
        return
    found = dynadepth.set_speedup(model, times)
    assert found.expected == pytest.approx(made_up().speedup(routing.keep_of(found.budget)))
    assert found.expected >= times
    assert made_up().speedup(routing.keep_of(found.budget + 0.0101)) < times


@pytest.mark.parametrize(("times", "executed"), [(1.05, 2), (1.25, 1), (1, 4)])
def test_a_static_route_executes_a_whole_number_that_reaches_it(measured, times, executed):
    """Rounded to the nearest number, what is solved at 1.05 (0.70) and 1.25 (0.40) would execute one sublayer more."""
    model = dynadepth.attach(bare(max_position_embeddings=4096), StaticConfig(order=(2, 0, 3, 1)))
    found = dynadepth.set_speedup(model, times)
    with torch.no_grad(), dynadepth.recording() as record:
        model(ids(2, 5))
    assert record.keep_ratio().all == executed / LAYERS
    assert found.expected >= times
    assert dynadepth.routing_of(model).speedup["budget"] == dynadepth.routing_of(model).budget == found.budget


def test_a_speedup_out_of_reach_names_the_largest_which_can_be_had(measured):
    model = calibrated()
    with pytest.raises(BudgetError) as caught:
        dynadepth.set_speedup(model, 3)
    sentence = str(caught.value)
    for part in ("3x cannot", "largest at 1,024 + 64 tokens is 1.37x", "0.25 of the attentions", "3x@2048+64"):
        assert part in sentence
    assert "route more" not in sentence
    assert dynadepth.routing_of(model).budget is None
    assert dynadepth.set_speedup(model, 1.37).budget == 0.25
    with pytest.raises(BudgetError, match="route more than 2 of 4 layers"):
        dynadepth.set_speedup(calibrated(layers=(1, 2)), 3)
    with pytest.raises(BudgetError) as caught:
        dynadepth.set_speedup(calibrated(target="mlp"), 3)
    assert "longer context" not in str(caught.value)


def test_1x_is_dense_and_needs_no_table(measured):
    model = scatter(dynadepth.attach(bare(), MindSkipConfig()))  # not even a calibration
    found = dynadepth.set_speedup(model, 1)
    assert (found.budget, found.expected, found.table) == (1.0, 1.0, None)
    assert dynadepth.routing_of(model).budget == 1.0
    assert "1x asked" in str(found)
    assert "dense" in str(found)
    assert not measured


@pytest.mark.parametrize("times", [0.9, 0, -1, float("nan"), float("inf")])
def test_speedups_that_are_none(measured, times):
    with pytest.raises(BudgetError, match=f"at least 1, such as 1.3, not {times}"):
        dynadepth.set_speedup(calibrated(), times)


def test_what_cannot_be_set_is_said_before_anything_is_measured(measured):
    with pytest.raises(BudgetError, match="A static route is what it is"):
        dynadepth.set_speedup(dynadepth.attach(bare(), StaticConfig(skip=(1,))), 1.3)
    with pytest.raises(BudgetError, match=r"no calibration, so a speed-up of 1\.3x cannot be set"):
        dynadepth.set_speedup(routed(), 1.3)
    with pytest.raises(UnsupportedModelError, match="no routers"):
        dynadepth.set_speedup(bare(), 1.3)
    with pytest.raises(ConfigError, match="the model reads 128"):
        dynadepth.set_speedup(calibrated_short(), 1.3)
    assert not measured


def calibrated_short():
    model = routed()
    calibrate(model, prompts_to_batches(ids(8, 9).tolist(), pad=0), keeps=(0.5,))
    return model


def test_provenance_tells_what_was_asked_until_another_budget_is_set(measured):
    model = calibrated()
    dynadepth.set_speedup(model, 1.3)
    record = stamp("tiny", model)["routers"]
    assert record["budget"] == 0.33
    assert (record["speedup"]["asked"], record["speedup"]["budget"]) == ("1.3x", 0.33)
    table = record["speedup"]["cost_table"]
    assert (table["context"], table["new_tokens"], table["batch"]) == (1024, 64, 1)
    assert [point["keep"] for point in table["routed"]] == [0.0, 1.0]
    json.dumps(record)
    dynadepth.set_budget(model, attention=0.5)
    assert stamp("tiny", model)["routers"]["speedup"] is None


def test_a_busy_machine_is_said(monkeypatch, cache):
    monkeypatch.setattr(machine, "measure_table", lambda *_: made_up(spread=0.4))
    said = str(dynadepth.set_speedup(calibrated(), 1.3))
    assert "roughly: the machine was busy when it was measured (spread 40%)" in said
    (file,) = cache.glob("*.json")
    assert f"; delete {file} to measure again" in said


def test_a_lora_has_tables_of_its_own(measured):
    model, plain = calibrated(), calibrated()
    add_lora(model, LoraSettings(2))
    described = [machine.describe(one, Workload()) for one in (model, plain)]
    assert described[0]["routing"].pop("lora")["rank"] == 2
    assert described[0]["routing"] == described[1]["routing"]
    copy = machine.drawn_copy(model, 0.5)
    assert dynadepth.routing_of(copy).lora.tensors().keys() == dynadepth.routing_of(model).lora.tensors().keys()
    before = speedup_of(bare(max_position_embeddings=4096), MindSkipConfig(), 1.3, Workload(), lora=LoraSettings(2))
    assert before.file != speedup_of(bare(max_position_embeddings=4096), MindSkipConfig(), 1.3, Workload()).file


def test_before_tuning_the_budget_is_that_of_the_tuned_routers(measured):
    model = bare(max_position_embeddings=4096)
    flags = [p.requires_grad for p in model.parameters()]
    config = MindSkipConfig(layers="all", bias=True, skip_path="linear", capacity=0.7)
    before = speedup_of(model, config, 1.3, Workload())
    assert not dynadepth.is_attached(model)
    assert [p.requires_grad for p in model.parameters()] == flags
    after = dynadepth.set_speedup(calibrated(skip_path="linear"), 1.3)
    assert before == after
    assert len(measured) == 1  # the same table: neither routers' weights nor training settings matter


# ---- the file


def test_a_table_is_kept_for_its_setting(measured, cache):
    model = calibrated()
    for _ in range(2):
        dynadepth.set_speedup(model, 1.3)
    assert measured == [Workload()]
    dynadepth.set_speedup(model, 1.3, context=2048)
    dynadepth.set_speedup(model, 1.3, batch=4)
    for layers in ((0, 1, 2), (1, 2, 3)):
        dynadepth.set_speedup(calibrated(layers=layers), 1.3)
    dynadepth.set_speedup(calibrated(skip_path="linear"), 1.3)
    dynadepth.set_speedup(calibrated().bfloat16(), 1.3)
    assert len(measured) == len(list(cache.iterdir())) == 7
    document = json.loads(next(cache.iterdir()).read_text(encoding="utf-8"))
    assert set(document) == {"setting", "table", "provenance"}
    assert {"model", "routing", "workload", "device", "cpu", "threads", "torch"} <= set(document["setting"])


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-40],
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text.replace('"prefill_s": 2.0', '"prefill_s": -2.0'),
        lambda text: text.replace('"prefill_s": 2.0', '"prefill_s": null'),
        lambda text: text.replace('"context": 1024', '"context": 1'),
    ],
)
def test_a_damaged_table_is_measured_anew_and_said(measured, cache, damage):
    model = calibrated()
    found = dynadepth.set_speedup(model, 1.3)
    (file,) = cache.iterdir()
    whole = file.read_text(encoding="utf-8")
    assert damage(whole) != whole
    file.write_text(damage(whole), encoding="utf-8")
    with pytest.warns(UserWarning, match=rf"{file.name} is damaged .*measured anew"):
        assert dynadepth.set_speedup(model, 1.3) == found
    assert len(measured) == 2
    assert json.loads(file.read_text(encoding="utf-8"))["table"] == json.loads(whole)["table"]


def test_a_cache_that_cannot_be_written_is_no_obstacle(measured, cache):
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be", encoding="utf-8")
    with pytest.warns(UserWarning, match="cannot be kept in .*DYNADEPTH_CACHE"):
        assert dynadepth.set_speedup(calibrated(), 1.3).budget == 0.33


# ---- measuring


@pytest.mark.parametrize(("granularity", "kv_policy"), KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_table_has_a_time_for_each_measured_share(monkeypatch, family, granularity, kv_policy):
    monkeypatch.setattr(machine, "ROUNDS", 2)
    model = routed(family, granularity=granularity, kv_policy=kv_policy, skip_path="linear")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    told: list[str] = []
    for workload in (SMALL, Workload(5, 1), Workload(9, 30, batch=3)):
        with dynadepth.recording() as record:
            table = measure_table(model, workload, told.append)
        assert record.keep_ratio() is None  # nothing of it is the caller's
        assert table.workload == workload
        assert list(table.routed) == [0.0, 0.5, 0.75 if granularity == "token" else 1.0]
        assert all(times.prefill_s > 0 for times in (table.dense, *table.routed.values()))
        assert (table.dense.decode_s > 0) == (workload.new_tokens > 1)
    assert "round 2 of 2" in told[-1]
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert dynadepth.routing_of(model).budget is None


def test_few_sites_have_as_many_points_as_they_can():
    for layers, sequence, token in (((2,), [0, 1], [0]), ((1, 2), [0, 0.5, 1], [0, 0.5])):
        for granularity, keeps in (("sequence", sequence), ("token", token)):
            routing = dynadepth.routing_of(routed(layers=layers, granularity=granularity))
            assert measured_keeps(routing) == keeps


@pytest.mark.parametrize(("granularity", "kv_policy"), KINDS)
@pytest.mark.parametrize("keep", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_drawn_decisions_keep_their_share_and_ask_the_routers(granularity, kv_policy, keep):
    """In the prefill of every row and at every decoded token; skip paths and routers are those of the model."""
    model = paths(routed(granularity=granularity, kv_policy=kv_policy, skip_path="linear"))
    copy, asked = drawn_copy(model, keep), []
    for state in dynadepth.routing_of(copy).states.values():
        state.router.router.register_forward_pre_hook(lambda router, _: asked.append(router))
    tokens = ids(2, 80)
    with torch.no_grad(), dynadepth.recording() as record:
        cache = copy(tokens, use_cache=True).past_key_values
        asked_at_prefill = len(asked)
        for step in range(3):
            copy(tokens[:, step : step + 1], past_key_values=cache)
    assert asked_at_prefill == LAYERS
    assert len(asked) == LAYERS * (4 if granularity == "token" else 1)
    tolerance = 0.03 if granularity == "token" else 0
    assert record.keep_ratio("prefill").routed == pytest.approx(keep, abs=tolerance)
    for sequence in record.sequences:
        assert sum(sequence.values()) / LAYERS == pytest.approx(keep, abs=tolerance)
    assert record.keep_ratio("decode").routed == pytest.approx(keep, abs=0)
    shared = zip(copy.parameters(), model.parameters(), strict=True)
    assert all(ours.data_ptr() == theirs.data_ptr() for ours, theirs in shared)


@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
def test_of_a_static_route_sites_are_drawn_and_no_router_is_asked(monkeypatch, keep):
    model = dynadepth.attach(bare(), StaticConfig(order=(2, 0, 3, 1)))
    dynadepth.set_budget(model, attention=0.75)
    copy = drawn_copy(model, keep)
    monkeypatch.setattr(ConstantRouter, "forward", lambda *_: pytest.fail("asked"))
    for one, share in ((copy, keep), (model, 0.75)):
        with torch.no_grad(), dynadepth.recording() as record:
            one(ids(2, 5))
        assert record.keep_ratio().all == share


def test_untrained_paths_are_timed_in_the_models_dtype():
    model = dynadepth.attach(bare().bfloat16(), MindSkipConfig(layers="all", skip_path="linear"))
    copy = drawn_copy(model, 0.5)
    assert {p.dtype for path in dynadepth.routing_of(copy).paths().values() for p in path.parameters()} == {
        torch.bfloat16
    }
    assert all(
        p.dtype == torch.float32 for path in dynadepth.routing_of(model).paths().values() for p in path.parameters()
    )


def test_a_real_table_is_measured_kept_and_read(monkeypatch, cache):
    monkeypatch.setattr(machine, "ROUNDS", 2)
    model = routed()
    first = cost_table(model, SMALL)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(machine, "measure_table", None)
    assert cost_table(model, SMALL) == first


def test_a_drawn_routers_threshold_is_where_the_routers_is():
    """`route` granularity looks at it to know where to bring the states."""
    drawn = DrawnRouter(next(iter(routing_of(routed()).routers().values())).to("meta"), 0.5, 0.0)
    assert drawn.threshold.device.type == "meta"
