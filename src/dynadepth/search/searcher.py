"""The search of a few prompts at once: two trees each, one towards the gold answer and one towards a wrong one.

All trees advance in step. What they ask for in one round is run together, and a route that both trees of a prompt ask
for is run once. The control says what the search's finds are worth: it goes towards an answer that is neither right
nor the dense model's, with the same settings and the same draws; what it reaches is luck. (Fifty routes hit one of
four answers often.)
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import PreTrainedModel

from dynadepth.errors import BudgetError, ConfigError
from dynadepth.route_file import Answer, PromptRoutes, Route
from dynadepth.search.answers import Reply, logistic, replies, with_rivals
from dynadepth.search.layers import MEMORY, LayerRunner
from dynadepth.search.questions import Question
from dynadepth.search.tree import Counts, RouteTree, TreeSettings

GROUP_TOKENS = 1024
"""Tokens of the prompts that are searched together, at most (one prompt may be longer)."""

GROUP_PROMPTS = 8
"""Prompts that are searched together, at most: what a kill can cost."""


@dataclass(frozen=True)
class SearchSettings:
    """What decides which routes are found; written into the file, and compared on `--resume`."""

    tree: TreeSettings = field(default_factory=TreeSettings)
    margin: float = 0.5
    """By how much the right answer must lead under a route that is kept, in nats. Ours: the paper has none, but
    what wins by less is decided by rounding (in bfloat16 leads move by up to 0.4 nats from one way of running the same
    layers to another) and by luck."""

    budget: float | None = None
    """Most layers that a kept route may run, as a share of the model's. None: as many as the dense route where that is
    right, up to `max_path` where it is wrong."""

    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.margin < math.inf:
            raise ConfigError(f"margin must be a number of nats from 0, not {self.margin}.")
        if self.budget is not None and not 0 < self.budget <= self.tree.max_path:
            raise BudgetError(
                f"budget must be above 0 and at most {self.tree.max_path:g} (layers run, of the model's), not "
                f"{self.budget:g}."
            )

    def check(self, n_layers: int) -> None:
        """Raises `BudgetError` where no route of a model with so many layers could be kept."""
        fewest = self.tree.fewest(n_layers)
        most = self.most_searched(n_layers)
        if most is not None and most < fewest:
            least = math.ceil(1000 * fewest / n_layers) / 1000
            raise BudgetError(
                f"no route can meet the budget {self.budget:g}: with at most {self.tree.max_consecutive_skips} "
                f"consecutive skips {fewest} of {n_layers} layers run at least; give {least:.3f} or more, or allow "
                "longer runs of skips."
            )

    def most_searched(self, n_layers: int) -> int | None:
        """Layers that the budget leaves; None without one."""
        return None if self.budget is None else math.floor(self.budget * n_layers + 1e-9)  # 0.7 · 90 is 62.99…

    def most_layers(self, n_layers: int, dense_is_right: bool) -> int:
        """Layers of the longest route that is kept."""
        most = n_layers if dense_is_right else int(self.tree.max_path * n_layers)
        return min(most, self.most_searched(n_layers) or most)

    def to_dict(self) -> dict[str, Any]:
        """For the file's header."""
        own = {name: value for name, value in asdict(self).items() if name != "tree"}
        return {**asdict(self.tree), **own}


def grouped(questions: Sequence[Question], seed: int = 0) -> list[list[Question]]:
    """Questions of nearly the same length together; the groups in random order, so that the time left can be told.
    They hang on the questions and `seed` alone."""
    groups: list[list[Question]] = []
    for question in sorted(questions, key=lambda question: len(question.row.ids)):
        tokens = len(question.row.ids)  # the longest of its group so far
        last = groups[-1] if groups else None
        if last is None or len(last) == GROUP_PROMPTS or tokens * (len(last) + 1) > GROUP_TOKENS:
            groups.append([question])
        else:
            last.append(question)
    random.Random(seed).shuffle(groups)
    return groups


class Searcher:
    """Searches routes for groups of questions with one model."""

    def __init__(self, model: PreTrainedModel, settings: SearchSettings, memory: int = MEMORY) -> None:
        self.settings = settings
        self.runner = LayerRunner(model, memory)
        self.n_layers = len(self.runner.layers)
        settings.check(self.n_layers)

    def search(self, questions: Sequence[Question]) -> list[PromptRoutes]:
        """What was found for each question, in their order. In float32 it depends on the question and the settings
        alone, but for the last bits of a log-probability. In bfloat16 leads move by tenths of a nat with what is
        computed together, and with them what a tree tries next and which routes are kept."""
        self.runner.take([question.row for question in questions])
        questions = with_rivals(self.runner, questions)
        searches = [_Search(question, self.n_layers, self.settings) for question in questions]
        while asked := [(number, counts) for number, search in enumerate(searches) for counts in search.ask()]:
            for (number, counts), reply in zip(asked, replies(self.runner, questions, asked), strict=True):
                searches[number].replies[counts] = reply
            for search in searches:
                search.tell()
        return [search.found(self.runner.executions[number]) for number, search in enumerate(searches)]


