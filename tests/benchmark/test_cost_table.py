"""The arithmetic of a cost table: what it expects is what was measured, and what it solves for is met."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dynadepth.benchmark.cost_table import CostTable, Times, Workload
from dynadepth.errors import ConfigError

seconds = st.floats(1e-4, 10)


@st.composite
def tables(draw):
    """Any measured times, noise and all: not even monotone."""
    keeps = {0.0, *draw(st.sets(st.sampled_from([0.1, 0.25, 0.5, 0.75, 0.9, 1.0]), max_size=4))}
    workload = Workload(draw(st.integers(1, 4096)), draw(st.integers(1, 200)), draw(st.integers(1, 8)))
    times = st.builds(Times, seconds, seconds)
    return CostTable(workload, draw(times), {keep: draw(times) for keep in keeps}, draw(st.floats(0, 1)))


def table(dense: float = 2.0, **seconds_at: float) -> CostTable:
    """Of one new token, so that the prefill is all; `at50=1.5`: seconds at a keep ratio of 50 %."""
    routed = {int(name.removeprefix("at")) / 100: Times(value, 0.0) for name, value in seconds_at.items()}
    return CostTable(Workload(new_tokens=1), Times(dense, 0.0), routed)


@given(tables(), st.floats(1, 20, exclude_min=True))
def test_the_keep_ratio_solved_for_meets_the_speedup_and_is_the_largest(costs, times):
    keep = costs.keep_for(times)
    if keep is None:
        assert costs.speedup(0.0) < times
        return
    assert 0 <= keep <= 1
    assert costs.speedup(keep) >= times * (1 - 1e-9)
    for more in (keep + 0.01, (keep + 1) / 2):
        if keep + 1e-6 < more <= 1:
            assert costs.speedup(more) <= times * (1 + 1e-9)


@given(tables(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_is_never_faster_and_all_of_it_never_faster_than_dense(costs, a, b):
    assert costs.speedup(max(a, b)) <= costs.speedup(min(a, b)) * (1 + 1e-9)
    assert costs.speedup(1.0) <= 1.0


@given(tables())
def test_a_table_is_read_back_as_it_was_written(costs):
    assert CostTable.from_dict(costs.to_dict()) == costs


@given(st.floats(0.1, 1), st.floats(0.01, 0.9), st.floats(0, 1), st.floats(1, 2))
@example(saved=0.55, rest=0.42, keep=0.0, overhead=1.0)  # the speed-up of skipping all, rounded up
def test_of_linear_times_nothing_is_lost(saved, rest, keep, overhead):
    """Round trip: the speed-up of a keep ratio asks for that keep ratio."""
    dense = rest + saved
    costs = table(dense, at0=rest, at50=(rest + saved / 2), at100=overhead * dense)
    if keep < 0.5:  # above, the overhead bends the line
        assert costs.speedup(keep) == pytest.approx(dense / (rest + keep * saved))
        assert costs.keep_for(costs.speedup(keep)) == pytest.approx(keep, abs=1e-6)


def test_measured_points_are_passed_through():
    costs = table(2.0, at0=1.0, at50=1.6, at100=2.2)
    assert costs.speedup(0.0) == 2.0
    assert costs.speedup(0.5) == 1.25
    assert costs.speedup(1.0) == pytest.approx(2 / 2.2)
    assert costs.speedup(0.25) == pytest.approx(2 / 1.3)
    assert costs.keep_for(2 / 1.3) == pytest.approx(0.25)
    assert costs.keep_for(2.5) is None


def test_routing_is_paid_before_anything_is_gained():
    """The routed model that executes all is slower than dense: any speed-up has to make up for it first."""
    costs = table(2.0, at0=1.0, at100=2.2)
    assert costs.keep_for(1.0001) == pytest.approx(1 - 0.2 / 1.2, abs=1e-3)


def test_noise_does_not_make_a_smaller_share_slower_or_everything_faster_than_dense():
    assert table(2.0, at0=1.5, at50=1.4, at100=1.9).curve == [(0.0, 1.5), (0.5, 1.5), (1.0, 2.0)]
    assert table(2.0, at0=1.0, at50=1.4).curve == [(0.0, 1.0), (0.5, 1.4), (1.0, 2.0)]


def test_a_call_is_a_prefill_and_a_step_for_every_further_token():
    assert Workload(10, 1).seconds(Times(3.0, 0.5)) == 3.0
    assert Workload(10, 65).seconds(Times(3.0, 0.5)) == 35.0
    assert str(Workload(2048, 64)) == "2,048 + 64 tokens"
    assert str(Workload(batch=8)) == "1,024 + 64 tokens, batch 8"


@pytest.mark.parametrize("bad", [{"context": 0}, {"new_tokens": -1}, {"batch": 1.5}, {"context": True}])
def test_workloads_that_are_none(bad):
    with pytest.raises(ConfigError, match=f"{next(iter(bad))} must be a whole number"):
        Workload(**bad)


@pytest.mark.parametrize(
    ("dense", "routed"),
    [(0.0, {0.0: 1.0}), (math.nan, {0.0: 1.0}), (1.0, {0.0: math.inf}), (1.0, {0.0: -1.0}), (1.0, {}),
     (1.0, {0.5: 1.0}), (1.0, {0.0: 1.0, 1.5: 1.0})],
)  # fmt: skip
def test_times_that_cannot_be(dense, routed):
    with pytest.raises(ValueError, match=r"times|keep ratios"):
        CostTable(Workload(), Times(dense, 0.0), {keep: Times(value, 0.0) for keep, value in routed.items()})
