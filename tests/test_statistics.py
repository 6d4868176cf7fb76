"""Standard errors and paired intervals."""

import math

import pytest
import torch

from dynadepth.statistics import paired_bootstrap, standard_error


def test_standard_error_of_a_proportion():
    rows = [1.0] * 30 + [0.0] * 70
    assert standard_error(rows) == pytest.approx(math.sqrt(0.3 * 0.7 / 99))
    assert standard_error([1.0]) is None


def test_equal_variants_differ_by_nothing():
    assert paired_bootstrap([1.0, 0.0, 1.0], [1.0, 0.0, 1.0]) == (0.0, 0.0)


def test_the_interval_is_that_of_the_normal_approximation():
    generator = torch.Generator().manual_seed(0)
    a = (torch.rand(400, generator=generator) < 0.6).float().tolist()
    b = (torch.rand(400, generator=generator) < 0.5).float().tolist()
    low, high = paired_bootstrap(a, b, n=4000)
    mean = sum(a) / 400 - sum(b) / 400
    spread = standard_error([x - y for x, y in zip(a, b, strict=True)])
    assert low == pytest.approx(mean - 1.96 * spread, abs=0.006)
    assert high == pytest.approx(mean + 1.96 * spread, abs=0.006)


def test_pairing_narrows_the_interval():
    hard = [float(i % 2) for i in range(200)]
    better = [1.0, *hard[1:]]
    low, high = paired_bootstrap(better, hard)
    assert 0 <= low <= high < 0.03


def test_the_seed_decides_and_the_global_state_stays():
    a, b = [1.0, 0.0, 1.0, 1.0, 0.0] * 20, [0.0, 0.0, 1.0, 1.0, 1.0] * 20
    before = torch.get_rng_state()
    assert paired_bootstrap(a, b, seed=3) == paired_bootstrap(a, b, seed=3)
    assert torch.equal(before, torch.get_rng_state())


def test_unpaired_rows_are_refused():
    with pytest.raises(ValueError, match="3 and 2"):
        paired_bootstrap([1.0] * 3, [1.0] * 2)
    with pytest.raises(ValueError, match="two or more"):
        paired_bootstrap([1.0], [0.5])
