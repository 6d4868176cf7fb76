"""The columns that tuning data may have, and how a row of each becomes token ids: one small reader a format."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from dynadepth.errors import DataError
from dynadepth.tuning.sources import Row, Table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Reader = Callable[[Row, "PreTrainedTokenizerBase", int], tuple[list[int], int]]
"""(row, tokenizer, limit) -> (ids, length of the prompt in them). No ids: no answer. Behind `limit` some may lack."""

_ALPACA_REQUEST = "Write a response that appropriately completes the request.\n\n### Instruction:\n"


class RowError(Exception):
    """A row that cannot be read; the loader adds where it stands."""


def format_of(table: Table) -> tuple[tuple[str, ...], Reader]:
    """The first known set of columns of the first row; DataError where there is none or a later line lacks it."""
    first = table.rows[0]
    columns = next((known for known in _FORMATS if all(column in first for column in known)), None)
    if columns is None:
        known = "; ".join(" + ".join(known) for known in _FORMATS)
        has = ", ".join(map(repr, first)) or "none"
        raise DataError(f"{table.name} has none of the known sets of columns ({known}): its columns are {has}.")
    if table.lines is not None:  # all rows of a dataset have the same columns
        for index, row in enumerate(table.rows):
            if lacking := [column for column in columns if column not in row]:
                raise DataError(
                    f"{table.where(index)} lacks {lacking[0]!r}: the file is read as {' + '.join(columns)}, "
                    "which its first row has."
                )
    return columns, _FORMATS[columns]


def encode_chat(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Ids of a user's `prompt`, ready to be answered: by the chat template, without one as plain text to continue."""
    if not tokenizer.chat_template:
        return _ids(tokenizer, prompt)
    turns = [{"role": "user", "content": prompt}]
    rendered = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    return _ids(tokenizer, rendered, special=False)


def _read_messages(row: Row, tokenizer: PreTrainedTokenizerBase, limit: int) -> tuple[list[int], int]:
    turns = row["messages"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) and "role" in turn for turn in turns):
        raise RowError("'messages' must be a list of objects with 'role' and 'content'")
    contents = [_text(turn, "content") for turn in turns]
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
    if last is None:
        raise RowError("'messages' has no turn with the role 'assistant'")
    if not contents[last].strip():
        return [], 0
    if not tokenizer.chat_template:
        lines = [f"{turn['role']}: {content}\n" for turn, content in zip(turns[:last], contents, strict=False)]
        return _answered(tokenizer, "".join(lines) + "assistant:", " " + contents[last], limit)
    try:
        prompt = str(tokenizer.apply_chat_template(turns[:last], tokenize=False, add_generation_prompt=True))
        whole = str(tokenizer.apply_chat_template(turns[: last + 1], tokenize=False))
    except Exception as error:  # templates raise whatever they like, with the reason in the message
        raise RowError(f"the chat template refuses it ({error})") from error
    if not whole.startswith(prompt):  # the template writes past turns differently: end the answer ourselves
        return _answered(tokenizer, prompt, contents[last], limit, special=False)
    return _answered(tokenizer, prompt, whole[len(prompt) :].rstrip("\n"), limit, special=False, end=False)


def _read_completion(row: Row, tokenizer: PreTrainedTokenizerBase, limit: int) -> tuple[list[int], int]:
    return _answered(tokenizer, _text(row, "prompt"), _text(row, "completion"), limit)


def _read_alpaca(row: Row, tokenizer: PreTrainedTokenizerBase, limit: int) -> tuple[list[int], int]:
    context = _text(row, "input") if row.get("input") is not None else ""
    head = "Below is an instruction that describes a task"
    head += ", paired with an input that provides further context. " if context.strip() else ". "
    body = _text(row, "instruction") + (f"\n\n### Input:\n{context}" if context.strip() else "")
    return _answered(tokenizer, f"{head}{_ALPACA_REQUEST}{body}\n\n### Response:\n", _text(row, "output"), limit)


def _read_question(row: Row, tokenizer: PreTrainedTokenizerBase, limit: int) -> tuple[list[int], int]:
    answer = _text(row, "answer")
    return _answered(tokenizer, f"Question: {_text(row, 'question')}\nAnswer:", answer and " " + answer, limit)


def _read_plain(row: Row, tokenizer: PreTrainedTokenizerBase, limit: int) -> tuple[list[int], int]:
    text = _text(row, "text")
    return _head_ids(tokenizer, text, limit) if text.strip() else [], 0


_FORMATS: dict[tuple[str, ...], Reader] = {
    ("messages",): _read_messages,
    ("prompt", "completion"): _read_completion,
    ("instruction", "output"): _read_alpaca,
    ("question", "answer"): _read_question,
    ("text",): _read_plain,
}


def _answered(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, limit: int, *, special: bool = True, end: bool = True
) -> tuple[list[int], int]:
    """Ids of prompt and answer. The prompt's are those it has alone: what the model sees when it is to answer."""
    if not answer.strip():
        return [], 0
    before = _ids(tokenizer, prompt, special) if prompt else []
    ids = _head_ids(tokenizer, prompt + answer, limit, special)
    if ids[: len(before)] != before:  # a token spans the border
        ids = before + _head_ids(tokenizer, answer, limit, special=False)
    if end and tokenizer.eos_token_id is not None and ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    return ids, len(before)


def _head_ids(tokenizer: PreTrainedTokenizerBase, text: str, limit: int, special: bool = True) -> list[int]:
    """At least the first `limit` ids of `text`, without reading all of a book."""
    head = text[: 16 * limit]
    ids = _ids(tokenizer, head, special)
    return ids if len(head) == len(text) or len(ids) > limit + 8 else _ids(tokenizer, text, special)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = True) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise RowError(f"{column!r} must be text, it is {type(value).__name__}")
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise RowError(f"{column!r} holds half of a surrogate pair, which is no character")
    return value
