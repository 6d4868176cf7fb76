"""Whole routes: a sequence's decisions for all sites at once, from the input of the lowest one.

Every site has its router, as per sequence; but all of them are shown what the lowest is shown, and are asked there. So
one pooling, one product and one host transfer decide a prompt's whole route, and what skips is known before it is
reached: without a skip path that reads it, not even its norm is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynadepth.routing.context import ForwardContext
from dynadepth.routing.decision import RoutingDecision
from dynadepth.routing.granularity import PerSequence
from dynadepth.routing.router import AbstractRouter

if TYPE_CHECKING:
    from dynadepth.routing.sublayer import SublayerState


class PerRoute(PerSequence):
    """One decision a sequence for all sites, made at its prefill from its prompt alone, then sticky."""

    name = "route"
    ahead = True

    def look(self, state: SublayerState, hidden: Tensor, context: ForwardContext) -> Tensor:
        """What the lowest site sees, at every site. A replay of that one (gradient checkpointing) looks again."""
        if context.pooled is None or context.pooled_at == state.site:
            context.pooled, context.pooled_at = super().look(state, hidden, context), state.site
        return context.pooled

    def _route(self, state: SublayerState, hidden: Tensor, context: ForwardContext) -> None:
        """At the lowest site, decides for all of them; where nothing is asked, for this one."""
        if state.site in context.planned:
            return
        states: list[SublayerState] = list(state.owner.states.values())
        known = {other.site: other.known(context) for other in states}
        asking = [other for other in states if known[other.site] is None]
        if not asking:
            super()._route(state, hidden, context)
            return
        with torch.autocast(hidden.device.type, enabled=False):
            decisions = decide_each([other.router for other in asking], self.look(state, hidden, context))
        counts = context.to_host(torch.stack([decision.times for decision in decisions]))
        times = {other.site: row for other, row in zip(asking, counts, strict=True)}
        assert context.trace.fresh is not None
        for other, decision in zip(asking, decisions, strict=True):
            context.trace.record(other.site, decision)
        for site, given in known.items():
            context.book.write(site, times.get(site) or [given] * len(hidden), context.trace.fresh)
        self._announce(state, context)

    def _announce(self, lowest: SublayerState, context: ForwardContext) -> None:
        """Says what is known of the sites above, now that all are decided."""
        book, here = context.book, {lowest.site}
        context.planned = frozenset(book.routes)
        if lowest.owner.rests:
            context.resting, context.parting = book.resting - here, book.mixed - here
        if context.past == 0 and not context.output_attentions:
            context.whole, context.idle = book.whole - here, context.resting


def decide_each(routers: Sequence[AbstractRouter], hidden: Tensor) -> list[RoutingDecision]:
    """What each router decides for the same states, without gates: in one product where their class has one and nobody
    listens at a router or holds its weights elsewhere, else one by one."""
    kind = type(routers[0])
    if all(type(router) is kind and _at_hand(router, hidden) for router in routers):
        return kind.decide_each(routers, hidden)
    return [_moved(router.decide(hidden.to(router.threshold.device), False), hidden.device) for router in routers]


def _at_hand(router: AbstractRouter, hidden: Tensor) -> bool:
    hooked = router._forward_hooks or router._forward_pre_hooks or "_old_forward" in vars(router)  # accelerate's
    return not hooked and router.threshold.device == hidden.device


def _moved(decision: RoutingDecision, device: torch.device) -> RoutingDecision:
    if decision.execute.device == device:
        return decision
    logits, repeat = decision.logits, decision.repeat
    return RoutingDecision(
        decision.execute.to(device),
        None if logits is None else logits.to(device),
        repeat=None if repeat is None else repeat.to(device),
    )
