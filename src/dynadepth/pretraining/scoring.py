"""Held-out loss, in nats a token and in bits a byte, with the decisions of training and with those of generation."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from dynadepth.model import expert_choice
from dynadepth.routed import is_attached, routing_of

CAUSAL, TOP = "causal", "top_k"


@dataclass(frozen=True)
class Loss:
    """Mean loss of held-out tokens."""

    nats: float
    """A token."""
    bits_per_byte: float
    tokens: int
    accuracy: float | None = None
    """Share of (token, site) pairs at which the causal decision is the choice of training (the paper's predictor
    accuracy); None where tokens do not compete."""
    executed: float | None = None
    """Share of (token, routed site) pairs that executed; None of a dense model."""


def compares(model: PreTrainedModel) -> bool:
    """Do tokens of a sequence compete in training, so that generation has to decide otherwise?"""
    return is_attached(model) and routing_of(model).chooses


def losses(model: PreTrainedModel, windows: np.ndarray, byte_lengths: np.ndarray, rows: int = 8) -> dict[str, Loss]:
    """The loss on `windows` (int64 `[n, T]`), by decisions: `causal`, those of generation; and `top_k`, those of
    training, where tokens compete there. Of a dense model both words would mean the same: it has `causal` alone."""
    found = {CAUSAL: loss(model, windows, byte_lengths, rows)}
    if compares(model):
        found[TOP] = loss(model, windows, byte_lengths, rows, top_k=True)
    return found


def loss(
    model: PreTrainedModel, windows: np.ndarray, byte_lengths: np.ndarray, rows: int = 8, *, top_k: bool = False
) -> Loss:
    """The mean loss of the windows' tokens, each window's first left out: nothing predicts it."""
    device = next(model.parameters()).device
    sizes = torch.as_tensor(byte_lengths, device=device)
    was_training = model.training
    model.eval()
    nats, tokens, n_bytes = 0.0, 0, 0
    shares: dict[str, list[tuple[float, int]]] = {"executed": [], "same": []}
    with torch.no_grad(), torch.random.fork_rng(devices=[]), ExitStack() as stack:
        torch.manual_seed(0)
        if top_k:
            stack.enter_context(expert_choice(model))
        for start in range(0, len(windows), rows):
            ids = torch.as_tensor(windows[start : start + rows], device=device)
            outputs = model(input_ids=ids, use_cache=False)
            targets = ids[:, 1:]
            nats += float(_cross_entropy(outputs.logits[:, :-1], targets))
            tokens += targets.numel()
            n_bytes += int(sizes[targets].sum())
            trace = getattr(outputs, "depth_trace", None)
            for decision in [] if trace is None else trace.decisions.values():
                shares["executed"].append((float(decision.execute.float().mean()), len(ids)))
                if decision.top is not None and decision.causal is not None:
                    shares["same"].append((float((decision.top == decision.causal).float().mean()), len(ids)))
    model.train(was_training)
    return Loss(
        nats / tokens, nats / math.log(2) / max(1, n_bytes), tokens, _mean(shares["same"]), _mean(shares["executed"])
    )


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")


def _mean(values: list[tuple[float, int]]) -> float | None:
    weight = sum(n for _, n in values)
    return sum(value * n for value, n in values) / weight if weight else None
