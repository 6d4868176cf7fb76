"""Decoder layers whose step of one token is compiled, in forms that all layers alike share: executed by every row,
skipped by every row, executed by some.

`CompiledLayer` is mixed into a layer's class. Where a call is one token on a filled cache, without gradients, and the
layer's route is known, the compiled form runs; everything else (prefill, training, recorded attentions, other caches)
takes the ordinary way.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.utils.output_capturing import _active_collector

from dynadepth.compiled.kernel import MOST_ROWS
from dynadepth.compiled.twins import PLAN, Origin, Parted, Skipped, StepStore, obstacle, twin_of
from dynadepth.routing.cache import RoutedCache
from dynadepth.routing.call import CACHE_NAMES, named
from dynadepth.routing.context import ForwardContext, current
from dynadepth.routing.experts import WatchedGate
from dynadepth.routing.roomy import ROOMY, Room
from dynadepth.routing.skip_path import Memory
from dynadepth.routing.sublayer import SublayerState, restore_class

Step = Callable[..., tuple[Any, tuple[Tensor, ...] | None]]


def step(
    twin: nn.Module,
    hidden: Tensor,
    store: tuple[Any, ...],
    cache_name: str,
    others: dict[str, Any],
) -> tuple[Any, tuple[Tensor, ...] | None]:
    """One token of one layer: what the layer returns, and what its skip path remembers. `store`: the parts of a
    `StepStore`, whose keys and values get the token's."""
    held = StepStore(*store)
    output = twin(hidden, **{cache_name: held}, **others)
    return output, held.memory


SETTLED = frozenset(
    {
        "BUILTIN_MATCH",
        "CLASS_MATCH",
        "CLOSURE_MATCH",
        "EMPTY_NN_MODULE_HOOKS_DICT",
        "FUNCTION_MATCH",
        "HASATTR",
        "MODULE_MATCH",
        "NOT_PRESENT_IN_GENERIC_DICT",
    }
)
"""Kinds of guards of what no caller changes: code, and attributes that twins do not have."""
TELLING = frozenset({"BUILTIN_MATCH", "CLASS_MATCH", "CLOSURE_MATCH", "FUNCTION_MATCH", "HASATTR"})
"""Those kinds that tell layers apart by a twin's attribute: a function, as an activation may be, or missing."""


def compiled_step() -> Step:
    """`step`, compiled. A function object of its own: PyTorch limits how many versions of one function it keeps.

    Every call of every layer is checked against what it was compiled for; left out is what cannot change without the
    program itself changing (two thirds of the checks): globals of modules, and the kinds of `SETTLED`, unless they tell
    layers apart. What was compiled does not check sizes once more.
    """
    own: Any = FunctionType(step.__code__.replace(), step.__globals__, step.__name__, step.__defaults__)
    asserts: dict[str, Any] = {"size_asserts": False, "alignment_asserts": False, "scalar_asserts": False}
    return torch.compile(own, fullgraph=True, options={"guard_filter_fn": _matters, **asserts})


def _matters(guards: Any) -> list[bool]:
    return [_own(guard) or not (guard.name.startswith("G[") or guard.guard_type in SETTLED) for guard in guards]


def _own(guard: Any) -> bool:
    """Does it tell layers apart by an attribute?"""
    return guard.guard_type in TELLING and guard.name.startswith("twin.")


class Steps:
    """What the layers of one compiled model share. `failed`: compiling did not work here, so it is not tried again.
    `left`: it was said that a layer is no longer compiled."""

    def __init__(self, routing: Any, make: Callable[[], Step] = compiled_step) -> None:
        self.routing, self.failed, self.left = routing, False, False
        self.reset(make)

    def reset(self, make: Callable[[], Step]) -> None:
        """Forgets every version; new ones come from `make`."""
        self.make = make
        self._forms: dict[tuple[Any, ...], Step] = {}

    def run(self, form: str, twin: nn.Module, hidden: Tensor, store: tuple[Any, ...], *given: Any) -> Any:
        """`step` in the form's compiled version; None where compiling fails, which is said once.

        One version serves every length, every number of rows of a size (`_size`), and all layers alike.
        """
        others, counted = given[-1], () if store[4] is None else tuple(_size(len(rows)) for rows in store[4])
        key = (form, _size(len(hidden)), others.get("attention_mask") is None, counted)
        run = self._forms.get(key)
        if run is None:
            run = self._forms[key] = self.make()
        for tensor, dim in ((store[0], 2), (store[1], 2), (others.get("attention_mask"), 3)):
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
        if store[4] is not None:
            for tensor in (store[0], store[1], *store[4], *(store[2] or ()), *(store[3] or ())):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        try:
            return run(twin, hidden, store, *given)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            self.failed = True
            said = [line for line in str(error).strip().splitlines() if line]
            why = said[1] if len(said) > 1 and said[0].startswith("backend=") else "".join(said[:1])
            warnings.warn(
                f"torch.compile failed here ({type(error).__name__}: {why}): this model goes on uncompiled, with the "
                "same results; dynadepth.uncompile(model) silences this.",
                UserWarning,
                stacklevel=2,
            )
            return None


