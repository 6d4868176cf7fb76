"""Twins: copies of a decoder layer on the same parameters, without routing and hooks, whose skipped sublayer is
replaced by its skip path. What `torch.compile` sees has no decision left in it.

A twin shares the parameter *dictionaries* of the layer, so that weights that are replaced, moved or merged later are
the twin's, too, and every module inside that needs no change. `Origin` tells when the rest of the layer has changed.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dynadepth.compiled.attention import asks_by_head, grouped_config
from dynadepth.lora import RoutedLora
from dynadepth.routing.call import CACHE_NAMES, SublayerCall
from dynadepth.routing.experts import WatchedGate
from dynadepth.routing.skip_path import Memory, Reality
from dynadepth.routing.sublayer import PATH, ROUTER, EntryNorm, RoutedNorm, RoutedSublayer, SublayerState, restore_class

MIXINS = (RoutedSublayer, RoutedNorm, EntryNorm, RoutedLora, WatchedGate)
"""What routing puts before classes of modules inside a layer."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
PLAN = "compiled_plan"
"""Name of the attribute of a compiled layer that has its twins."""


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
    """Stands for an attention that some rows execute and the others skip, and for the norm behind it, if any."""

    def __init__(self, attention: nn.Module, state: SublayerState, norm: nn.Module | None) -> None:
        super().__init__()
        self.attention, self.skipped, self.norm = attention, Skipped(state), norm

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        rows = store_of(kwargs).rows
        assert rows is not None
        executing, skipping = rows
        call = SublayerCall(self.attention, (), {"hidden_states": hidden_states, **kwargs}).rows(executing)
        result = call()
        output = result if self.skipped.extras is None else result[0]
        if self.norm is not None:
            output = self.norm(output)
        whole = hidden_states.new_zeros(hidden_states.shape).index_copy(0, executing, output)
        contribution = self.skipped.contribution(hidden_states.index_select(0, skipping), kwargs)
        if contribution is not None:
            whole = whole.index_copy(0, skipping, contribution)
        return self.skipped.wrapped(whole)


def twin_of(module: nn.Module, replaced: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """A copy of a module tree on the same parameters, with some modules replaced, whose attention is asked by groups of
    heads. Modules below the top that need no change are shared."""
    children = {
        name: child if child is None else replaced[child] if child in replaced else _shared(child, replaced)
        for name, child in module._modules.items()
        if name not in (ROUTER, PATH)
    }
    twin = copy.copy(module)
    routed = next((mixin for mixin in MIXINS if isinstance(module, mixin)), None)
    if routed is not None:
        restore_class(twin, routed)
        for name in ("depth_state", "depth_owner", "depth_entry"):
            vars(twin).pop(name, None)
    if asks_by_head(module):
        vars(twin)["config"] = grouped_config(module.config)
    twin.training = False
    for hooks in HOOKS:
        vars(twin)[hooks] = OrderedDict()
    vars(twin)["_modules"] = children
    return twin


def _shared(module: nn.Module, replaced: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """The module itself, or its twin where a module inside needs a change."""
    return twin_of(module, replaced) if any(m in replaced or _needs_copy(m) for m in module.modules()) else module


def _needs_copy(module: nn.Module) -> bool:
    return isinstance(module, MIXINS) or asks_by_head(module) or any(vars(module)[hooks] for hooks in HOOKS)


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The modules inside, but routers and skip paths, which twins have not."""
    for name, child in module._modules.items():
        if child is not None and name not in (ROUTER, PATH):
            yield child
            yield from _parts(child)


class Origin:
    """What a layer was when its twins were made. It holds no reference to the layer."""

    def __init__(self, layer: nn.Module) -> None:
        self.parts = list(_parts(layer))
        adapters = {part for lora in self.parts if isinstance(lora, RoutedLora) for part in (lora, *_parts(lora))}
        near = [part for part in self.parts if part not in adapters]
        self.copied = [part for part in near if _needs_copy(part)]
        self.children = [part._modules for part in near if part._modules]
        self.was = _attributes(layer)
        self.copied_were, self.parts_were = ([_attributes(part) for part in some] for some in (self.copied, self.parts))
        self.children_were = [dict(children) for children in self.children]
        self.grouped = [part for part in self.parts if asks_by_head(part)]
        self.handles = RemovableHandle.next_id

    def holds(self, layer: nn.Module, thoroughly: bool) -> bool:
        """Is the layer what it was? `thoroughly`: in everything; else in what twins do not share: its modules, and the
        attributes of those that were copied. Where a hook was registered anywhere it is looked at thoroughly."""
        own = dict(vars(layer))
        own.pop(PLAN, None)
        try:
            if own != self.was or self.children != self.children_were:
                return False
            if not thoroughly and self.handles == RemovableHandle.next_id:
                return _vars(self.copied) == self.copied_were
            handles = RemovableHandle.next_id
            if _vars(self.parts) != self.parts_were or not all(map(asks_by_head, self.grouped)):
                return False
        except (RuntimeError, ValueError):  # an attribute that is another tensor or array than before
            return False
        self.handles = handles
        return True


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What a module has, apart from the module."""
    return {
        name: value.copy() if name in ("_modules", *HOOKS) else value
        for name, value in vars(module).items()
        if name != PLAN
    }


def _vars(modules: Iterable[nn.Module]) -> list[dict[str, Any]]:
    return [vars(module) for module in modules]


def obstacle(layer: nn.Module) -> str | None:
    """Why a twin would not do what the layer does, in a few words; None where it would."""
    for name, module in layer.named_modules():
        if "forward" in vars(module) or "_old_forward" in vars(module):
            return f"{name or type(layer).__name__} has a forward of its own (accelerate's hooks set one)"
        if not isinstance(module, RoutedLora) and any(c.__module__.startswith("peft.") for c in type(module).__mro__):
            return f"{name or type(layer).__name__} is an adapter of PEFT's, which may change at any step"
        for kind in HOOKS:
            for hook in vars(module)[kind].values():
                if not getattr(hook, "__module__", "").startswith(("transformers.utils.", "dynadepth.")):
                    return f"{name or type(layer).__name__} has a forward hook"
    return None
