"""A prompt and its continuations as one row of tokens.

The continuations (the options of a question) follow the prompt, with the positions they would have directly behind it,
and see the prompt and themselves alone. Masks and position embeddings for that are those of a plain forward, looked up
by position.

Shape suffixes: P prompts, N rows (a prompt under a route), T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynadepth.errors import UnsupportedModelError


@dataclass(frozen=True)
class Row:
    """A prompt and its continuations, as one row of tokens."""

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    branches: tuple[int, ...]
    """0 for the prompt's tokens, else the number of the continuation, from 1."""

    @classmethod
    def of(cls, prompt: Sequence[int], continuations: Sequence[Sequence[int]]) -> Row:
        """Each continuation is read directly behind the prompt; one may be empty."""
        ids, positions, branches = list(prompt), list(range(len(prompt))), [0] * len(prompt)
        for number, tokens in enumerate(continuations, start=1):
            ids += tokens
            positions += range(len(prompt), len(prompt) + len(tokens))
            branches += [number] * len(tokens)
        return cls(tuple(ids), tuple(positions), tuple(branches))


def by_position(value: Any, length: int, positions_PT: Tensor, allowed_PTT: Tensor) -> Any:
    """An argument of a plain forward `[1 or 2, length, ..]` for tokens at these positions, `[P, T, ..]`; masks
    `[2, .., length, length]` as `[P, .., T, T]`. What is no tensor stays."""
    if isinstance(value, (tuple, list)):
        return type(value)(by_position(item, length, positions_PT, allowed_PTT) for item in value)
    if not isinstance(value, Tensor):
        return value
    if value.ndim == 4 and value.shape[2:] == (length, length):
        mask_PTT = value[0, 0][positions_PT[:, :, None], positions_PT[:, None]]
        fill = False if value.dtype == torch.bool else torch.finfo(value.dtype).min
        return mask_PTT.masked_fill(~allowed_PTT, fill)[:, None]
    if value.ndim >= 2 and value.shape[1] == length:
        return value[0][positions_PT]
    if value.shape == (length,):  # places in a cache, which there is none of
        return torch.arange(positions_PT.shape[1], device=value.device)
    raise UnsupportedModelError(
        f"the search cannot read an argument of shape {tuple(value.shape)} that the layers of this model take."
    )


def rows_of(value: Any, prompts_N: Tensor) -> Any:
    """`[P, ..]` as `[N, ..]`, at any depth."""
    if isinstance(value, dict):
        return {name: rows_of(item, prompts_N) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(rows_of(item, prompts_N) for item in value)
    return value[prompts_N] if isinstance(value, Tensor) and value.ndim > 1 else value
