"""Searched routes run again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from dynadepth.route_file import RouteFile
from dynadepth.search.answers import replies
from dynadepth.search.layers import LayerRunner
from dynadepth.search.questions import Question, multiple_choice
from dynadepth.search.searcher import grouped
from dynadepth.search.tree import Counts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Key = tuple[str, str]
"""Source and id of a prompt."""


def questions_of(file: RouteFile, tokenizer: PreTrainedTokenizerBase) -> dict[Key, Question]:
    """The multiple-choice prompts of a file. (Which tokens of a short answer are its results, it does not hold.)"""
    return {
        (prompt.source, prompt.id): multiple_choice(prompt, tokenizer)
        for prompt in file.prompts
        if prompt.options is not None
    }


def leads(
    runner: LayerRunner,
    questions: Mapping[Key, Question],
    routes: Mapping[Key, Sequence[Counts]],
    progress: Callable[[int, int], object] | None = None,
) -> dict[tuple[Key, Counts], float]:
    """By how much each question's right answer leads under each of its routes, nats (`Reply.margin`)."""
    found, done = {}, 0
    for group in grouped(list(questions.values())):
        runner.take([question.row for question in group])
        asked = [(number, counts) for number, q in enumerate(group) for counts in routes[q.source, q.id]]
        for (number, counts), reply in zip(asked, replies(runner, group, asked), strict=True):
            question = group[number]
            found[(question.source, question.id), counts] = reply.margin(question.gold or 0)
        done += len(group)
        if progress is not None:
            progress(done, len(questions))
    return found
