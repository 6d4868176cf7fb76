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


class _Known(torch.autograd.Function):
    """A sum whose gradient was found along with it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, total: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer, None, None


def kl_sum(teacher: Tensor, student: Tensor) -> Tensor:
    """Σ KL(teacher‖student) over rows of logits `[N, V]`, in nats, float32; differentiable in `student`.

    Here as in `ce_sum` the gradient is kept in the logits' own dtype, and float32 is for a few rows at a time.
    """
    total, gradient = student.new_zeros((), dtype=torch.float32), torch.empty_like(student)
    with torch.no_grad():
        for t, s, g in few_rows(teacher, student, gradient):
            t, s = t.float().log_softmax(-1), s.float().log_softmax(-1)
            p = t.exp()
            total += (p * t.sub_(s)).sum()
            g.copy_(s.exp_().sub_(p))  # softmax(student) - softmax(teacher)
    found: Tensor = _Known.apply(student, total, gradient)
    return found


def ce_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Σ −log p(label) over rows of logits `[N, V]`, in nats, float32; labels `[N]`, −100 for none."""
    total, gradient = logits.new_zeros((), dtype=torch.float32), torch.empty_like(logits)
    with torch.no_grad():
        begin = 0
        for rows, g in few_rows(logits, gradient):
            own = labels[begin : begin + len(rows), None]
            begin += len(rows)
            counted = own != -100
            own = own.where(counted, 0)
            rows = rows.float().log_softmax(-1)
            total -= (rows.gather(-1, own) * counted).sum()
            p = rows.exp_()
            g.copy_(p.scatter_add_(-1, own, -torch.ones_like(p[:, :1])).mul_(counted))  # softmax - one hot
    found: Tensor = _Known.apply(logits, total, gradient)
    return found


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
    scored, items = _scored(inputs["labels"], items)
    loss = kl_sum(teacher, student) * (scored.sum() / max(len(student), 1)) / items
    return _with_depth_loss(model, loss, outputs, scored / items), outputs


def ce_loss(
    model: nn.Module, inputs: dict[str, Any], items: Tensor | int | None, share: float = 1.0
) -> tuple[Tensor, Any]:
    """Cross-entropy of the labels a token plus the method's depth loss (Router-Tuning, Eq. 9)."""
    labels = inputs["labels"]
    outputs = model(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False)
    following = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    scored, items = _scored(labels, items)
    loss = ce_sum(outputs.logits.flatten(0, 1), following.flatten()) / items
    return _with_depth_loss(model, loss, outputs, scored / items), outputs


def _scored(labels: Tensor, items: Tensor | int | None) -> tuple[Tensor, Tensor | int]:
    """Scored tokens of each row `[B]`, and of the whole step: of this batch where nobody tells."""
    scored = (labels[:, 1:] != -100).sum(1)
    return scored, scored.sum() if items is None else items


def _with_depth_loss(model: nn.Module, loss: Tensor, outputs: Any, weights: Tensor) -> Tensor:
    depth = routing_of(model).config.depth_loss(outputs.depth_trace, weights)
    return loss if depth is None else loss + depth


OBJECTIVES = {"ce": ce_loss, "kl": kl_loss}