class _Search:
    """The two trees of one question, and what is known of its routes."""

    def __init__(self, question: Question, n_layers: int, settings: SearchSettings) -> None:
        self.question, self.n_layers, self.settings = question, n_layers, settings
        self.replies: dict[Counts, Reply] = {}
        self.dense = (1,) * n_layers
        self._seed = f"{settings.seed} {question.source} {question.id}"
        self._towards: dict[int, RouteTree] = {question.gold or 0: self._tree()}
        self._asked: dict[int, list[Counts]] = {}
        self.wrong: int | None = None

    def _tree(self) -> RouteTree:
        return RouteTree(self.n_layers, self.settings.tree, self._seed, self.settings.most_searched(self.n_layers))

    def ask(self) -> list[Counts]:
        """Routes to be answered; each once."""
        self._asked = {target: tree.ask() for target, tree in self._towards.items()}
        new = dict.fromkeys(counts for routes in self._asked.values() for counts in routes)
        # Where all of a round is known already, the trees go on at once.
        while new and all(counts in self.replies for counts in new):
            self._tell_trees()
            self._asked = {target: tree.ask() for target, tree in self._towards.items()}
            new = dict.fromkeys(counts for routes in self._asked.values() for counts in routes)
        return [counts for counts in new if counts not in self.replies]

    def tell(self) -> None:
        """Passes the answers on to the trees. After the dense route's the control begins."""
        self._tell_trees()
        if len(self.replies) == 1:
            self.wrong = self._wrong_target()
            if self.wrong is not None:
                control = self._towards[self.wrong] = self._tree()
                control.tell([self.replies[counts].reward(self.wrong) for counts in control.ask()])

    def _tell_trees(self) -> None:
        for target, routes in self._asked.items():
            if routes:
                self._towards[target].tell([self.replies[counts].reward(target) for counts in routes])
        self._asked = {}

    def _wrong_target(self) -> int | None:
        """An answer that is neither right nor the dense model's."""
        if self.question.options is None:
            return 1 if self.question.wrong else None
        taken = {self.question.gold, self.replies[self.dense].chosen}
        others = [option for option in range(len(self.question.options)) if option not in taken]
        return random.Random(f"control {self._seed}").choice(others) if others else None

    def found(self, executions: int) -> PromptRoutes:
        """The line of the file."""
        question, settings = self.question, self.settings
        gold = question.gold or 0
        dense = self.replies[self.dense].margin(gold)
        most = settings.most_layers(self.n_layers, dense > 0)
        wrong = None
        if self.wrong is not None:
            wrong = max((margin for counts, margin in self._margins(self.wrong) if sum(counts) <= most), default=None)
        apart = self.n_layers + sum(sum(c) for t in self._towards.values() for c in t.evaluated if c != self.dense)
        return PromptRoutes(
            id=question.id,
            source=question.source,
            prompt=question.prompt,
            options=question.options,
            gold=question.gold,
            completion=question.completion,
            dense=Answer(dense > 0, dense),
            routes=self._kept(gold, most),
            control=wrong,
            control_routes=() if self.wrong is None else self._kept(self.wrong, most),
            tried=tuple(Route(margin > 0, margin, counts) for counts, margin in self._margins(gold)),
            executions=executions,
            naive_executions=sum(map(sum, self.replies)),
            apart_executions=apart,
        )

    def _kept(self, target: int, most: int) -> tuple[Route, ...]:
        """The routes of at most so many layers that give the answer `target` by the margin, best first."""
        least = self.settings.margin
        kept = [
            Route(target == (self.question.gold or 0), margin, counts)
            for counts, margin in self._margins(target)
            if margin > 0 and margin >= least and sum(counts) <= most
        ]
        return tuple(sorted(kept, key=self._worth, reverse=True))

    def _margins(self, target: int) -> Iterator[tuple[Counts, float]]:
        """The routes that the search towards `target` evaluated, but for the dense one and those that overflow."""
        for counts in self._towards[target].evaluated:
            margin = self.replies[counts].margin(target)
            if counts != self.dense and math.isfinite(margin):
                yield counts, margin

    def _worth(self, route: Route) -> float:
        """The order of what is kept: the search's own measure, reward less the penalty for length."""
        return logistic(route.margin) - self.settings.tree.length_penalty * route.layers / self.n_layers
