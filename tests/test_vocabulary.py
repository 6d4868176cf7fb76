"""Rows of logits a few at a time give what whole ones do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynadepth import vocabulary
from dynadepth.tuning.objectives import Predictions, kl_sum
from dynadepth.vocabulary import few_rows, log_sums


@given(rows=st.integers(1, 9), width=st.integers(1, 12), held=st.integers(1, 40))
def test_every_row_comes_once_and_in_order(rows, width, held):
    one, other = torch.arange(rows * width).view(rows, width), torch.rand(rows, width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "CACHED", held)
        parts = list(few_rows(one, other))
    assert torch.equal(torch.cat([a for a, _ in parts]), one)
    assert torch.equal(torch.cat([b for _, b in parts]), other)
    assert all(len(a) == 1 or a.numel() <= held for a, _ in parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("held", [1, 33, 1 << 18])
def test_sums_and_distances_are_those_of_whole_rows(dtype, held, monkeypatch):
    monkeypatch.setattr(vocabulary, "CACHED", held)
    draw = torch.Generator().manual_seed(0)
    one, other = (5 * torch.randn(7, 11, generator=draw) for _ in range(2))
    one, other = one.to(dtype), other.to(dtype)
    torch.testing.assert_close(log_sums(one), one.float().logsumexp(-1))
    p, q = one.float().log_softmax(-1), other.float().log_softmax(-1)
    student = other.clone().requires_grad_()
    found = kl_sum(Predictions(one), Predictions(student))
    torch.testing.assert_close(found, (p.exp() * (p - q)).sum(), rtol=1e-5, atol=1e-5)
    found.backward()
    torch.testing.assert_close(student.grad, (q.exp() - p.exp()).to(dtype))
