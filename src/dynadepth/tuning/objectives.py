"""What the routers are tuned to: the task's own loss (CE), or the dense model's distribution (KL).

Losses are sums over scored tokens divided by `items`, the number of scored tokens of the whole optimiser step, so that
any division into micro-batches adds up to the same gradient.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from dynadepth.model import disabled
from dynadepth.routed import routing_of, unwrapped
from dynadepth.vocabulary import few_rows


def scored_logits(model: nn.Module, inputs: dict[str, Any], columns: Tensor | None = None) -> tuple[Tensor, Any]:
    """Logits `[N, V]` (the model's dtype) that predict the N labelled tokens, and the outputs.

    `columns`: int64, the positions to predict from; None: all. The vocabulary head runs for those alone.
    """
    labels = inputs["labels"]
    given = {name: value for name, value in inputs.items() if name != "labels"}
    if columns is None:
        outputs = model(**given, use_cache=False)
        return outputs.logits[:, :-1][labels[:, 1:] != -100], outputs
    outputs = model(**given, use_cache=False, logits_to_keep=columns)
    return outputs.logits[labels[:, columns + 1] != -100], outputs


def drawn_columns(model: nn.Module, labels: Tensor, share: float) -> Tensor | None:
    """A random share of the positions that predict a labelled token in any row, ascending; None for all.

    None, too, where the model cannot restrict its vocabulary head (no `logits_to_keep`).
    """
    if share >= 1 or "logits_to_keep" not in inspect.signature(unwrapped(model).forward).parameters:
        return None
    scored = (labels[:, 1:] != -100).any(0).nonzero().flatten()
    count = max(1, round(share * len(scored)))
    return scored[torch.randperm(len(scored))[:count].to(scored.device)].sort().values


class _KL(torch.autograd.Function):
    """Σ KL(teacher‖student) over rows; what its gradient needs is kept in the logits' own dtype."""

    @staticmethod
    def forward(ctx: Any, teacher: Tensor, student: Tensor) -> Tensor:
        total = student.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(student)  # softmax(student) - softmax(teacher)
        for t, s, g in few_rows(teacher, student, gradient):
            t, s = t.float().log_softmax(-1), s.float().log_softmax(-1)
            p = t.exp()
            total += (p * t.sub_(s)).sum()
            g.copy_(s.exp_().sub_(p))
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[None, Tensor]:
        (gradient,) = ctx.saved_tensors
        return None, gradient * outer


def kl_sum(teacher: Tensor, student: Tensor) -> Tensor:
    """Σ KL(teacher‖student) over rows of logits `[N, V]`, in nats, float32; differentiable in `student`."""
    total: Tensor = _KL.apply(teacher, student)
    return total


def kl_loss(
    model: nn.Module, inputs: dict[str, Any], items: Tensor | int | None, share: float = 1.0
) -> tuple[Tensor, Any]:
    """KL(dense‖routed) a token plus the method's depth loss; teacher and student are one frozen backbone.

    `share`: of the labelled tokens, those that are compared, drawn anew in each call and standing for all of them.
    """
    columns = drawn_columns(model, inputs["labels"], share)
    with torch.no_grad(), disabled(model):
        teacher, _ = scored_logits(model, {k: v for k, v in inputs.items() if k != "prompt_mask"}, columns)
    student, outputs = scored_logits(model, inputs, columns)
    scored = (inputs["labels"][:, 1:] != -100).sum(1)
    items = scored.sum() if items is None else items
    loss = kl_sum(teacher, student) * (scored.sum() / max(len(student), 1)) / items
    depth = routing_of(model).config.depth_loss(outputs.depth_trace, scored / items)
    return (loss if depth is None else loss + depth), outputs


def ce_loss(
    model: nn.Module, inputs: dict[str, Any], items: Tensor | int | None, share: float = 1.0
) -> tuple[Tensor, Any]:
    """The model's own loss on the labels, to which the routed forward adds the depth loss (Router-Tuning, Eq. 9)."""
    outputs = model(**inputs, num_items_in_batch=items)
    return outputs.loss, outputs


OBJECTIVES = {"ce": ce_loss, "kl": kl_loss}
