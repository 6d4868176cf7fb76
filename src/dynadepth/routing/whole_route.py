"""Whole routes: a sequence's decisions for all sites at once, from the input of the lowest one.

Every site has its router, as per sequence; but all of them are shown what the lowest is shown, and are asked there. So
one pooling, one product and one host transfer decide a prompt's whole route, and what skips is known before it is
reached: not even its norm is computed. Asking at every site costs a prefill two to three per cent, this a tenth of one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynadepth.routing.context import ForwardContext
from dynadepth.routing.granularity import PerSequence
from dynadepth.routing.router import AbstractRouter

if TYPE_CHECKING:
    from dynadepth.routing.sublayer import SublayerState


class PerRoute(PerSequence):
    """One decision a sequence for all sites, made at its prefill from its prompt alone, then sticky."""

    name = "route"

    def look(self, state: SublayerState, hidden: Tensor, context: ForwardContext) -> Tensor:
        """What the lowest site that asks sees, at every site."""
        if context.pooled is None:
            context.pooled = super().look(state, hidden, context)
        return context.pooled

    def _route(self, state: SublayerState, hidden: Tensor, context: ForwardContext) -> None:
        if state.site in context.planned:
            return
        if state.known(context) is not None:
            super()._route(state, hidden, context)
            return
        asking = [other for other in state.owner.states.values() if other.known(context) is None]
        # While they are tuned, each for itself: a controller listens at them.
        ask = AbstractRouter.decide_each if state.router.training else state.router.decide_each
        with torch.autocast(hidden.device.type, enabled=False):
            decisions = ask([other.router for other in asking], self.look(state, hidden, context))
        times = context.to_host(torch.stack([decision.times for decision in decisions]))
        assert context.trace.fresh is not None
        for other, decision, counts in zip(asking, decisions, times, strict=True):
            context.trace.record(other.site, decision)
            context.book.write(other.site, counts, context.trace.fresh)
        self._announce(asking, context)

    def _announce(self, asking: list[SublayerState], context: ForwardContext) -> None:
        """Says what is known of the sites above, now that these are decided."""
        context.planned = frozenset(state.site for state in asking)
        if asking[0].owner.rests:
            context.resting, context.parting = context.book.resting, context.book.mixed
        if context.past == 0 and not context.output_attentions:
            context.whole = context.book.whole
