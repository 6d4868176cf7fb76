"""Answers of a model to prompts, with the route that each took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dynadepth.errors import ConfigError, DataError
from dynadepth.evaluation.files import is_table, read_rows, read_text
from dynadepth.report.routes import keep_of
from dynadepth.routed import routing_of
from dynadepth.routing.recorder import recording
from dynadepth.tuning.data import pad_token_id
from dynadepth.tuning.formats import encode_chat
from dynadepth.tuning.sampling import end_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int = 64
) -> list[dict[str, Any]]:
    """What the model writes to each prompt, greedily, as one left-padded batch: the `outputs` of `generate --json`.

    A prompt is set in the tokenizer's chat template where there is one, else continued. Each entry has `prompt`,
    `text`, `tokens` (the new token ids, up to and with the one that ends the text), `route` (per site the executions
    per unit of the prompt: 0, 1 or, repeated, 2 at sequence granularity) and `keep_ratio` of that route; the last two
    are None for a dense model. At token granularity it has `depth`: the text in pieces, each with the share of
    the routed sites that executed for its token; None for the last one, which was written and not read. Raises
    `DataError` for a prompt without any token.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, not {max_new_tokens}.")
    encoded = [encode_chat(tokenizer, prompt) for prompt in prompts]
    for number, ids in enumerate(encoded, start=1):
        if not ids:
            raise DataError(f"Prompt {number} is empty: {prompts[number - 1]!r}.")
    if not encoded:
        raise DataError("There is no prompt to answer.")
    width, pad = max(map(len, encoded)), pad_token_id(tokenizer)
    ids_BT = torch.tensor([[pad] * (width - len(ids)) + ids for ids in encoded], device=model.device)
    mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in encoded], device=model.device)
    with torch.no_grad(), recording(by_token=True) as record:
        generate: Any = model.generate
        written_BT = generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
        )
    ends = end_ids(model, tokenizer)
    routes = [{str(site): share for site, share in row.items()} for row in record.sequences]
    shares_BT = record.token_shares[0][:, width:].tolist() if record.token_shares else None
    outputs: list[dict[str, Any]] = []
    for row, prompt in enumerate(prompts):
        tokens = _until(written_BT[row, width:].tolist(), ends)
        route = routes[row] if routes else None
        outputs.append(
            {
                "prompt": prompt,
                "text": tokenizer.decode(tokens, skip_special_tokens=True),
                "tokens": tokens,
                "route": route,
                "keep_ratio": route and asdict(keep_of(route, routing_of(model).n_layers)),
            }
        )
        if shares_BT is not None:
            outputs[-1]["depth"] = _depth(tokenizer, tokens, shares_BT[row])
    return outputs


def _depth(
    tokenizer: PreTrainedTokenizerBase, tokens: list[int], shares: Sequence[float]
) -> list[tuple[str, float | None]]:
    """Each token's part of the text, with its share; where it ends inside of a character, the next token has that."""
    pieces: list[tuple[str, float | None]] = []
    text = ""
    for number in range(len(tokens)):
        longer = str(tokenizer.decode(tokens[: number + 1], skip_special_tokens=True))
        whole = not longer.endswith("\ufffd") or number == len(tokens) - 1
        pieces.append((longer[len(text) :] if whole else "", shares[number] if number < len(shares) else None))
        text = longer if whole else text
    return pieces


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file: its lines, or the `prompt` fields of JSON Lines; blank lines are left out.

    Raises `DataError` for a file that is missing, empty, malformed at a line, or has a row without `prompt`.
    """
    if not is_table(path):
        return [line for line in read_text(path).splitlines() if line.strip()]
    rows = read_rows(path)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get("prompt"), str):
            raise DataError(f"Row {number} of {path} has no text field 'prompt' but {', '.join(map(repr, row))}.")
    return [row["prompt"] for row in rows]


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    """Without what was padded behind the end."""
    stop = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]
