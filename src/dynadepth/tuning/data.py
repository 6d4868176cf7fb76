"""Tuning data: JSON Lines files and `datasets` names become token ids with a known prompt length, then padded batches.

An example is one sequence of ids and the number of its tokens that are the prompt. A router may look at the prompt
alone and the loss counts the rest alone, so nothing downstream needs to know which columns a file had.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynadepth.errors import ConfigError, DataError
from dynadepth.routing.forward import content_prefix
from dynadepth.tuning.formats import RowError, format_of
from dynadepth.tuning.sources import open_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label that no loss counts."""


@dataclass(frozen=True)
class Example:
    """One tuning sequence."""

    input_ids: list[int]
    """Token ids, special tokens included."""

    prompt_length: int
    """How many of them are the prompt; at least one more follows. 0: plain text, no prompt is known."""


class Collator:
    """Pads examples on the right into one batch of B rows and T columns, T a multiple of `pad_to_multiple_of`.

    Plain text has no prompt: a prefix of 1/8 to 3/4 of its tokens (at least one) stands in for it. Its length hangs on
    the row's own ids and `seed` alone: it stays the same in every epoch and in any batch.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | int,
        *,
        pad_to_multiple_of: int = 8,
        seed: int = 0,
        score_prompts: bool = False,
    ) -> None:
        """`tokenizer`: for its pad token, or the id itself. `score_prompts`: prompts have labels, too."""
        self.score_prompts = score_prompts
        self.pad_token_id = tokenizer if isinstance(tokenizer, int) else pad_token_id(tokenizer)
        self.pad_to_multiple_of = pad_to_multiple_of
        self.seed = seed

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask`, `labels` (int64) and `prompt_mask` (bool), each `[B, T]`.

        Attended tokens have their own id as label, those in `prompt_mask` only with `score_prompts`; others have -100.
        """
        lengths = torch.tensor([[len(example.input_ids)] for example in examples])
        prompts = torch.tensor([[example.prompt_length] for example in examples])
        width = -(-int(lengths.max()) // self.pad_to_multiple_of) * self.pad_to_multiple_of
        column = torch.arange(width)
        attended = column < lengths
        input_ids = torch.full(attended.shape, self.pad_token_id)
        input_ids[attended] = torch.tensor([token for example in examples for token in example.input_ids])
        prefix = content_prefix(input_ids, attended, self.seed)
        prompt_mask = torch.where(prompts == 0, prefix, column < prompts)
        unscored = ~attended if self.score_prompts else prompt_mask | ~attended
        labels = input_ids.masked_fill(unscored, IGNORED)
        return {
            "input_ids": input_ids,
            "attention_mask": attended.long(),
            "labels": labels,
            "prompt_mask": prompt_mask,
        }

    def prefix_length(self, input_ids: Sequence[int]) -> int:
        """The length of a plain text's stand-in prompt."""
        ids = torch.tensor([input_ids])
        return int(content_prefix(ids, torch.ones_like(ids, dtype=torch.bool), self.seed).sum())


def load_examples(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_samples: int | None = None,
    max_length: int = 512,
    seed: int = 0,
    shuffle: bool = True,
) -> list[Example]:
    """At most `max_samples` examples of at most `max_length` tokens, in an order that `seed` decides.

    `source`: a `.jsonl` or `.jsonl.gz` file, or a `datasets` name or folder (`NAME` or `NAME:CONFIG`, split `train`).
    The first of these sets of columns that the first row has says how every row is read:

    - `messages`: by the tokenizer's chat template, without one as `role: content`; the last assistant turn is the
      answer, all before it the prompt, and later turns are left out;
    - `prompt`, `completion`: one directly after the other;
    - `instruction`, `output` and, where there is one, `input`: in Alpaca's prompt;
    - `question`, `answer`: as `Question: …\\nAnswer: …`;
    - `text`: plain text, `prompt_length` 0.

    Outside of a chat template an answer ends with the end-of-sequence token. Answers and plain texts that run over are
    cut at `max_length`. Rows whose prompt leaves no room for an answer, and rows without an answer, are dropped with
    one warning and the rows behind take their place. `shuffle=False` keeps the source's order.

    Raises `DataError` where the source is missing, damaged, empty, malformed at a line, has none of these columns, or
    where no row fits.
    """
    if (max_samples is not None and max_samples < 1) or max_length < 2:
        raise ConfigError(
            f"max_samples={max_samples} and max_length={max_length} leave nothing to tune on: "
            "it takes at least 1 sample of 2 tokens."
        )
    table = open_table(source)
    columns, read = format_of(table)
    order = list(range(len(table.rows)))
    if shuffle:
        random.Random(seed).shuffle(order)
    examples: list[Example] = []
    too_long: list[int] = []
    empty = 0
    for index in order:
        if len(examples) == max_samples:
            break
        try:
            ids, prompt = read(table.rows[index], tokenizer, max_length)
        except RowError as error:
            raise DataError(f"{table.where(index)} cannot be read as {' + '.join(columns)}: {error}.") from error
        if prompt >= max_length:
            too_long.append(prompt)
        elif len(ids) <= max(prompt, 1):
            empty += 1
        else:
            examples.append(Example(ids[:max_length], prompt))
    seen = len(examples) + len(too_long) + empty
    if too_long and not examples:
        raise DataError(
            f"No sample of {table.name} fits into max_length={max_length}: the shortest prompt takes {min(too_long)} "
            "tokens, and an answer needs at least one more; raise max_length or give shorter samples."
        )
    if not examples:
        raise DataError(
            f"None of the {seen} samples of {table.name} has anything to learn from: answers and texts are empty."
        )
    if too_long or empty:
        warnings.warn(
            f"{len(too_long) + empty} of {seen} samples of {table.name} were dropped: {len(too_long)} whose prompt "
            f"alone takes max_length={max_length} tokens or more and {empty} with nothing to learn from (no answer).",
            stacklevel=2,
        )
    return examples


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What to pad with; never attended, so any id will do where the tokenizer names none."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(i) for i in known if isinstance(i, int))
