"""Decoder layers whose step of one token is compiled: an executed form and a skipped form, shared by all layers alike.

`CompiledLayer` is mixed into a layer's class. Where a call is one token on a filled cache, without gradients, and the
layer's route is known and the same for all rows, the compiled form runs; everything else (prefill, training, rows that
differ, recorded attentions, other caches) takes the ordinary way.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.utils.output_capturing import _active_collector

from dynadepth.compiled.twins import Skipped, StepStore, twin_of
from dynadepth.routing.call import CACHE_NAMES
from dynadepth.routing.context import ForwardContext, current
from dynadepth.routing.decision import Site
from dynadepth.routing.roomy import ROOMY, Room
from dynadepth.routing.skip_path import Memory
from dynadepth.routing.sublayer import SublayerState

Step = Callable[..., tuple[Any, tuple[Tensor, ...] | None]]


def step(
    twin: nn.Module,
    hidden: Tensor,
    keys: Tensor | None,
    values: Tensor | None,
    memory: tuple[Tensor, ...] | None,
    reality: tuple[Tensor, ...] | None,
    cache_name: str,
    others: dict[str, Any],
) -> tuple[Any, tuple[Tensor, ...] | None]:
    """One token of one layer: what the layer returns, and what its skip path remembers. `keys` and `values` get it."""
    store = StepStore(keys, values, memory, reality)
    output = twin(hidden, **{cache_name: store}, **others)
    return output, store.memory


def compiled_step() -> Step:
    """`step`, compiled once for each form and kind of layer. A function object of its own: PyTorch limits how many
    versions of one function it keeps, and two compiled models must not share that limit."""
    own: Any = FunctionType(step.__code__.replace(), step.__globals__, step.__name__, step.__defaults__)
    return torch.compile(own, fullgraph=True)


@dataclass
class Steps:
    """What the layers of one compiled model share. `failed`: compiling did not work here, so it is not tried again."""

    routing: Any
    executed: Step = field(default_factory=compiled_step)
    skipped: Step = field(default_factory=compiled_step)
    failed: bool = False

    def fail(self, error: Exception) -> None:
        """Says once that the ordinary way is taken from now on."""
        self.failed = True
        said = str(error).strip().splitlines()
        warnings.warn(
            f"torch.compile failed here ({type(error).__name__}: {said[0] if said else 'no message'}): this model "
            "goes on uncompiled, with the same results; `dynadepth.uncompile(model)` silences this.",
            UserWarning,
            stacklevel=2,
        )


class Plan:
    """What a compiled layer knows: its place, its two twins, and where its route is found."""

    def __init__(self, index: int, layer: nn.Module, steps: Steps, state: SublayerState | None, norm: Any) -> None:
        self.index, self.steps, self.state = index, steps, state
        self.site: Site | None = None if state is None else state.site
        self.executed = twin_of(layer, {})
        self.skipped: nn.Module | None = None
        if state is not None and state.target.name != "block" and state.granularity.sticky:
            routed = next(m for m in layer.modules() if getattr(m, "depth_state", None) is state and m is not norm)
            if not (state.skip_path.streams and not state.target.keeps_kv):  # an MLP is given no cache to remember in
                replaced: dict[nn.Module, nn.Module] = {routed: Skipped(state)}
                if state.post_norm and norm is not None:
                    replaced[norm] = nn.Identity()
                self.skipped = twin_of(layer, replaced)
        self.skips_kv = state is not None and state.target.keeps_kv

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any] | None:
        """The layer's output in a tuple, or None where the ordinary way has to be taken."""
        hidden = args[0] if args else kwargs.get("hidden_states")
        if (
            len(args) > 1
            or self.steps.failed
            or not isinstance(hidden, Tensor)
            or hidden.shape[1] != 1
            or torch.is_grad_enabled()
            or _active_collector.get()  # outputs of the modules inside are recorded
        ):
            return None
        name = next((name for name in CACHE_NAMES if name in kwargs), None)
        cache = None if name is None else kwargs[name]
        if name is None or not isinstance(cache, DynamicCache) or cache.offloading or self.index >= len(cache.layers):
            return None
        context = current()
        executes = True
        if self.state is not None and context is not None and context.owner is self.steps.routing:
            route = self._route(context, cache, hidden)
            if route is None:
                return None
            executes = route
        others = {key: value for key, value in kwargs.items() if key not in (name, "hidden_states")}
        return (
            self._execute(hidden, cache, name, others) if executes else self._skip(hidden, cache, name, others, context)
        )

    def _route(self, context: ForwardContext, cache: Any, hidden: Tensor) -> bool | None:
        """Do all rows execute, or none? None where they differ, or where it is not known yet."""
        assert self.state is not None
        assert self.site is not None
        if (
            context.cache is not cache
            or not self.state.granularity.sticky
            or context.trace.prefill
            or context.masked
            or context.output_attentions
        ):
            return None
        rows = context.book.rows(self.site, hidden.device)
        if isinstance(rows, Tensor) or (not rows and self.skipped is None):
            return None
        context.trace.routes[self.site] = context.book.routes[self.site]
        return rows

    def _execute(self, hidden: Tensor, cache: Any, name: str, others: dict[str, Any]) -> tuple[Any] | None:
        layer = self._room(cache, hidden)
        if layer is None:
            return None
        keys, values = layer.extended(1)
        result = self._call(self.steps.executed, self.executed, hidden, keys, values, None, None, name, others)
        if result is None:
            return None
        layer.accept(keys, values)
        return (result[0],)

    def _skip(
        self, hidden: Tensor, cache: Any, name: str, others: dict[str, Any], context: ForwardContext | None
    ) -> tuple[Any] | None:
        state, site, twin = self.state, self.site, self.skipped
        assert context is not None
        assert state is not None
        assert site is not None
        assert twin is not None
        layer = keys = values = memory = reality = None
        if not self.skips_kv:
            layer = self._room(cache, hidden)
            if layer is None:
                return None
            keys, values = layer.extended(1)
        rows = range(len(hidden))
        if state.skip_path.streams:
            held = context.memory(state, rows, hidden)
            if held is None or held.past is not None:  # it records what it may have to take back
                return None
            memory = (held.last, held.total, held.count)
            found = context.reality_of(None)
            reality = None if found is None else (found.real, found.previous, found.count)
        result = self._call(self.steps.skipped, twin, hidden, keys, values, memory, reality, name, others)
        if result is None:
            return None
        if layer is not None:
            layer.accept(keys, values)
        if result[1] is not None:
            context.remember(site, rows, Memory(*result[1]))
        return (result[0],)

    def _room(self, cache: Any, hidden: Tensor) -> Any:
        """The layer of the cache, with room for a token of every row; None for one that has none to give."""
        layer = cache.layers[self.index]
        kind = ROOMY.get(type(layer))
        if kind is not None:
            layer.__class__ = kind
        if (
            not isinstance(layer, Room)
            or not layer.is_initialized
            or len(layer.keys) != len(hidden)
            or layer.keys.device != hidden.device
            or getattr(layer, "record_past", False)
            or not layer.roomy(layer.keys)
        ):
            return None
        return layer

    def _call(self, run: Step, twin: nn.Module, *inputs: Any) -> tuple[Any, Any] | None:
        *_, others = inputs
        for tensor, dim in ((inputs[1], 2), (inputs[2], 2), (others.get("attention_mask"), 3)):
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)  # the cache grows: one version for every length
        try:
            return run(twin, *inputs)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            self.steps.fail(error)
            return None


class CompiledLayer:
    """Mixin put before a decoder layer's class. `compiled_plan` is a plain attribute."""

    compiled_plan: Plan

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = None if self.training else self.compiled_plan.run(args, kwargs)  # type: ignore[attr-defined]
        return super().forward(*args, **kwargs) if output is None else output[0]  # type: ignore[misc]
