"""Routes a model's own sublayer in place: the module keeps its identity, parameters and names; only its class changes.

`routed_class(LlamaAttention)` is a subclass of `LlamaAttention` with the same name whose `forward` asks the forward in
progress (`context.current()`) what to run. Outside a routed forward it is the base module.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from dynadepth.routing.call import SublayerCall, named
from dynadepth.routing.context import ForwardContext, Injection, current
from dynadepth.routing.decision import RoutingDecision, Site
from dynadepth.routing.granularity import Granularity
from dynadepth.routing.router import AbstractRouter
from dynadepth.routing.skip_path import AbstractSkipPath, IdentityPath
from dynadepth.routing.target import Target

ROUTER = "depth_router"
"""Name of the router as a child of the routed module."""
PATH = "depth_path"
"""Name of the skip path as a child of the routed module, where it has parameters."""


def is_attached_name(name: str) -> bool:
    """Is a parameter of this name one of ours, not of the base model?"""
    return not {ROUTER, PATH}.isdisjoint(name.split("."))


@dataclass
class SublayerState:
    """What a routed module knows of its site. `extras`: elements behind the hidden states in its output tuple; None
    where it returns a bare tensor (learnt by the probe). `project`: keys and values of given tokens, see `token_kv`."""

    owner: Any
    site: Site
    router: AbstractRouter
    granularity: Granularity
    target: Target
    kv_policy: str
    config: Any
    extras: int | None = 0
    project: Callable[[Tensor, Any], tuple[Tensor, Tensor]] | None = None
    skip_path: AbstractSkipPath = field(default_factory=IdentityPath)
    post_norm: bool = False
    """Does the host norm the module's output before adding it? A skip path stands for what is added, so it must get
    around that norm, and zeros, which it leaves alone, need not go through it (see `RoutedNorm`)."""

    def known(self, context: ForwardContext) -> Injection | None:
        """The decision that needs no router: injected, or constant; None where the router must be asked."""
        given = context.given(self.site)
        if given is not None:
            return given
        needed = self.router.asked or self.router.weighs or context.masked
        return self.router.constant if needed else True

    # ---- the form of the module's output

    def hidden_of(self, result: Any) -> Tensor:
        return result if self.extras is None else result[0]

    def wrap(self, hidden: Tensor, weights: Tensor | None) -> Any:
        """`hidden` as the host expects it, with the attention weights where it asked for them."""
        if self.extras is None:
            return hidden
        return (hidden, weights, *[None] * (self.extras - 1)) if self.extras else (hidden,)

    # ---- the three ways to carry out a decision

    def run_all(self, call: SublayerCall, context: ForwardContext, weight: Tensor | None = None) -> Any:
        """Every unit executes: the base module's own call, bit for bit, unless what it contributes has a weight."""
        if self.wants_weights(context) and self.target.name == "block":
            context.attention_fixes[self.site.layer] = _unchanged
        result = call()
        if weight is None:
            return result
        output = self.target.weighted(call.hidden, self.hidden_of(result), weight)
        return output if self.extras is None else (output, *result[1:])

    def skip_all(self, call: SublayerCall, context: ForwardContext) -> Any:
        """No unit executes: no kernel of the base module runs."""
        hidden = call.hidden
        weights = None
        if self.wants_weights(context):
            weights = self.zero_weights(hidden, context)
            if self.target.name == "block":
                context.attention_fixes[self.site.layer] = weights
        contribution = self.contribution(hidden, context)
        if self.post_norm:
            context.after_norm[self.site] = _past_the_norm
        return self.wrap(self.target.skipped(hidden, contribution), weights)

    def idle(self, hidden: Tensor, context: ForwardContext) -> Any:
        """As `skip_all`, where the path is the identity and no weights are wanted. Zeros are made once a forward."""
        if self.target.name == "block":
            return self.wrap(hidden, None)
        if self.post_norm:
            context.after_norm[self.site] = _past_the_norm
        zeros = context.zeros
        if zeros is None or zeros.shape != hidden.shape or zeros.device != hidden.device or zeros.dtype != hidden.dtype:
            zeros = context.zeros = self.target.skipped(hidden, None)
        return self.wrap(zeros, None)

    def contribution(
        self, hidden: Tensor, context: ForwardContext, rows: tuple[list[int], Tensor] | None = None
    ) -> Tensor | None:
        """The skip path's part `[n, T, D]` for the states of the logical rows `rows` (None: all; on the host and as an
        index), None for zero."""
        if not self.skip_path.streams:
            return self.skip_path(hidden)[0]
        numbers, index = (range(len(hidden)), None) if rows is None else rows
        memory = context.memory(self, numbers, hidden)
        contribution, memory = self.skip_path(hidden, context.reality_of(index), memory)
        context.remember(self.site, numbers, memory)
        return contribution

    def pass_by(self, hidden: Tensor, context: ForwardContext) -> None:
        """Lets the skip path remember tokens that all executed, where later ones may skip (token granularity)."""
        if self.skip_path.streams and context.cache is not None:
            rows = range(len(hidden))
            memory = context.memory(self, rows, hidden)
            context.remember(self.site, rows, self.skip_path.advance(hidden, context.reality_of(None), memory))

    def blend(self, output: Tensor, skipped: Tensor, execute: Tensor, context: ForwardContext) -> Tensor:
        """`output` where units execute (bool `[B]` or `[B, T]`), `skipped` elsewhere; around a post-norm, if any."""
        keep = execute.view(*execute.shape, *[1] * (3 - execute.dim()))
        if self.post_norm:
            context.after_norm[self.site] = lambda norm, raw: torch.where(keep, norm(raw), skipped)
            return output
        return torch.where(keep, output, skipped)

    def select(
        self,
        call: SublayerCall,
        result: Any,
        decision: RoutingDecision,
        shape: tuple[int, ...],
        context: ForwardContext,
    ) -> Any:
        """The masked path: the module's output where the gate is 1, the skip path's where it is 0."""
        hidden, output = call.hidden, self.hidden_of(result)
        if decision.weight is not None:
            output = self.target.weighted(hidden, output, decision.weight)
        skipped = self.target.skipped(hidden, self.contribution(hidden, context))

        def mix(output: Tensor) -> Tensor:
            if decision.gate is None:
                return torch.where(decision.execute.view(shape), output, skipped)
            gate = decision.gate.view(shape).to(output.dtype)
            return gate * output + (1 - gate) * skipped

        if self.post_norm and self.skip_path.streams:
            context.after_norm[self.site] = lambda norm, raw: mix(norm(raw))
            mixed = output
        else:
            mixed = mix(output)
        if self.wants_weights(context):
            result = self._masked_weights(result, decision.execute, context)
        if self.extras is None:
            return mixed
        return (mixed, *result[1:])

    def _masked_weights(self, result: Any, execute: Tensor, context: ForwardContext) -> Any:
        """Zeros for what skipped, as on the sparse path."""
        keep = execute[:, None, None, None] if execute.dim() == 1 else execute[:, None, :, None]
        if self.target.name == "block":
            context.attention_fixes[self.site.layer] = lambda weights: weights * keep
            return result
        return (result[0], result[1] * keep, *result[2:])

    # ---- attention weights: one full-batch entry a layer, zeros where it was skipped

    def wants_weights(self, context: ForwardContext) -> bool:
        return context.output_attentions and self.target.keeps_kv and self.config._attn_implementation == "eager"

    def key_length(self, tokens: int, context: ForwardContext) -> int:
        return tokens if context.cache is None else context.cache.get_mask_sizes(tokens, self.site.layer)[0]

    def zero_weights(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        """`[B, heads, T, keys]` of zeros."""
        batch, tokens = hidden.shape[:2]
        return hidden.new_zeros(batch, self.config.num_attention_heads, tokens, self.key_length(tokens, context))

    def full_rows(self, result: Any, rows: Tensor, batch: int, context: ForwardContext) -> Tensor | None:
        """The weights of some rows as those of the batch."""
        if not self.wants_weights(context):
            return None

        def fix(weights: Tensor) -> Tensor:
            return weights.new_zeros(batch, *weights.shape[1:]).index_copy(0, rows, weights)

        if self.target.name == "block":
            context.attention_fixes[self.site.layer] = fix
            return None
        return fix(result[1])


def _unchanged(weights: Tensor) -> Tensor:
    return weights


def _past_the_norm(norm: Callable[..., Tensor], output: Tensor) -> Tensor:
    return output


class RoutedSublayer:
    """Mixin put before the base module's class. `depth_state` is a plain attribute; `depth_router` a child module."""

    depth_state: SublayerState

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        context, state = current(), self.depth_state
        base = super().forward  # type: ignore[misc]  # mixed into a module's class
        if context is None or context.owner is not state.owner:
            return base(*args, **kwargs)
        if state.site in context.whole:
            context.trace.routes[state.site] = context.book.routes[state.site]
            return base(*args, **kwargs)
        if state.site in context.idle:
            context.trace.routes[state.site] = context.book.routes[state.site]
            return state.idle(args[0] if args else kwargs["hidden_states"], context)
        if state.target.keeps_kv:  # masks and caches are looked for by name
            args, kwargs = named(base, args, kwargs)
        return state.granularity.run(state, SublayerCall(base, args, kwargs), context)


class RoutedNorm:
    """Mixin of the norm between a routed module and the residual stream. `depth_state` is that module's."""

    depth_state: SublayerState

    def forward(self, hidden: Tensor) -> Tensor:
        context, state = current(), self.depth_state
        base = super().forward  # type: ignore[misc]  # mixed into a module's class
        if context is None or context.owner is not state.owner:
            return base(hidden)
        finish = context.after_norm.pop(state.site, None)
        return base(hidden) if finish is None else finish(base, hidden)


class EntryNorm:
    """Mixin of a norm that a routed module alone reads, and that is not computed where that one rests, or for rows that
    skip there. `depth_entry` is its state."""

    depth_entry: SublayerState

    def forward(self, hidden: Tensor) -> Tensor:
        context, state = current(), self.depth_entry
        base = super().forward  # type: ignore[misc]  # mixed into a module's class
        if context is None or context.owner is not state.owner:
            return base(hidden)
        if state.site in context.parting:
            rows = context.book.rows(state.site, hidden.device)
            assert isinstance(rows, Tensor)
            context.normed[state.site] = base(hidden.index_select(0, rows))
            return hidden
        return hidden if state.site in context.resting else base(hidden)


@cache
def subclass_like(base: type, mixin: type) -> type:
    """`mixin` put before `base`, under the base's own name and module, so that registries keyed by them still match."""
    names: dict[str, Any] = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    names |= {"depth_made_of": (base, mixin), "__reduce_ex__": _reduced}
    if "forward" in vars(mixin):  # classes that decorate `cls.forward` at creation must find it on the class itself
        names["forward"] = _forwarding(mixin, base)
    return type(base.__name__, (mixin, base), names)


def _reduced(self: Any, protocol: Any) -> tuple[Any, ...]:
    """For pickle, which finds classes by name, and the base under that name."""
    made, mixins = type(self), list[type]()
    while (made_of := vars(made).get("depth_made_of")) is not None:
        made, mixin = made_of
        mixins.insert(0, mixin)
    return (_again, (made, *mixins), *object.__reduce_ex__(self, protocol)[2:])


def _again(base: type, *mixins: type) -> Any:
    made: Any = base
    for mixin in mixins:
        made = subclass_like(made, mixin)
    return made.__new__(made)


def _forwarding(mixin: type, base: type) -> Callable[..., Any]:
    """A forward with the base's signature, which `generate` and `Trainer` read to know what the model takes;
    keyword-only parameters of the mixin's are added to it."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(
            self, mixin
        ):  # restored since, and still called by who kept this method (accelerate's autocast)
            return type(self).forward(self, *args, **kwargs)
        return mixin.forward(self, *args, **kwargs)  # type: ignore[attr-defined]  # every module class has one

    own = inspect.signature(mixin.forward).parameters.values()  # type: ignore[attr-defined]  # every module class has one
    parameters = list(inspect.signature(base.forward).parameters.values())  # type: ignore[attr-defined]  # every module class has one
    place = len(parameters) - any(p.kind is p.VAR_KEYWORD for p in parameters)
    parameters[place:place] = [p for p in own if p.kind is p.KEYWORD_ONLY]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # every module class has one
    return forward


def own_forward(module: nn.Module) -> bool:
    """Has the module a forward that its class knows nothing of? accelerate's hooks are no such thing: they call the
    one they replaced."""
    return "forward" in vars(module) and "_old_forward" not in vars(module)


def swap_class(module: nn.Module, mixin: type) -> None:
    """Puts `mixin` before the module's class, in place. An instance-level `forward` (accelerate's hooks) is rebound."""
    base: Any = type(module)
    module.__class__ = subclass_like(base, mixin)
    if "_old_forward" in vars(module):
        module._old_forward = type(module).forward.__get__(module)


def restore_class(module: nn.Module, mixin: type) -> None:
    """Undoes `swap_class`."""
    original = next(c for c in type(module).__mro__[1:] if not issubclass(c, mixin) and issubclass(c, nn.Module))
    module.__class__ = original
    if "_old_forward" in vars(module):
        module._old_forward = type(module).forward.__get__(module)
