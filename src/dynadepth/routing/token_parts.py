"""Token granularity under `project`, in parts: chosen tokens meet the keys up to the end of their part of the sequence
alone.

In one call the chosen tokens of a prefill meet the keys of all tokens, and a mask hides those that come later, where
the dense model's causal kernel never looks at them: with three quarters of the tokens chosen that is half as much
again as dense. Part by part it is little more than the causal half, and a sliding window's parts begin where it does.

Shape suffixes: B sequences, T tokens of this forward, n rows with executing tokens in a part, t tokens of the longest
of them there, d size of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dynadepth.routing.call import SublayerCall
from dynadepth.routing.context import ForwardContext
from dynadepth.routing.token_kv import (
    causal_mask,
    check_mask,
    chosen,
    fill_in,
    finished,
    place,
    project_skipped,
    queries_of,
)

if TYPE_CHECKING:
    from dynadepth.routing.sublayer import SublayerState

PARTS, LEAST = 4, 256
"""Of a long prefill, and positions of the shortest part. With more parts fewer keys are looked at in vain, but more
calls are made, each for so few queries that PyTorch's kernel for CPUs takes smaller steps."""


def part_length(state: SublayerState, call: SublayerCall, context: ForwardContext) -> int:
    """Positions of a part of this call; T where it is carried out in one."""
    length = call.hidden.shape[1]
    apart = (
        state.target.keeps_kv
        and state.kv_policy == "project"
        and length >= 2 * LEAST
        and not context.past
        and not state.wants_weights(context)
        and not torch.is_grad_enabled()  # what a part has read is written to by the next one
    )
    return max(LEAST, -(-length // PARTS)) if apart else length


def counted(execute: Tensor, part: int) -> Tensor:
    """How many tokens of `execute` `[B, T]` there are in each part of each sequence: int64 `[parts, B]`."""
    batch, length = execute.shape
    return pad(execute, (0, -length % part)).view(batch, -1, part).sum(2).T


def run_parts(
    state: SublayerState,
    call: SublayerCall,
    context: ForwardContext,
    execute: Tensor,
    counts: list[list[int]],
    part: int,
    weight: Tensor | None,
) -> Any:
    """As `run_tokens`, for `counts[number][row]` tokens in each part."""
    hidden, mask = call.hidden, call.attention_mask
    check_mask(mask)
    length = hidden.shape[1]
    kv = PartKV(state, call, execute, [sum(row) for row in zip(*counts, strict=True)])
    window = _window(state, context)
    output = state.target.canvas(hidden)
    for number, in_part in enumerate(counts):
        if not any(in_part):
            continue
        first, end = number * part, min((number + 1) * part, length)
        rows, index, valid = chosen(execute[:, first:end], in_part)
        index = index + first
        low = 0 if window is None else max(0, first - window + 1)
        kv.turn(rows, index, low, end)
        if mask is None:
            seen = causal_mask(state, hidden, index, torch.arange(low, end, device=hidden.device).unsqueeze(0))
        else:
            seen = queries_of(mask[..., low:end], len(hidden), rows, index)
        context.running[state.site.layer] = valid
        result = call.tokens(rows, index, seen).with_cache(kv)()
        place(state, hidden, output, result, rows, index, valid, weight)
    if context.cache is not None:
        context.cache.update(kv.keys, kv.values, state.site.layer)
    return state.wrap(finished(state, hidden, output, execute, context), None)


class PartKV:
    """Stands in for the cache in the calls of the parts: keeps the keys and values `[B, heads, T, d]` of all tokens,
    those of skipped ones from the beginning, and shows a part those up to its end."""

    def __init__(self, state: SublayerState, call: SublayerCall, execute: Tensor, counts: list[int]) -> None:
        batch, length = execute.shape
        rows, index, keys, values = project_skipped(state, call, execute, counts)
        self.keys, self.values = (t.new_empty(batch, t.shape[1], length, t.shape[3]) for t in (keys, values))
        fill_in(self.keys, rows, index, keys)
        fill_in(self.values, rows, index, values)

    def turn(self, rows: Tensor, index: Tensor, low: int, end: int) -> None:
        """The next call is for tokens `index` `[n, t]` of `rows`, which see keys from `low` to before `end`."""
        self.rows, self.index, self.low, self.end = rows, index, low, end

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values `[n, heads, t, d]` of a part's tokens to those `[n, heads, end - low, d]` they may see."""
        fill_in(self.keys, self.rows, self.index, keys)
        fill_in(self.values, self.rows, self.index, values)
        keys, values = (t[:, :, self.low : self.end] for t in (self.keys, self.values))
        return (keys, values) if len(self.rows) == len(keys) else (keys[self.rows], values[self.rows])


def _window(state: SublayerState, context: ForwardContext) -> int | None:
    """How many tokens this site's attention looks back, itself included; None for all, and where no cache tells."""
    if context.cache is None:
        return None
    layer = context.cache.layers[state.site.layer]
    return layer.sliding_window if getattr(layer, "is_sliding", False) else None
