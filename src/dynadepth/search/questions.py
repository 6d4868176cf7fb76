"""Prompts whose answers are known: what the search reads of a data file, as tokens.

The formats are those of scoring (`evaluation/formats.py`), and so are prompts and options: what is searched for is what
`dynadepth eval` measures. A multiple choice is answered by the option with the highest summed log-probability.

A short answer is answered rightly if, given the gold answer up to there, no token is preferred to each token of its
*results*: in GSM8K the numbers that the solution's calculations give, and the final one (the calculations are marked
`<<48/2=24>>` in the data; the marks are taken out); in other files the whole answer. This stands in for generated
answers, which would cost a hundred times as much; it is no accuracy of generated answers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynadepth.errors import DataError
from dynadepth.evaluation.files import Row as Line
from dynadepth.evaluation.files import read_rows
from dynadepth.evaluation.files import stem as source_of
from dynadepth.evaluation.formats import FORMATS, Format, format_of
from dynadepth.route_file import PromptRoutes
from dynadepth.search.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWERS = frozenset(("gold", "answer", "final", "continuation"))
"""Fields of the known formats without which a row is a question alone."""

_MARK = re.compile(r"<<[^<>]*?=([^<>=]*)>>")
_FINAL = re.compile(r"####\s*")


@dataclass(frozen=True)
class Question:
    """One prompt with its answers, ready to be read under any route."""

    id: str
    source: str
    prompt: str
    options: tuple[str, ...] | None
    gold: int | None
    completion: str
    context: tuple[int, ...]
    """Tokens of the prompt."""

    continuations: tuple[tuple[int, ...], ...]
    """Tokens of each option; of the gold answer alone where it is a short one."""

    results: tuple[int, ...] = ()
    """Of a short answer: which of its tokens have to be right."""

    wrong: tuple[int, ...] = ()
    """Of a short answer: the tokens in their places that the control goes towards (`answers.with_rivals`); empty where
    there are none."""

    @property
    def row(self) -> Row:
        """What is read: each continuation without its last token, which is only predicted."""
        return Row.of(self.context, [tokens[:-1] for tokens in self.continuations])

    @property
    def length(self) -> int:
        """Tokens of the longest sequence that the model would read."""
        return len(self.context) + max(map(len, self.continuations)) - 1

    def predicted(self) -> list[tuple[int, int, int]]:
        """(place in the row, token to be predicted there, group): a group is an option; of a short answer, 0 is the
        right results and 1 the wrong ones."""
        if self.options is None:
            right = [self.continuations[0][at] for at in self.results]
            places = [len(self.context) - 1 + at for at in self.results]
            groups = [right, self.wrong]
            return [(place, t, g) for g, ts in enumerate(groups) for place, t in zip(places, ts, strict=False)]
        found, start = [], len(self.context)
        for group, tokens in enumerate(self.continuations):
            for at, token in enumerate(tokens):
                found.append((start + at - 1 if at else len(self.context) - 1, token, group))
            start += len(tokens) - 1
        return found


def digest(path: str | Path) -> str:
    """Tells one data file from another."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def load_questions(
    files: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    longest: int | None = None,
    limit: int | None = None,
) -> tuple[list[Question], list[str]]:
    """The questions of all files, of each the first `limit`; and one sentence for what was left out.

    `longest`: tokens that the model reads; longer prompts are left out. Raises `DataError` for files that cannot be
    read, hold no answers, or leave nothing.
    """
    questions: list[Question] = []
    remarks: list[str] = []
    for path in files:
        rows = read_rows(path)
        source = source_of(path)
        _check_answers(path, rows)
        format_ = format_of(source, rows)
        if "context_options" in format_.fields:
            raise DataError(f"{path} cannot be searched: its options differ in their context, not behind one prompt.")
        read = [_read(path, source, number, row, format_, tokenizer) for number, row in enumerate(rows[:limit])]
        fitting = [question for question in read if longest is None or question.length <= longest]
        if len(fitting) < len(read):
            first = next(question for question in read if question.length > (longest or 0))
            remarks.append(
                f"{len(read) - len(fitting)} of {len(read)} prompts of {path} are longer than the {longest} tokens "
                f"that the model reads, and are left out (the first is {first.id}, {first.length} tokens)."
            )
        questions += fitting
    if not questions:
        raise DataError(f"there is no prompt to search routes for. {' '.join(remarks)}")
    seen: set[tuple[str, str]] = set()
    for question in questions:
        if (question.source, question.id) in seen:
            raise DataError(f"{question.source} has the id {question.id!r} twice: ids tell prompts apart on --resume.")
        seen.add((question.source, question.id))
    return questions, remarks


