"""Granularities: the unit of a decision, how its hidden state is pooled, and how a decision is carried out.

Shape suffixes: B sequences, T tokens of this forward, D hidden size. Decisions are `[B]` per sequence, `[B, T]` per
token. A new granularity is one new subclass in one new module of this package; `granularity_named` finds it by `name`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from dynadepth.errors import ConfigError
from dynadepth.routing.call import SublayerCall
from dynadepth.routing.context import ForwardContext, Injection
from dynadepth.routing.decision import RoutingDecision
from dynadepth.routing.expert_choice import ChoosingRouter
from dynadepth.routing.registry import named_subclass
from dynadepth.routing.repeat import run_again
from dynadepth.routing.windows import pool_windows

if TYPE_CHECKING:
    from dynadepth.routing.sublayer import SublayerState


class Granularity(ABC):
    """Carries out one routed sublayer's call. Stateless: what must be remembered is in the context or in the cache."""

    name: ClassVar[str]
    general: ClassVar[bool] = True
    """May any method decide so? Else those alone that have it as their default."""
    sticky: ClassVar[bool]
    """Is a decision made once a sequence and then kept?"""
    ahead: ClassVar[bool] = False
    """Is everything decided before anything is skipped, so that no logit depends on a threshold?"""

    def run(self, state: SublayerState, call: SublayerCall, context: ForwardContext) -> Any:
        """The routed sublayer's output, in the form the host expects."""
        return self.masked(state, call, context) if context.masked else self.sparse(state, call, context)

    @abstractmethod
    def masked(self, state: SublayerState, call: SublayerCall, context: ForwardContext) -> Any:
        """Runs every unit and selects by the gate: what training differentiates."""

    @abstractmethod
    def sparse(self, state: SublayerState, call: SublayerCall, context: ForwardContext) -> Any:
        """Runs the executing units alone."""

    def decide(self, state: SublayerState, hidden: Tensor, context: ForwardContext) -> RoutingDecision:
        """The injected, constant or computed decision of this forward, recorded in its trace."""
        known = state.known(context)
        if known is not None:
            decision = RoutingDecision.of(self.expand(known, hidden))
        elif context.autocast(hidden):
            with torch.autocast(hidden.device.type, enabled=False):
                decision = self._ask(state, hidden, context)
        else:
            decision = self._ask(state, hidden, context)
        context.trace.record(state.site, decision)
        return decision

    def _ask(self, state: SublayerState, hidden: Tensor, context: ForwardContext) -> RoutingDecision:
        """What the router decides for states of these `[B, T, D]`."""
        refuse_reentrant(context)
        pooled = self.look(state, hidden, context)
        if context.choosing and isinstance(state.router, ChoosingRouter):
            return state.router.choose(pooled, context.token_mask, context.trace.decisions.get(state.site))
        return state.router.decide(pooled, with_gate=context.masked and context.grad)

    def look(self, state: SublayerState, hidden: Tensor, context: ForwardContext) -> Tensor:
        """What the router is shown of states `[B, T, D]`: one vector a unit, or as many as it has windows."""
        if hidden.requires_grad and not context.grad and not isinstance(state.router, ChoosingRouter):
            hidden = hidden.detach()  # without gates only skip paths learn, and a decision has no gradient
        if state.router.windows == 1:
            return self.pool(hidden, context)
        return pool_windows(hidden, pooled_tokens(context), state.router.windows)

    @abstractmethod
    def pool(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        """Hidden states `[B, T, D]` to the float32 input of the router, one vector a unit."""

    @abstractmethod
    def expand(self, value: Injection, hidden: Tensor) -> Tensor:
        """A given decision (one for all, or one per unit) as a tensor of this granularity's shape."""


def refuse_reentrant(context: ForwardContext) -> None:
    """Raises where a router that learns would have no gradient."""
    if context.masked and context.grad and not torch.is_grad_enabled():
        raise ConfigError(
            "Reentrant gradient checkpointing runs the layers without gradients, so no router could learn: "
            "enable it with gradient_checkpointing_kwargs={'use_reentrant': False}."
        )


def pooled_tokens(context: ForwardContext) -> Tensor | None:
    """The tokens that a sequence-level router pools, bool `[B, T]`; None for all. ConfigError where padding may
    be among them."""
    if context.padding_unknown:
        raise ConfigError(
            "A sequence-level route must not pool padding, and this attention mask does not say which tokens are "
            "padding: pass one of shape [batch, tokens], or the tokens to pool as prompt_mask."
        )
    return context.pool_mask


class PerSequence(Granularity):
    """One decision a sequence, made at its prefill from its prompt alone, then sticky."""

    name = "sequence"
    sticky = True

    def pool(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        """Mean over the prompt's tokens, `[B, D]`, accumulated in float32.

        Of bfloat16 states the finished sum is rounded once to bfloat16 (2^-8 of each entry): a float32 copy of every
        site's input alone would cost a prefill one to two per cent. float16 could overflow.
        """
        mask = pooled_tokens(context)
        hidden = hidden if hidden.dtype == torch.bfloat16 else hidden.float()
        if mask is None:
            return hidden.sum(1) / context.length(hidden)  # by a float32 tensor: widened and divided in one kernel
        # Not multiplied by the mask: what padding computes may be nan.
        return hidden.masked_fill(~mask.unsqueeze(-1), 0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1).float()

    def expand(self, value: Injection, hidden: Tensor) -> Tensor:
        return torch.as_tensor(value, device=hidden.device).expand(hidden.shape[0])

    def masked(self, state: SublayerState, call: SublayerCall, context: ForwardContext) -> Any:
        decision = self.decide(state, call.hidden, context)
        result = call()
        if decision.repeat is not None and decision.repeat.any():
            result = run_again(state, call, result, decision.repeat.nonzero().flatten(), context)
        return state.select(call, result, decision, (-1, 1, 1), context)

    def sparse(self, state: SublayerState, call: SublayerCall, context: ForwardContext) -> Any:
        book, site, trace = context.book, state.site, context.trace
        if trace.prefill and site not in trace.routes:
            self._route(state, call.hidden, context)
        rows = book.rows(site, call.hidden.device)
        trace.routes[site] = book.routes[site]
        if rows is False:
            return state.skip_all(call, context)
        if trace.prefill and context.cache is not None and state.target.keeps_kv:
            context.cache.admit(site.layer, [i for i, count in enumerate(book.routes[site]) if count])
        if isinstance(rows, Tensor):
            result = self._run_rows(state, call, rows, context)
        else:
            result = state.run_all(call, context)
        again = book.repeating and book.rows(site, call.hidden.device, times=2)
        return result if again is False else run_again(state, call, result, again, context)

    def _run_rows(self, state: SublayerState, call: SublayerCall, rows: Tensor, context: ForwardContext) -> Any:
        """Some rows (int64 `[n]`) execute, the others take the skip path."""
        hidden, batch = call.hidden, len(call.hidden)
        result = call.rows(rows, context.normed.pop(state.site, None))()
        output = state.target.canvas(hidden)
        output.index_copy_(0, rows, state.hidden_of(result).to(output.dtype))
        if state.skip_path.streams:
            skipping, index = context.book.skipping(state.site, hidden.device)
            part = hidden[index]
            skipped = state.target.skipped(part, state.contribution(part, context, (skipping, index)))
            if state.post_norm:  # which what skipped does not go through
                whole = state.target.canvas(hidden).index_copy_(0, index, skipped)
                execute = torch.ones(batch, dtype=torch.bool, device=hidden.device).index_fill_(0, index, False)
                output = state.blend(output, whole, execute, context)
            else:
                output.index_copy_(0, index, skipped.to(output.dtype))
        return state.wrap(output, state.full_rows(result, rows, batch, context))

    def _route(self, state: SublayerState, hidden: Tensor, context: ForwardContext) -> None:
        """Decides for the rows that have no route yet and bring a real token; one host transfer, none for known
        decisions."""
        known = state.known(context)
        times = [known] * len(hidden) if isinstance(known, int) else self.decide(state, hidden, context).times
        counts = context.to_host(times)
        assert context.trace.fresh is not None
        context.book.write(state.site, counts, context.trace.fresh)


class PerToken(Granularity):
    """One decision a token, from that token's hidden state alone. Keys and values of skipped tokens: see `TokenKV`."""

    name = "token"
    sticky = False

    def pool(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        return hidden.float()

    def expand(self, value: Injection, hidden: Tensor) -> Tensor:
        return torch.as_tensor(value, dtype=torch.bool, device=hidden.device).expand(hidden.shape[:2])

    def masked(self, state: SublayerState, call: SublayerCall, context: ForwardContext) -> Any:
        from dynadepth.routing.expert_choice import run_top
        from dynadepth.routing.token_kv import hide_skipped

        decision = self.decide(state, call.hidden, context)
        if decision.top is not None:  # what wins, or reaches a threshold, runs alone in training, too
            if decision.execute is decision.top:
                return run_top(state, call, context, decision)
            return self._run(state, call, decision, context)
        if state.target.keeps_kv and state.kv_policy == "drop":
            call = hide_skipped(call, decision.execute, state)
        return state.select(call, call(), decision, (*call.hidden.shape[:2], 1), context)

    def sparse(self, state: SublayerState, call: SublayerCall, context: ForwardContext) -> Any:
        return self._run(state, call, self.decide(state, call.hidden, context), context)

    def _run(self, state: SublayerState, call: SublayerCall, decision: RoutingDecision, context: ForwardContext) -> Any:
        from dynadepth.routing.token_kv import run_tokens
        from dynadepth.routing.token_parts import counted, part_length, run_parts

        execute, batch, real = decision.execute, len(call.hidden), context.token_mask
        if real is not None:
            execute = execute & real
        part = part_length(state, call, context)
        # The site's one host transfer: how many tokens of each row execute, and whether any real token skips.
        if call.hidden.shape[1] == 1 and real is None:
            flat = execute.int().flatten().tolist()
            whole = all(flat)
        else:
            everything = execute if real is None else execute | ~real
            *flat, whole = torch.cat([counted(execute, part).flatten(), everything.all().long().unsqueeze(0)]).tolist()
        if whole:
            return self._run_whole(state, call, context, decision.weight)
        if not state.target.keeps_kv:
            return self._run_flat(state, call, execute, sum(flat), context)
        if len(flat) == batch:
            return run_tokens(state, call, context, execute, flat, decision.weight)
        counts = [flat[start : start + batch] for start in range(0, len(flat), batch)]
        return run_parts(state, call, context, execute, counts, part, decision.weight)

    def _run_whole(
        self, state: SublayerState, call: SublayerCall, context: ForwardContext, weight: Tensor | None
    ) -> Any:
        """Every real token executes: the base module's own call, unless earlier tokens left holes to be masked."""
        from dynadepth.routing.token_kv import has_holes, run_tokens

        if state.target.keeps_kv and has_holes(state, call, context):
            batch, length = call.hidden.shape[:2]
            execute = torch.ones(batch, length, dtype=torch.bool, device=call.hidden.device)
            return run_tokens(state, call, context, execute, [length] * batch, weight)
        state.pass_by(call.hidden, context)
        return state.run_all(call, context, weight)

    def _run_flat(
        self, state: SublayerState, call: SublayerCall, execute: Tensor, count: int, context: ForwardContext
    ) -> Any:
        """Tokens of a sublayer that never looks sideways, as one long sequence."""
        hidden = call.hidden
        if count == 0:
            return state.skip_all(call, context)
        index = torch.argsort(execute.flatten().to(torch.int8), descending=True, stable=True)[:count]
        flat = call.with_hidden(hidden.flatten(0, 1)[index].unsqueeze(0))
        output = state.target.canvas(hidden)
        output.flatten(0, 1).index_copy_(0, index, state.hidden_of(flat())[0].to(output.dtype))
        contribution = state.contribution(hidden, context)
        if contribution is not None:
            output = state.blend(output, state.target.skipped(hidden, contribution), execute, context)
        return state.wrap(output, None)


def granularity_named(name: str) -> Granularity:
    """The granularity called `name`; ConfigError with the near names otherwise."""
    return named_subclass(Granularity, name, package="dynadepth.routing")()  # type: ignore[type-abstract]  # a subclass comes out
