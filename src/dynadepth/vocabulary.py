"""Logits in float32, a few rows at a time.

A row has 50 to 260 thousand entries. In float32 a batch of them fits no cache of a CPU, and its memory goes back to the
system after every pass: worked on a few rows at a time, sums over the vocabulary take a third of the time.

Shape suffixes: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CACHED = 1 << 18
"""Elements of the rows that a CPU works on at once: 1 MiB in float32."""

HELD = 1 << 24
"""The same of another device: 64 MiB."""


def few_rows(*tensors_NV: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same few rows of each tensor, views, in order; the tensors are of one shape."""
    first = tensors_NV[0]
    elements = CACHED if first.device.type == "cpu" else HELD
    size = max(1, elements // max(1, first.shape[-1]))
    return zip(*(tensor.split(size) for tensor in tensors_NV), strict=True)


def log_sums(logits_NV: Tensor) -> Tensor:
    """The logarithm of each row's Σ exp, float32 `[N]`: a logit minus it is a log-probability."""
    return torch.cat([rows.float().logsumexp(-1) for (rows,) in few_rows(logits_NV)])
