"""A skip path's short way through one token gives what the long one does."""

import pytest
import torch
from torch import nn

from dynadepth.routing.skip_path import LinearPath, Reality


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("unit_input", [False, True])
def test_one_token_is_as_in_a_longer_forward(dtype, rows, unit_input, monkeypatch):
    torch.manual_seed(rows)
    path = LinearPath(24, 5, unit_input).to(dtype)
    nn.init.normal_(path.write)
    nn.init.normal_(path.bias)
    prompt, hidden = torch.randn(rows, 9, 24).to(dtype).split([4, 5], 1)
    with torch.no_grad():
        _, start = path(prompt, None, path.begin(rows, prompt))
        together, after = path(hidden, None, start)
        short, memory = [], start
        for token in hidden.split(1, 1):
            contribution, memory = path(token, None, memory)
            short.append(contribution)
        monkeypatch.setattr(path, "_step", lambda *_: pytest.fail("the long way has a mask to read"))
        long, other = [], start
        for token in hidden.split(1, 1):
            contribution, other = path(token, Reality.of(torch.ones(rows, 1, dtype=torch.bool)), other)
            long.append(contribution)
    torch.testing.assert_close(torch.cat(short, 1), torch.cat(long, 1))
    torch.testing.assert_close(torch.cat(short, 1), together)
    for one in (other, after):
        for name in ("last", "total", "count"):
            torch.testing.assert_close(getattr(memory, name), getattr(one, name))
            assert getattr(memory, name).dtype == getattr(one, name).dtype


def test_sums_are_float32_whatever_the_default_dtype(monkeypatch):
    """In bfloat16 a count of tokens stands still at 256."""
    path = LinearPath(24, 5)
    hidden = torch.randn(1, 300, 24).bfloat16()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = LinearPath(24, 5)
        _, memory = path.bfloat16()(hidden, None, path.begin(1, hidden))
        for token in hidden.split(1, 1):
            _, memory = path(token, None, memory)
    finally:
        torch.set_default_dtype(before)
    assert {parameter.dtype for parameter in made.parameters()} == {torch.float32}
    assert memory.total.dtype == memory.count.dtype == torch.float32
    assert memory.count.item() == 600
