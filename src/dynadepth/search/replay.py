"""Searched routes run again: which prompts they answer rightly, and which one route serves them best."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from dynadepth.errors import DataError
from dynadepth.route_file import RouteFile
from dynadepth.search.answers import replies
from dynadepth.search.layers import LayerRunner
from dynadepth.search.questions import Question, multiple_choice
from dynadepth.search.searcher import grouped
from dynadepth.search.tree import Counts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Key = tuple[str, str]
"""Source and id of a prompt."""

CANDIDATES = 24
"""Routes that are tried for all prompts, beside the dense one."""

PROMPTS = 200
"""Prompts on which they are."""


def questions_of(file: RouteFile, tokenizer: PreTrainedTokenizerBase) -> dict[Key, Question]:
    """The multiple-choice prompts of a file. (Which tokens of a short answer are its results, it does not hold.)"""
    return {
        (prompt.source, prompt.id): multiple_choice(prompt, tokenizer)
        for prompt in file.prompts
        if prompt.options is not None
    }


def right(
    runner: LayerRunner,
    questions: Mapping[Key, Question],
    routes: Mapping[Key, Sequence[Counts]],
    progress: Callable[[int, int], object] | None = None,
) -> dict[tuple[Key, Counts], bool]:
    """Whether each question is answered rightly under each of its routes."""
    found, done = {}, 0
    for group in grouped(list(questions.values())):
        runner.take([question.row for question in group])
        asked = [(number, counts) for number, q in enumerate(group) for counts in routes[q.source, q.id]]
        for (number, counts), reply in zip(asked, replies(runner, group, asked), strict=True):
            question = group[number]
            found[(question.source, question.id), counts] = reply.margin(question.gold or 0) > 0
        done += len(group)
        if progress is not None:
            progress(done, len(questions))
    return found


def best_static(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    file: RouteFile,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> tuple[Counts, float, float]:
    """The one route that answers most prompts of a file rightly, its accuracy there, and the dense model's.

    Tried are the dense route and those that the search kept for the most prompts, on at most `PROMPTS` of them; of
    routes as good the one with the fewest layers. Choosing the best of many flatters it: score it on other prompts.
    Raises `DataError` for a file without multiple-choice prompts.
    """
    questions = questions_of(file, tokenizer)
    if not questions:
        raise DataError("the file of routes has no multiple-choice prompts, on which routes are compared.")
    keys = random.Random(seed).sample(sorted(questions), min(PROMPTS, len(questions)))
    kept = Counter(route.counts for prompt in file.prompts for route in prompt.routes)
    dense = (1,) * file.header.n_layers
    candidates = [dense, *(counts for counts, _ in kept.most_common(CANDIDATES))]
    tried = right(LayerRunner(model), {key: questions[key] for key in keys}, dict.fromkeys(keys, candidates), progress)

    def accuracy(counts: Counts) -> float:
        return sum(tried[key, counts] for key in keys) / len(keys)

    best = max(candidates, key=lambda counts: (accuracy(counts), -sum(counts)))
    return best, accuracy(best), accuracy(dense)
