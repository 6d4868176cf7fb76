"""Memory that a process keeps, gives back, and reports."""

from __future__ import annotations

import sys

import pytest
import torch

from dynadepth.benchmark import memory

MANY = 64 * 2**20


def in_use() -> int:
    return memory._status_bytes("VmRSS")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_stays_until_a_peak_is_asked_for() -> None:
    if memory.reset_resident_peak() is None:
        pytest.skip("this system forbids the reset of the high-water mark")
    before = in_use()
    with memory.keeping_freed():
        torch.ones(MANY // 4)
        assert in_use() - before > MANY // 2  # gone, and kept
        watch = memory.peak_watch(torch.device("cpu"))
        assert in_use() - before < MANY // 2  # given back
        torch.ones(MANY // 4)
        assert MANY // 2 < (watch() or 0) < 2 * MANY
        assert in_use() - before > MANY // 2
    assert in_use() - before < MANY // 2
    torch.ones(MANY // 4)
    assert in_use() - before < MANY // 2  # as the C library does by itself
