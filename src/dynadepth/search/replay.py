"""Searched routes run again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dynadepth.route_file import RouteFile
from dynadepth.search.answers import replies
from dynadepth.search.journal import Journal, Key, Leads
from dynadepth.search.layers import LayerRunner
from dynadepth.search.questions import Question, multiple_choice
from dynadepth.search.searcher import grouped
from dynadepth.search.tree import Counts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    journal: Journal | None = None,
) -> Leads:
    """By how much each question's right answer leads under each of its routes, nats (`Reply.margin`). Groups of
    questions that the `journal` knows are not run again."""
    journal = journal or Journal(None, {})
    found, done = Leads(), 0
    for group in grouped(list(questions.values())):
        asked = [(number, counts) for number, q in enumerate(group) for counts in routes[q.source, q.id]]
        pairs = [((group[number].source, group[number].id), counts) for number, counts in asked]

        def run(group: list[Question] = group, asked: list[Any] = asked, pairs: list[Any] = pairs) -> Leads:
            runner.take([question.row for question in group])
            given = zip(pairs, asked, replies(runner, group, asked), strict=True)
            return {pair: reply.margin(group[number].gold or 0) for pair, (number, _), reply in given}

        found |= journal.group(pairs, run)
        done += len(group)
        if progress is not None:
            progress(done, len(questions))
    return found
