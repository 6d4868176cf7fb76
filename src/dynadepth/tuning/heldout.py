"""How far routing moves a model from its dense self on held-out examples, under one route or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dynadepth.model import disabled
from dynadepth.routed import unwrapped
from dynadepth.routing.decision import KeepRatio
from dynadepth.routing.recorder import Recorder, recording
from dynadepth.tuning.data import Collator, Example
from dynadepth.tuning.objectives import kl_sum, predictions

BATCH = 8
Route = Callable[[], AbstractContextManager[Any]]
"""Makes a context in which the model takes a route."""


@dataclass(frozen=True)
class Distance:
    """From the dense model, with hard decisions."""

    keep: KeepRatio | None
    """At prefill."""
    kl: tuple[float, ...]
    """Σ KL(dense‖routed) over the scored tokens of each example, in nats."""
    tokens: int
    """Scored, in all examples."""
    executed: float | None
    """Share of all sublayers of the target that ran at prefill, examples weighted by their scored tokens, as KL is."""

    @property
    def mean(self) -> float:
        """Nats a token."""
        return sum(self.kl) / max(self.tokens, 1)


def distance(
    model: nn.Module,
    examples: Sequence[Example],
    collator: Collator,
    progress: Callable[[int, int], None] | None = None,
) -> Distance:
    """Of the model as it stands."""
    return distances(model, examples, collator, [nullcontext], progress)[0]


def distances(
    model: nn.Module,
    examples: Sequence[Example],
    collator: Collator,
    routes: Sequence[Route],
    progress: Callable[[int, int], None] | None = None,
) -> list[Distance]:
    """Of each route, in evaluation mode, on whole examples. The dense model answers once for all routes."""
    training = model.training
    model.eval()
    device = next(unwrapped(model).parameters()).device
    records, kls, tokens = [Recorder() for _ in routes], [list[float]() for _ in routes], list[int]()
    with torch.no_grad():
        for start in range(0, len(examples), BATCH):
            batch = {k: v.to(device) for k, v in collator(examples[start : start + BATCH]).items()}
            scored = (batch["labels"][:, 1:] != -100).sum(1).tolist()
            with disabled(model):
                dense, _ = predictions(model, {k: v for k, v in batch.items() if k != "prompt_mask"})
            for route, record, kl in zip(routes, records, kls, strict=True):
                with route(), recording(record):
                    routed, _ = predictions(model, batch)
                kl += [float(kl_sum(*rows)) for rows in zip(dense.split(scored), routed.split(scored), strict=True)]
            tokens += scored
            if progress:
                progress(min(start + BATCH, len(examples)), len(examples))
    model.train(training)
    return [
        Distance(record.keep_ratio("prefill"), tuple(kl), sum(tokens), _executed(record, tokens))
        for record, kl in zip(records, kls, strict=True)
    ]


def _executed(record: Recorder, tokens: Sequence[int]) -> float | None:
    keeps = record.sequence_keeps
    if not keeps or not sum(tokens):
        return None
    return sum(keep.all * n for keep, n in zip(keeps, tokens, strict=True)) / sum(tokens)
