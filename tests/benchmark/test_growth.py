"""Exponents of cost by size."""

import pytest

from dynadepth.benchmark.growth import exponent, slopes


def cell(batch: int, context: int, dense: float, routed: float, peak: int | None = 1) -> dict:
    return {
        "variant": "sequence@0.5", "phase": "prefill", "batch": batch, "context": context, "dense_s": dense,
        "routed_s": routed, "peak_bytes": {"dense": peak, "sequence@0.5": peak},
    }  # fmt: skip


def test_powers_are_found():
    assert exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2)
    assert exponent([1, 2, 4], [5.0, 5.0, 5.0]) == 0
    assert exponent([1, 2, 4], [5.0, None, 5.0]) is None
    assert exponent([1, 2, 4], [5.0, 0.0, 5.0]) is None


def test_along_each_axis_with_three_points():
    cells = [cell(1, n, n**1.5, n**1.2, peak=n) for n in (128, 512, 2048)]
    cells += [cell(b, 128, b, b**0.5, None) for b in (4, 2)]
    found = slopes(cells)
    assert [(s.axis, s.fixed, s.low, s.high) for s in found] == [("context", 1, 128, 2048), ("batch", 128, 1, 4)]
    along, across = found
    assert (along.dense_time, along.time, along.memory) == pytest.approx((1.5, 1.2, 1.0))
    assert across.memory is across.dense_memory is None
    assert slopes(cells[:2]) == []
