"""`repeat`: a block that some rows execute twice, the second time on its own output. Each pass has keys and values of
its own: the second ones lie in a cache layer behind the model's, which exists only where some row repeats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynadepth.errors import ConfigError, UnsupportedCacheError
from dynadepth.routing.call import SublayerCall
from dynadepth.routing.context import ForwardContext, Injection

if TYPE_CHECKING:
    from dynadepth.routing.cache import RoutedCache
    from dynadepth.routing.sublayer import SublayerState


class SecondPass:
    """Stands in for the cache in a block's second pass: its keys and values go to the slot of that pass."""

    def __init__(self, cache: RoutedCache) -> None:
        self.cache = cache

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.cache.update(keys, values, self.cache.second_slot(layer_idx), *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.cache.get_seq_length(layer_idx)

    def __getattr__(self, name: str) -> Any:
        raise UnsupportedCacheError(
            f"This model's layers ask their cache for {name!r}, which a repeated layer cannot answer: execute them "
            "once, or skip them."
        )


def run_again(
    state: SublayerState, call: SublayerCall, result: Any, rows: bool | Tensor, context: ForwardContext
) -> Any:
    """`result`, the output of the first pass for the whole batch, with that of the second pass for `rows`: int64 index,
    True for all of them."""
    first = state.hidden_of(result)
    second = call.with_hidden(first)
    if isinstance(rows, Tensor):
        second = second.rows(rows)
    if context.cache is not None:
        if context.trace.prefill:
            slot = context.cache.second_slot(state.site.layer)
            route = context.book.routes[state.site]
            context.cache.admit(slot, [i for i, count in enumerate(route) if count > 1])
        second = second.with_cache(SecondPass(context.cache))
    output = state.hidden_of(second())

    def put(whole: Tensor, part: Tensor) -> Tensor:
        return whole.index_copy(0, rows, part.to(whole.dtype)) if isinstance(rows, Tensor) else part

    if state.wants_weights(context):
        context.attention_again[state.site.layer] = put
    output = put(first, output)
    return output if state.extras is None else (output, *result[1:])


def check_repeats(state: SublayerState, value: Injection) -> None:
    """Raises ConfigError where a given decision repeats a site that cannot, or is no number of executions."""
    times = torch.as_tensor(value)
    if times.dtype == torch.bool:
        return
    if times.numel() and not 0 <= int(times.min()) <= int(times.max()) <= 2:
        raise ConfigError(
            f"{state.site} cannot execute {int(times.max() if times.max() > 2 else times.min())} times: 0 skips, 1 "
            "executes, 2 repeats."
        )
    if times.numel() and int(times.max()) > 1:
        check_can_repeat(state.target.name, state.granularity.name, state.skip_path.name)


def check_can_repeat(target: str, granularity: str, skip_path: str) -> None:
    """Raises ConfigError where sublayers of this kind cannot execute twice."""
    if (target, granularity, skip_path) != ("block", "sequence", "identity"):
        raise ConfigError(
            "Only whole layers can repeat, decided once a sequence and skipped without a surrogate: target 'block', "
            f"granularity 'sequence' and skip_path 'identity', not {target!r}, {granularity!r} and {skip_path!r}."
        )
