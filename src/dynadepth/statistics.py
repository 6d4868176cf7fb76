"""What a mean over rows is worth: its standard error, and a paired bootstrap interval of a difference."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def standard_error(rows: Sequence[float]) -> float | None:
    """Sample standard deviation over √n (as lm-evaluation-harness gives for a mean); None for fewer than two rows."""
    n = len(rows)
    if n < 2:
        return None
    mean = sum(rows) / n
    return math.sqrt(sum((row - mean) ** 2 for row in rows) / (n - 1) / n)


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], n: int = 2000, seed: int = 0, coverage: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of mean(a) - mean(b), where `a[i]` and `b[i]` are two variants' scores of the same row.

    Draws `n` resamples of the rows with replacement, the same rows for both variants, so that what makes a row hard or
    easy for both cancels. The answer depends on `seed` alone, and leaves the global random state as it was. Raises
    ValueError for fewer than two rows, of which nothing can be said beyond themselves.
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"two or more paired rows are needed, got {len(a)} and {len(b)}")
    difference = torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack([difference[torch.randint(len(a), (len(a),), generator=generator)].mean() for _ in range(n)])
    tail = (1 - coverage) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high
