"""A model's scores against another's (the dense model's, or its twin's), row by row: what a difference is worth.

Rows are the scores behind the means, as `evaluate(..., with_rows=True)` gives them. Intervals are 95 % percentiles of a
paired bootstrap (`dynadepth.statistics`): rows are drawn with replacement, the same ones for both models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dynadepth.statistics import paired_bootstrap

Rows = Mapping[str, Mapping[str, Sequence[float]]]


def against(own: Rows, other: Rows, seed: int = 0) -> dict[str, Any]:
    """Value, `low` and `high` of each difference from the other model.

    `perplexity`: per text the ratio of perplexities; `kl`: per text the difference of the distances from dense, nats a
    token; `tasks`: per task the difference of its usual metric; `average`: the difference of the tasks' mean, each
    task's rows drawn apart, None without tasks. Texts and tasks whose rows do not correspond are left out; `low` and
    `high` are None where there is one row.
    """
    texts = {
        name: {
            key: None if value is None else math.exp(min(value, 700.0))
            for key, value in _difference(*pair, seed).items()
        }
        for name, pair in _paired(own, other, "perplexity").items()
    }
    tasks = _paired(own, other, "tasks")
    return {
        "perplexity": texts,
        "kl": {name: _difference(*pair, seed) for name, pair in _paired(own, other, "kl").items()},
        "tasks": {name: _difference(*pair, seed) for name, pair in tasks.items()},
        "average": mean_difference(list(tasks.values()), seed) if tasks else None,
    }


def mean_difference(
    pairs: Sequence[tuple[Sequence[float], Sequence[float]]], seed: int = 0, n: int = 2000
) -> dict[str, float | None]:
    """Mean over several sets of paired rows of mean(a) − mean(b), each set resampled by itself."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(n, dtype=torch.float64)
    value = 0.0
    for a, b in pairs:
        difference = torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)
        value += float(difference.mean()) / len(pairs)
        for index in range(n):  # one draw at a time: n × rows at once would be large
            chosen = torch.randint(len(difference), (len(difference),), generator=generator)
            total[index] += difference[chosen].mean() / len(pairs)
    if min(len(a) for a, _ in pairs) < 2:
        return {"value": value, "low": None, "high": None}
    low, high = torch.quantile(total, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"value": value, "low": low, "high": high}


def _difference(a: Sequence[float], b: Sequence[float], seed: int) -> dict[str, float | None]:
    low, high = paired_bootstrap(a, b, seed=seed) if len(a) > 1 else (None, None)
    return {"value": sum(a) / len(a) - sum(b) / len(b), "low": low, "high": high}


def _paired(own: Rows, other: Rows, kind: str) -> dict[str, tuple[Sequence[float], Sequence[float]]]:
    mine, theirs = own.get(kind) or {}, other.get(kind) or {}
    pairs = {name: (rows, theirs.get(name) or ()) for name, rows in mine.items()}
    return {name: (a, b) for name, (a, b) in pairs.items() if a and len(a) == len(b)}