def _size(rows: int) -> int:
    """What of a number of rows the products of few rows ask: one, a few, more."""
    return 0 if rows == 1 else 1 if rows <= MOST_ROWS else 2


class Plan:
    """What a compiled layer knows: its place, a twin for each form, and where its route is found. `norm`: name of the
    norm between its routed module and the residual stream, where it has one."""

    def __init__(self, index: int, layer: nn.Module, steps: Steps, state: SublayerState | None, norm: Any) -> None:
        self.index, self.steps, self.state, self.norm = index, steps, state, norm
        self.make_twins(layer)

    def make_twins(self, layer: nn.Module) -> None:
        """Twins of the layer as it is now; where they would not do what it does it is said once, and none is run."""
        state = self.state
        norm = None if self.norm is None else getattr(layer, self.norm)
        carriers = [m for m in layer.modules() if getattr(m, "depth_state", None) is state and m is not norm]
        why = obstacle(layer)
        if state is not None and not carriers:
            why = f"the routed {state.target.name} was replaced"
        self.blocked = why is not None
        if self.blocked and not self.steps.left:
            self.steps.left = True
            warnings.warn(
                f"Layer {self.index} changed after dynadepth.compile ({why}): such layers go on uncompiled, with the "
                "results of an uncompiled model. Take it off, or call dynadepth.uncompile(model).",
                UserWarning,
                stacklevel=2,
            )
        self.origin = Origin(layer)
        self.watched = any(isinstance(module, WatchedGate) for module in layer.modules())
        self.executed = _twin(layer, {})
        self.skipped: nn.Module | None = None
        self.parted: nn.Module | None = None
        if self.blocked or state is None or state.target.name == "block" or not state.granularity.sticky:
            return  # a skipped block is nothing to compile
        routed = carriers[0]
        streams = state.skip_path.streams
        if not streams or state.target.keeps_kv:  # an MLP is given no cache to remember in
            replaced: dict[nn.Module, nn.Module] = {routed: Skipped(state)}
            if norm is not None:
                replaced[norm] = nn.Identity()
            self.skipped = _twin(layer, replaced)
        if state.target.keeps_kv:
            part = Parted(twin_of(routed, {}), state, None if norm is None else twin_of(norm, {}))
            self.parted = _twin(layer, {routed: part} if norm is None else {routed: part, norm: nn.Identity()})

    def run(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any] | None:
        """The layer's output in a tuple, or None where the ordinary way has to be taken."""
        hidden = args[0] if args else kwargs.get("hidden_states")
        if self.steps.failed or not isinstance(hidden, Tensor):
            return None
        if not self.origin.holds(layer, thoroughly=hidden.shape[1] != 1):  # several tokens: a prefill, before any step
            self.make_twins(layer)
        if (
            self.blocked
            or hidden.shape[1] != 1
            or torch.is_grad_enabled()
            or _active_collector.get()  # outputs of the modules inside are recorded
        ):
            return None
        name = next((name for name in CACHE_NAMES if name in kwargs), None)
        cache = None if name is None else kwargs[name]
        if name is None or not isinstance(cache, DynamicCache) or cache.offloading or self.index >= len(cache.layers):
            return None
        others = {key: value for key, value in kwargs.items() if key not in (name, "hidden_states")}
        state, context, routing = self.state, current(), self.steps.routing
        if isinstance(cache, RoutedCache) and (context is None or context.cache is not cache):
            return None  # which refuses a cache of another forward's
        ours = context is not None and context.owner is routing
        if not ours and routing is not None and routing.lora is not None:
            return None  # the forms have it, a forward of the base alone does not
        if ours and self.watched:
            return None  # routing follows, or changes, what the gate of a mixture chooses
        if state is None or context is None or not ours:
            return self._executed(hidden, cache, name, others)
        if (
            context.cache is not cache
            or not state.granularity.sticky
            or context.trace.prefill
            or (context.book.repeating and context.book.rows(state.site, hidden.device, times=2) is not False)
            or context.masked
            or context.output_attentions
        ):
            return None
        rows = context.book.rows(state.site, hidden.device)
        context.trace.routes[state.site] = context.book.routes[state.site]
        if rows is True:
            return self._executed(hidden, cache, name, others)
        return self._routed(state, context, None if rows is False else rows, hidden, name, others)

    def _executed(self, hidden: Tensor, cache: Any, name: str, others: dict[str, Any]) -> tuple[Any] | None:
        layer = self._room(cache, len(hidden), hidden)
        if layer is None:
            return None
        keys, values = layer.extended(1)
        result = self.steps.run("executed", self.executed, hidden, (keys, values, None, None, None), name, others)
        if result is None:
            return None
        layer.accept(keys, values)
        return (result[0],)

    def _routed(
        self,
        state: SublayerState,
        context: ForwardContext,
        executing: Any,
        hidden: Tensor,
        name: str,
        others: dict[str, Any],
    ) -> tuple[Any] | None:
        """All rows skip, or all but the rows `executing` (int64 index)."""
        twin = self.skipped if executing is None else self.parted
        if twin is None:
            return None
        layer = keys = values = memory = reality = rows = None
        if executing is not None or not state.target.keeps_kv:
            layer = self._room(context.cache, len(hidden) if executing is None else len(executing), hidden)
            if layer is None:
                return None
        numbers: Any = range(len(hidden))
        index = None
        if executing is not None:
            numbers, index = context.book.skipping(state.site, hidden.device)
            rows = (executing, index)
        if state.skip_path.streams:
            held = context.memory(state, numbers, hidden)
            if held is None or held.past is not None:  # it records what it may have to take back
                return None
            memory = (held.last, held.total, held.count)
            if not context.unpadded and context.token_mask is not None and hidden.device.type == "cpu":
                context.unpadded = bool(context.token_mask.all())  # on a CPU asking costs less than masking does
            found = context.reality_of(index)
            reality = None if found is None else (found.real, found.previous, found.count)
        if layer is not None:
            keys, values = layer.extended(1)
        form = "skipped" if executing is None else "parted"
        result = self.steps.run(form, twin, hidden, (keys, values, memory, reality, rows), name, others)
        if result is None:
            return None
        if layer is not None:
            layer.accept(keys, values)
        if result[1] is not None:
            context.remember(state.site, numbers, Memory(*result[1]))
        return (result[0],)

    def _room(self, cache: Any, rows: int, hidden: Tensor) -> Any:
        """The layer of the cache, with room for a token of so many rows; None for one that has none to give."""
        layer = cache.layers[self.index]
        kind = ROOMY.get(type(layer))
        if kind is not None:
            layer.__class__ = kind
        if (
            not isinstance(layer, Room)
            or not layer.is_initialized
            or len(layer.keys) != rows
            or layer.keys.device != hidden.device
            or getattr(layer, "record_past", False)
            or not layer.roomy(layer.keys)
        ):
            return None
        return layer


def _twin(layer: nn.Module, replaced: dict[nn.Module, nn.Module]) -> nn.Module:
    """The twin of a layer, which may be compiled already."""
    twin = twin_of(layer, replaced)
    if isinstance(twin, CompiledLayer):
        restore_class(twin, CompiledLayer)
    vars(twin).pop(PLAN, None)
    return twin


class CompiledLayer:
    """Mixin put before a decoder layer's class. `compiled_plan` is a plain attribute."""

    compiled_plan: Plan

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = named(super().forward, args, kwargs)  # type: ignore[misc]  # mixed into a layer's class
        output = None if self.training else self.compiled_plan.run(self, args, kwargs)  # type: ignore[arg-type,attr-defined]  # mixed into a layer's class
        return super().forward(*args, **kwargs) if output is None else output[0]  # type: ignore[misc]  # mixed into a layer's class
