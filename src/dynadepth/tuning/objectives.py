"""What the routers are tuned to: the task's own loss (CE), or the dense model's distribution (KL).

Losses are sums over scored tokens divided by `items`, the number of scored tokens of the whole optimiser step, so that
any division into micro-batches adds up to the same gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from dynadepth.model import disabled
from dynadepth.routed import routing_of, unwrapped
from dynadepth.vocabulary import HeadTap, ToLogits, few_rows, find_finish, rows_a_chunk


def _same(logits: Tensor) -> Tensor:
    return logits


@dataclass(frozen=True)
class Predictions:
    """The N positions that predict a labelled token: what enters the vocabulary head there, and what makes it logits.

    Logits are made a chunk at a time, wherever they are needed: those of a batch, with their gradient, would take more
    memory than the model.
    """

    states: Tensor
    """`[N, D]`, or the logits themselves `[N, V]`."""
    to_logits: ToLogits = _same

    def split(self, counts: Sequence[int]) -> list[Predictions]:
        """The first `counts[0]` of them, the next `counts[1]`, ..."""
        return [Predictions(part, self.to_logits) for part in self.states.split(list(counts))]


_WHOLE: WeakSet[nn.Module] = WeakSet()
"""Models that make of their head's output what `find_finish` does not know: their logits are taken whole."""


def predictions(model: nn.Module, inputs: dict[str, Any], columns: Tensor | None = None) -> tuple[Predictions, Any]:
    """Of the labelled tokens (and the outputs, whose logits are of no use).

    `columns`: int64, the positions to predict from; None: all.
    """
    labels = inputs["labels"]
    wanted = labels[:, 1:] != -100
    if columns is not None:
        wanted = wanted & torch.zeros_like(wanted).index_fill_(1, columns, True)
    given = {name: value for name, value in inputs.items() if name != "labels"}
    base: Any = unwrapped(model)
    head = base.get_output_embeddings()
    if head is not None and base not in _WHOLE and not any(p.requires_grad for p in head.parameters()):
        with HeadTap(head) as tap:
            outputs = model(**given, use_cache=False)
        finish = None if tap.raw is None else find_finish(base.config, tap.raw, outputs.logits)
        if finish is not None and tap.entered is not None:
            states = tap.entered[:, :-1]
            return Predictions(states[wanted.to(states.device)], lambda states: finish(head(states))), outputs
        _WHOLE.add(base)
    if columns is not None and "logits_to_keep" in inspect.signature(base.forward).parameters:
        outputs = model(**given, use_cache=False, logits_to_keep=columns)
        return Predictions(outputs.logits[labels[:, columns + 1] != -100]), outputs
    outputs = model(**given, use_cache=False)
    return Predictions(outputs.logits[:, :-1][wanted]), outputs


def drawn_columns(labels: Tensor, share: float) -> Tensor | None:
    """A random share of the positions that predict a labelled token in any row, ascending; None for all."""
    if share >= 1:
        return None
    scored = (labels[:, 1:] != -100).any(0).nonzero().flatten()
    count = max(1, round(share * len(scored)))
    return scored[torch.randperm(len(scored))[:count].to(scored.device)].sort().values


