"""Prompts for timing: real text, cut to exact token counts, never random ids (routers decide on what they read)."""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dynadepth.errors import DataError

CHARS_PER_TOKEN = 12
"""Text tokenised per token asked for; prose takes about 4, and running short is an error rather than a guess."""


def cut_prompts(tokenizer: PreTrainedTokenizerBase, *, count: int, length: int, text: str | None = None) -> Tensor:
    """`count` different prompts of exactly `length` tokens, int64 `[count, length]`, cut from `text` at even distances.

    Each starts at the beginning of a paragraph or line, with the special tokens that the tokenizer puts first. `text`
    defaults to the topics of Python's own help, which every installation has. Raises `DataError` where the text is
    too short.
    """
    text = "\n\n".join(topics.values()) if text is None else text
    rows = []
    for index in range(count):
        start = _line_start(text, index * len(text) // count)
        excerpt = text[start : start + length * CHARS_PER_TOKEN].lstrip()
        rows.append(tokenizer(excerpt, verbose=False)["input_ids"][:length])
    shortest = min(map(len, rows), default=length)
    if shortest < length:
        raise DataError(
            f"the text of {len(text):,} characters is too short for {count} prompts of {length} tokens "
            f"(one has {shortest}): give a longer text, a smaller batch or a shorter context"
        )
    return torch.tensor(rows)


def _line_start(text: str, position: int) -> int:
    """The first paragraph start within the next 2,000 characters of `position`, else line start, else `position`."""
    if position == 0:
        return 0
    for separator in ("\n\n", "\n"):
        found = text.find(separator, position, position + 2000)
        if found >= 0:
            return found + len(separator)
    return position
