"""Expert choice (arXiv 2404.02258): in training the tokens of a sequence compete for a number of places.

Which tokens win depends on the whole sequence, later tokens included, so generation decides otherwise: by a threshold
on logits that see one token alone (`RoutingDecision.causal`). Both are known while training, so that the second can
learn the first. The k winners of each row are gathered, run as a shorter sequence, and put back: their number is known
on the host, so that no decision is waited for, and shapes never change.

Shape suffixes: B sequences, T tokens, k places, D hidden size.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynadepth.errors import ConfigError
from dynadepth.routing.call import SublayerCall
from dynadepth.routing.context import ForwardContext
from dynadepth.routing.decision import RoutingDecision
from dynadepth.routing.router import AbstractRouter

if TYPE_CHECKING:
    from dynadepth.routing.sublayer import SublayerState

ROUNDING = 1e-4
"""What a product of capacity and length may lack of a whole number to count as one."""


def places(capacity: float, tokens: int) -> int:
    """How many of `tokens` tokens may execute: capacity × tokens, rounded down. ConfigError where that is none."""
    count = math.floor(capacity * tokens + ROUNDING)
    if count < 1:
        raise ConfigError(
            f"capacity {capacity} of a sequence of {tokens} tokens lets none execute: use sequences of at least "
            f"{math.ceil(1 / capacity - ROUNDING)} tokens, or a capacity of at least {1 / tokens:.3g}."
        )
    return count


def winners(scores: Tensor, capacity: float, real: Tensor | None) -> Tensor:
    """The tokens of the highest scores (`[B, T]`, float32) in each row: bool `[B, T]`.

    Padding (`real` bool `[B, T]`; None: no padding) never wins, and a row's places are a share of its real tokens; at
    least one, so that a row shorter than the others of its batch is not without any.
    """
    count = places(capacity, scores.shape[1])
    if real is None:
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(count, dim=1).indices, True)
    index = scores.masked_fill(~real, -math.inf).topk(count, dim=1).indices
    own = (capacity * real.sum(1, keepdim=True) + ROUNDING).floor().clamp(min=1)
    won = (torch.arange(count, device=scores.device) < own) & real.gather(1, index)
    return torch.zeros_like(real).scatter_(1, index, won)


class ChoosingRouter(AbstractRouter):
    """Scores tokens that compete, and says of each token alone whether it would win.

    `capacity`: the share of a sequence's tokens that win. `by_threshold`: training, too, executes what the causal
    logits let through, and the winners are only what these learn from.
    """

    weighs = True

    def __init__(self, capacity: float, by_threshold: bool) -> None:
        super().__init__()
        self.capacity, self.by_threshold = capacity, by_threshold

    @abstractmethod
    def score(self, hidden: Tensor) -> Tensor:
        """By which tokens are compared: float32 `[..., D]` to `[...]`."""

    @abstractmethod
    def causal(self, hidden: Tensor, score: Tensor) -> Tensor:
        """The logits that decide without the other tokens: float32 `[...]`."""

    @abstractmethod
    def weigh(self, score: Tensor) -> Tensor:
        """The factor of what an executing token contributes: float32 `[...]`."""

    def forward(self, hidden: Tensor) -> Tensor:
        return self.causal(hidden, self.score(hidden))

    def judge(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        score = self.score(hidden)
        return self.causal(hidden, score), self.weigh(score)

    def choose(self, hidden: Tensor, real: Tensor | None, recorded: RoutingDecision | None) -> RoutingDecision:
        """Decides for float32 hidden states `[B, T, D]` of whole sequences; `real` bool `[B, T]` marks what is no
        padding.

        `recorded`: what this forward decided here before gradient checkpointing replayed the layer. A replay decides
        the same, and draws no new noise.
        """
        if recorded is not None and recorded.logits is not None and not recorded.logits.requires_grad:
            return recorded
        score = self.score(hidden)
        logits = self.causal(hidden, score)
        top, causal = (recorded.top, recorded.causal) if recorded is not None else (None, None)
        if top is None or causal is None:
            top, causal = winners(score.detach(), self.capacity, real), logits.detach() >= self.threshold
        execute = causal if self.by_threshold and self.training else top
        return RoutingDecision(execute, logits, None, self.weigh(score), top, causal)


def run_top(state: SublayerState, call: SublayerCall, context: ForwardContext, decision: RoutingDecision) -> Any:
    """Runs the base module for the winners alone; the other tokens are absent as keys and values.

    A row with fewer winners than places is filled up with tokens that no winner sees; what is computed for those is
    not used.
    """
    from dynadepth.routing.token_kv import check_mask, gather_keys, mask_among, put_back

    assert isinstance(state.router, ChoosingRouter)
    hidden, mask, execute = call.hidden, call.attention_mask, decision.execute
    check_mask(mask)
    batch, length = hidden.shape[:2]
    rows = torch.arange(batch, device=hidden.device)
    order = torch.argsort(execute.to(torch.int8), dim=1, descending=True, stable=True)  # winners first, by position
    index = order[:, : places(state.router.capacity, length)]
    valid = execute.gather(1, index)
    keys = torch.where(valid, index, -1)
    if mask is None:
        gathered = mask_among(state, hidden, index, keys)
    else:
        gathered = mask.expand(batch, -1, -1, -1).transpose(1, 2)[rows[:, None], index].transpose(1, 2)  # [B, 1, k, K]
        gathered = gather_keys(gathered, keys, state, context, length)
    if gathered is not None and gathered.dtype == torch.bool:
        # What is not used must see something: a softmax over nothing has no gradient but nan.
        gathered = gathered | torch.eye(index.shape[1], dtype=torch.bool, device=hidden.device)
    context.running[state.site.layer] = valid
    result = call.tokens(rows, index, gathered)()
    return put_back(state, call, context, execute, result, rows, index, valid, keys, decision.weight)
