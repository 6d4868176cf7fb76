"""What deciding causally costs a Mixture-of-Depths model: its loss as generated against its loss as trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynadepth.errors import DataError
from dynadepth.methods.mod import agreement
from dynadepth.model import expert_choice
from dynadepth.routing.decision import KeepRatio
from dynadepth.routing.recorder import Recorder, recording


@dataclass(frozen=True)
class CausalGap:
    """Means over label tokens (losses, nats), or over sequences alike (`accuracy`, `keep`)."""

    top_k: float
    """Loss where the best k of each sequence execute, as in training."""
    causal: float
    """Loss where each token decides for itself, as in generation."""
    accuracy: float
    """Share of tokens and sites at which the causal decision is that of the best k, on the states of the latter (the
    paper's predictor accuracy). Never executing anything already scores 1 - capacity."""
    keep: KeepRatio
    """What executed under causal decisions."""
    n_tokens: int

    @property
    def gap(self) -> float:
        """Relative excess of the causal loss."""
        return self.causal / self.top_k - 1


@torch.no_grad()
def causal_gap(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> CausalGap:
    """Scores `batches` (`input_ids`, `labels`, and what else the model takes, `[B, T]`) twice, in evaluation mode.

    The method's own loss is left out of both. Raises ConfigError for a model whose routers compare no tokens, or a
    capacity of less than one token; DataError without a batch.
    """
    training, record = model.training, Recorder()
    top_k, causal, accuracies, count = 0.0, 0.0, list[Tensor](), 0
    model.eval()
    try:
        for batch in batches:
            tokens = int((batch["labels"][:, 1:] != -100).sum())
            with expert_choice(model):
                best = model(**batch, use_cache=False)
            with recording(record):
                alone = model(**batch, use_cache=False)
            top_k, causal = top_k + best.loss.item() * tokens, causal + alone.loss.item() * tokens
            accuracy = agreement(best.depth_trace)
            assert accuracy is not None
            accuracies.append(accuracy)
            count += tokens
    finally:
        model.train(training)
    if not count:
        raise DataError("No batch with a label to score: give some text.")
    keep = record.keep_ratio()
    assert keep is not None
    return CausalGap(top_k / count, causal / count, float(torch.cat(accuracies).mean()), keep, count)
