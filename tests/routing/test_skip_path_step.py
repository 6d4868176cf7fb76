"""A skip path's short way through one token gives what the long one does."""

import pytest
import torch
from torch import nn

from dynadepth import fixed_routes, routing_of
from dynadepth.routing.skip_path import LinearPath, Memory, Reality
from small import ids, ragged, routed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("unit_input", [False, True])
@pytest.mark.parametrize("masked", [None, "all real", "ragged"])
def test_one_token_is_as_in_a_longer_forward(dtype, rows, unit_input, masked, monkeypatch):
    """With a mask, too, as a decode step of a padded batch has one: what padding computes may be nan, and leaves no
    trace; a row may still be without any token."""
    torch.manual_seed(rows)
    path = LinearPath(24, 5, unit_input).to(dtype)
    nn.init.normal_(path.write)
    nn.init.normal_(path.bias)
    prompt, hidden = torch.randn(rows, 9, 24).to(dtype).split([4, 5], 1)
    real = torch.ones(rows, 9, dtype=torch.bool)
    if masked == "ragged":
        real = torch.rand(rows, 9) < 0.5
        real[0, :6] = False  # begins behind the prompt
        hidden = hidden.masked_fill(~real[:, 4:, None], float("nan"))
        prompt = prompt.masked_fill(~real[:, :4, None], float("nan"))
    reality = None if masked is None else Reality.of(real[:, 4:])
    with torch.no_grad():
        _, start = path(prompt, Reality.of(real[:, :4]), path.begin(rows, prompt))
        together, after = path(hidden, reality, start)
        monkeypatch.setattr(LinearPath, "_after", lambda *_: pytest.fail("the long way"))
        short, memory = [], start
        for i, token in enumerate(hidden.split(1, 1)):
            mask = None if masked is None else Reality.of(real[:, 4 + i : 5 + i])
            contribution, memory = path(token, mask, memory)
            short.append(contribution)
    torch.testing.assert_close(torch.cat(short, 1)[real[:, 4:]], together[real[:, 4:]])
    for name in ("last", "total", "count"):
        torch.testing.assert_close(getattr(memory, name), getattr(after, name))
        assert getattr(memory, name).dtype == getattr(after, name).dtype


@pytest.mark.parametrize("masked", [False, True])
def test_tokens_that_do_not_take_the_path_are_remembered_one_by_one_as_together(masked):
    path, hidden = LinearPath(24, 5), torch.randn(3, 6, 24)
    real = torch.rand(3, 6) < 0.6 if masked else torch.ones(3, 6, dtype=torch.bool)
    with torch.no_grad():
        together = path.advance(hidden, Reality.of(real), path.begin(3, hidden))
        memory = path.begin(3, hidden)
        for i, token in enumerate(hidden.split(1, 1)):
            memory = path.advance(token, Reality.of(real[:, i : i + 1]) if masked else None, memory)
    for name in ("last", "total", "count"):
        torch.testing.assert_close(getattr(memory, name), getattr(together, name))


@pytest.mark.parametrize("granularity", ["sequence", "token"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_step_with_a_mask_takes_the_short_way(padded, granularity, monkeypatch):
    """Plain loops pass a mask of ones, padded batches one with zeros."""
    model = routed(granularity=granularity, skip_path="linear", skip_rank=3)
    batch = ragged((3, 7)) if padded else {"input_ids": ids(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    more = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    with torch.no_grad(), fixed_routes(model, {site: site.layer % 2 == 0 for site in routing_of(model).sites}):
        cache = model(**batch).past_key_values
        for name in ("extended", "without"):
            monkeypatch.setattr(Memory, name, lambda *_: pytest.fail("the long way"))
        model(input_ids=ids(2, 1), attention_mask=more, past_key_values=cache)


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
