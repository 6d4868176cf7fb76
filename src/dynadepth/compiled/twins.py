"""Twins: copies of a decoder layer on the same parameters, without routing and hooks, whose skipped sublayer is
replaced by its skip path. What `torch.compile` sees has no decision left in it.

A twin shares the parameter *dictionaries* of the layer, so that weights that are replaced, moved or merged later are
the twin's, too.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dynadepth.lora import RoutedLora
from dynadepth.routing.call import CACHE_NAMES, SublayerCall
from dynadepth.routing.experts import WatchedGate
from dynadepth.routing.skip_path import Memory, Reality
from dynadepth.routing.sublayer import PATH, ROUTER, RoutedNorm, RoutedSublayer, SublayerState, restore_class

MIXINS = (RoutedSublayer, RoutedNorm, RoutedLora, WatchedGate)
"""What routing puts before classes of modules inside a layer."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class StepStore:
    """What one layer sees as its cache during one step of one token.

    `keys`, `values` `[rows, heads, tokens, head size]`: the last place is still to be written. `memory`, `reality`: of
    a skip path that streams, `memory` its new one after the step. `rows`: int64 indices of the rows that execute and of
    those that skip, where they differ.
    """

    def __init__(
        self,
        keys: Tensor | None,
        values: Tensor | None,
        memory: tuple[Tensor, ...] | None = None,
        reality: tuple[Tensor, ...] | None = None,
        rows: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.keys, self.values, self.memory, self.reality, self.rows = keys, values, memory, reality, rows

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As a cache layer's."""
        assert self.keys is not None
        assert self.values is not None
        last = self.keys.shape[2] - 1
        self.keys.narrow(2, last, 1).copy_(keys)
        self.values.narrow(2, last, 1).copy_(values)
        return self.keys, self.values


def store_of(kwargs: dict[str, Any]) -> StepStore:
    """The store among a sublayer's arguments."""
    return next(kwargs[name] for name in CACHE_NAMES if name in kwargs)


class Skipped(nn.Module):
    """Stands for a sublayer that is skipped: its skip path, or nothing."""

    def __init__(self, state: SublayerState) -> None:
        super().__init__()
        self.path, self.target = state.skip_path, state.target
        self.streams, self.extras = state.skip_path.streams, state.extras

    def contribution(self, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """The skip path's part, whose memory in the store moves on; None for nothing."""
        if not self.streams:
            return None
        store = store_of(kwargs)
        assert store.memory is not None
        last, total, count = store.memory
        reality = None if store.reality is None else Reality(*store.reality)
        contribution, after = self.path(hidden, reality, Memory(last, total, count))
        store.memory = (after.last, after.total, after.count)
        return contribution

    def wrapped(self, output: Tensor) -> Any:
        """As the host expects it."""
        return output if self.extras is None else (output, *[None] * self.extras)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        return self.wrapped(self.target.skipped(hidden_states, self.contribution(hidden_states, kwargs)))


class Parted(nn.Module):
    """Stands for an attention that some rows execute and the others skip."""

    def __init__(self, attention: nn.Module, state: SublayerState) -> None:
        super().__init__()
        self.attention, self.skipped = attention, Skipped(state)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        rows = store_of(kwargs).rows
        assert rows is not None
        executing, skipping = rows
        call = SublayerCall(self.attention, (), {"hidden_states": hidden_states, **kwargs}).rows(executing)
        result = call()
        output = result if self.skipped.extras is None else result[0]
        whole = hidden_states.new_zeros(hidden_states.shape).index_copy(0, executing, output)
        contribution = self.skipped.contribution(hidden_states.index_select(0, skipping), kwargs)
        if contribution is not None:
            whole = whole.index_copy(0, skipping, contribution)
        return self.skipped.wrapped(whole)


def twin_of(module: nn.Module, replaced: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """A copy of a module tree on the same parameters, with some modules replaced."""
    if module in replaced:
        return replaced[module]
    twin = copy.copy(module)
    routed = next((mixin for mixin in MIXINS if isinstance(module, mixin)), None)
    if routed is not None:
        restore_class(twin, routed)
        for name in ("depth_state", "depth_owner"):
            vars(twin).pop(name, None)
    twin.training = False
    for hooks in HOOKS:
        vars(twin)[hooks] = OrderedDict()
    vars(twin)["_modules"] = {
        name: child if child is None else twin_of(child, replaced)
        for name, child in module._modules.items()
        if name not in (ROUTER, PATH)
    }
    return twin


def obstacle(layer: nn.Module) -> str | None:
    """Why a twin would not do what the layer does, in a few words; None where it would."""
    for name, module in layer.named_modules():
        if "forward" in vars(module) or "_old_forward" in vars(module):
            return f"{name or type(layer).__name__} has a forward of its own (accelerate's hooks set one)"
        for kind in HOOKS:
            for hook in vars(module)[kind].values():
                if not getattr(hook, "__module__", "").startswith(("transformers.utils.", "dynadepth.")):
                    return f"{name or type(layer).__name__} has a forward hook"
    return None