class _Known(torch.autograd.Function):
    """A sum whose gradient was found along with it."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, total: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer, None, None


def _sum(found: Predictions, add: Callable[[slice, Tensor, Tensor], Tensor]) -> Tensor:
    """Σ over chunks of `add(rows, logits, gradient)`, float32, differentiable in `found.states`.

    `add` is given rows and their logits `[n, V]`, returns their sum and writes its gradient in the logits' own dtype.
    """
    states, learns = found.states, torch.is_grad_enabled() and found.states.requires_grad
    total, whole = states.new_zeros((), dtype=torch.float32), torch.empty_like(states)
    size = rows_a_chunk(found.to_logits(states[:1].detach()).shape[-1])
    for start in range(0, len(states), size):
        rows = slice(start, start + size)
        part = states[rows].detach().requires_grad_(learns)
        logits = found.to_logits(part)
        with torch.no_grad():
            gradient = torch.empty_like(logits)
            total += add(rows, logits.detach(), gradient)
        if learns:
            (whole[rows],) = torch.autograd.grad(logits, part, gradient)
    summed: Tensor = _Known.apply(states, total, whole)
    return summed


def kl_sum(teacher: Predictions, student: Predictions) -> Tensor:
    """Σ KL(teacher‖student) over N positions, in nats, float32; differentiable in the student's states.

    Here as in `ce_sum` the gradient is kept in the logits' own dtype, and float32 is for a few rows at a time.
    """

    def add(rows: slice, logits: Tensor, gradient: Tensor) -> Tensor:
        total = logits.new_zeros((), dtype=torch.float32)
        for t, s, g in few_rows(teacher.to_logits(teacher.states[rows]), logits, gradient):
            t, s = t.float().log_softmax(-1), s.float().log_softmax(-1)
            p = t.exp()
            total += (p * t.sub_(s)).sum()
            g.copy_(s.exp_().sub_(p))  # softmax(student) - softmax(teacher)
        return total

    return _sum(student, add)


def ce_sum(found: Predictions, labels: Tensor) -> Tensor:
    """Σ −log p(label) over N positions, in nats, float32; labels `[N]`, −100 for none."""

    def add(rows: slice, logits: Tensor, gradient: Tensor) -> Tensor:
        total, begin = logits.new_zeros((), dtype=torch.float32), rows.start
        for few, g in few_rows(logits, gradient):
            own = labels[begin : begin + len(few), None]
            begin += len(few)
            counted = own != -100
            own = own.where(counted, 0)
            few = few.float().log_softmax(-1)
            total -= (few.gather(-1, own) * counted).sum()
            p = few.exp_()
            g.copy_(p.scatter_add_(-1, own, -torch.ones_like(p[:, :1])).mul_(counted))  # softmax - one hot
        return total

    return _sum(found, add)


def kl_loss(
    model: nn.Module, inputs: dict[str, Any], items: Tensor | int | None, share: float = 1.0
) -> tuple[Tensor, Any]:
    """KL(dense‖routed) a token plus the method's depth loss; teacher and student are one frozen backbone.

    `share`: of the labelled tokens, those that are compared, drawn anew in each call and standing for all of them.
    """
    columns = drawn_columns(inputs["labels"], share)
    with torch.no_grad(), disabled(model):
        teacher, _ = predictions(model, {k: v for k, v in inputs.items() if k != "prompt_mask"}, columns)
    student, outputs = predictions(model, inputs, columns)
    scored, items = _scored(inputs["labels"], items)
    loss = kl_sum(teacher, student) * (scored.sum() / max(len(student.states), 1)) / items
    return _with_depth_loss(model, loss, outputs, scored / items), outputs


def ce_loss(
    model: nn.Module, inputs: dict[str, Any], items: Tensor | int | None, share: float = 1.0
) -> tuple[Tensor, Any]:
    """Cross-entropy of the labels a token plus the method's depth loss (Router-Tuning, Eq. 9)."""
    labels = inputs["labels"]
    found, outputs = predictions(model, inputs)
    scored, items = _scored(labels, items)
    following = labels[:, 1:]
    loss = ce_sum(found, following[following != -100].to(found.states.device)) / items
    return _with_depth_loss(model, loss, outputs, scored / items), outputs


def _scored(labels: Tensor, items: Tensor | int | None) -> tuple[Tensor, Tensor | int]:
    """Scored tokens of each row `[B]`, and of the whole step: of this batch where nobody tells."""
    scored = (labels[:, 1:] != -100).sum(1)
    return scored, scored.sum() if items is None else items


def _with_depth_loss(model: nn.Module, loss: Tensor, outputs: Any, weights: Tensor) -> Tensor:
    depth = routing_of(model).config.depth_loss(outputs.depth_trace, weights)
    return loss if depth is None else loss + depth


OBJECTIVES = {"ce": ce_loss, "kl": kl_loss}