def _check_answers(path: str | Path, rows: list[Line]) -> None:
    """Raises `DataError` where rows have the fields of a known format but for its answer. (One that has an answer in
    another form is left to `format_of`, which lists the forms.)"""
    for number, row in enumerate(rows, start=1):
        has = {name for name, value in row.items() if value is not None}
        if any(format_.fields <= has for format_ in FORMATS) or any(name.lower().startswith("answer") for name in has):
            continue
        for format_ in FORMATS:
            missing = format_.fields - has
            if missing and missing <= ANSWERS and format_.fields - ANSWERS:
                raise DataError(
                    f"{path} has no answer at row {number} (the field {sorted(missing)[0]!r}): routes are searched for "
                    "prompts whose right answer is known."
                )


def _read(
    path: str | Path, source: str, number: int, row: Line, format_: Format, tokenizer: PreTrainedTokenizerBase
) -> Question:
    prompt = str(format_.text(row))
    name = number if row.get("id") is None else row["id"]
    common: dict[str, Any] = {"id": str(name), "source": source, "prompt": prompt}
    if format_.choices is not None:
        options = tuple(" " + choice for choice in format_.choices(row))
        gold = int(format_.target(row))
        context, continuations = _tokens(prompt, options, tokenizer)
        completion, results = options[gold], tuple[int, ...]()
    else:
        options, gold = None, None
        completion, spans = _short_answer(row, format_)
        context, continuations = _tokens(prompt, [completion], tokenizer)
        results = _covering(prompt, completion, spans, len(context), tokenizer)
    if not context:
        raise DataError(f"Row {number + 1} of {path} has no prompt to read.")
    if not all(continuations) or (options is None and not results):
        raise DataError(f"Row {number + 1} of {path} has an answer that is no token of this model.")
    return Question(
        **common,
        options=options,
        gold=gold,
        completion=completion,
        context=context,
        continuations=continuations,
        results=results,
    )


def multiple_choice(prompt: PromptRoutes, tokenizer: PreTrainedTokenizerBase) -> Question:
    """The question of a prompt of a file of routes; it has options."""
    assert prompt.options is not None, "a short answer"
    context, continuations = _tokens(prompt.prompt, prompt.options, tokenizer)
    return Question(
        id=prompt.id,
        source=prompt.source,
        prompt=prompt.prompt,
        options=prompt.options,
        gold=prompt.gold,
        completion=prompt.completion,
        context=context,
        continuations=continuations,
    )


def _tokens(
    prompt: str, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Of the prompt, and of each text behind it, as lm-evaluation-harness cuts them; blanks at the prompt's end are the
    texts'."""
    context = tuple(tokenizer.encode(prompt.rstrip()))
    return context, tuple(tuple(tokenizer.encode(prompt + text)[len(context) :]) for text in texts)


def _short_answer(row: Line, format_: Format) -> tuple[str, list[tuple[int, int]]]:
    """The answer's text behind the prompt, and where in it the results stand."""
    if "answer" not in format_.fields:
        text = str(format_.target(row))  # with its blank
        return text, [(len(text) - len(text.lstrip()), len(text))]
    answer, text, spans, last = str(row["answer"]).strip(), " ", [], 0
    for mark in _MARK.finditer(answer):
        text += answer[last : mark.start()]
        last, result = mark.end(), mark[1].strip()
        if result and answer.startswith(result, last):
            spans.append((len(text), len(text) + len(result)))
    text += answer[last:]
    final = str(row["final"]).strip()
    stated = _FINAL.search(text)
    if stated is None:
        if final not in text:
            text = f"{text.rstrip()} {final}"
        start = text.rindex(final)
    else:
        start = stated.end()
        final = text[start:].strip()
    return text, [*spans, (start, start + len(final))]


def _covering(
    prompt: str, completion: str, spans: list[tuple[int, int]], n_context: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """Which tokens of the completion have a character inside the spans."""
    if not tokenizer.is_fast:
        raise DataError("short answers need a tokenizer that knows its tokens' places (a fast one); this one does not.")
    offsets = tokenizer(prompt + completion, return_offsets_mapping=True)["offset_mapping"][n_context:]
    inside = [(start + len(prompt), end + len(prompt)) for start, end in spans]
    return tuple(
        number
        for number, (start, end) in enumerate(offsets)
        if any(start < last and end > first for first, last in inside)
    )
