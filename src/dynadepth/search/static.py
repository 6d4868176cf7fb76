"""The one route that serves the prompts of a file best: what any choice by prompt has to beat.

It starts from the dense route and takes one move after the other: a run of layers skipped, a layer repeated, or both.
Which moves are worth trying is known from the file: a search's first routes are single moves that it drew before it
knew anything, so that their mean gain is no luck of having been chosen. What they gain together is not known (two that
gain alone may lose together), so that each step runs its candidates on real prompts: all of them on a few prompts, the
better half on twice as many, and so on (successive halving).

The best of many is flattered by having been chosen. So each half of the prompts chooses for itself and is judged by the
other: a step is taken where what was chosen gains beyond the noise on the prompts that did not choose it
(cross-fitting), and then the better of both on all prompts.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from dynadepth.errors import DataError
from dynadepth.methods import StaticConfig
from dynadepth.route_file import PromptRoutes, RouteFile
from dynadepth.search.answers import logistic
from dynadepth.search.journal import Journal, Key
from dynadepth.search.layers import LayerRunner
from dynadepth.search.questions import Question
from dynadepth.search.replay import leads, questions_of
from dynadepth.search.tree import Counts, Move, TreeSettings, made
from dynadepth.statistics import standard_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = 4000
"""Most prompts that are used."""

BEYOND = 1.645
"""Standard errors that a step has to gain: what chance gives one in twenty."""

SKIPS, REPEATS = 4, 3
"""Moves of each kind that a step tries: those that gained most in the file, of those that fit the route."""

SELECTION = {"prompts": PROMPTS, "skips": SKIPS, "repeats": REPEATS, "beyond": BEYOND}
"""What the choice depends on beside the file, the model and the seed."""

KEPT = "static-route.jsonl"
"""File of what ran, in the folder that the route is to be saved in."""

Progress = Callable[[str], object]


@dataclass(frozen=True)
class Step:
    """One candidate that was taken."""

    counts: Counts
    """How often each layer runs now."""

    gain: float
    """Mean reward (`answers.Reply.reward`) above the route before, of what each half of the prompts chose on the other
    half."""

    error: float
    """Its standard error, paired by prompt."""


@dataclass(frozen=True)
class StaticRoute:
    """What was chosen, with figures of the prompts that it was chosen by: they flatter it a little."""

    counts: Counts
    accuracy: float
    dense: float
    """Accuracy of the dense route on the same prompts."""

    n_prompts: int
    steps: tuple[Step, ...]


def best_static(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    file: RouteFile,
    *,
    among: Collection[Key] | None = None,
    seed: int = 0,
    kept: Path | None = None,
    progress: Progress | None = None,
) -> StaticRoute:
    """The route that gives the prompts of a file the highest mean reward, running no more layers than the dense one.

    `among`: the prompts to use (all, `PROMPTS` at most). Routes are those that the file's search allows. `kept`: a file
    for what ran, from which an interrupted choice goes on; it is the caller's to remove. `progress` is given lines.
    Raises `DataError` for a file with fewer than two multiple-choice prompts.
    """
    questions = questions_of(file, tokenizer)
    if among is not None:
        questions = {key: question for key, question in questions.items() if key in among}
    if len(questions) < 2:
        raise DataError(
            f"routes are compared on multiple-choice prompts, two or more, and {len(questions)} of the file's "
            f"{len(file.prompts)} prompts are to be used: search more of them."
        )
    settings = TreeSettings(**{name: file.header.search[name] for name in ("max_consecutive_skips", "repeats")})
    depends = {"model": file.header.model, "dtype": str(getattr(model, "dtype", None)), "seed": seed, **SELECTION}
    asked = repr(sorted(questions.items())).encode()
    depends |= {"search": file.header.search, "prompts": hashlib.sha256(asked).hexdigest()}
    trial = _Trial(LayerRunner(model), questions, Journal(kept, depends), seed, progress)
    halves = trial.keys[::2], trial.keys[1::2]
    prompts = {(prompt.source, prompt.id): prompt for prompt in file.prompts}
    moves = [ranked_moves(prompts[key] for key in half) for half in halves]
    dense = route = (1,) * file.header.n_layers
    steps: list[Step] = []
    while all(candidates := [candidates_of(route, ranked, settings) for ranked in moves]):
        trial.stage = f"step {len(steps) + 1}"
        first, second = (trial.best_of(*pair) for pair in zip(candidates, halves, strict=True))
        gains = trial.gains(first, route, halves[1]) + trial.gains(second, route, halves[0])
        gain, error = sum(gains) / len(gains), standard_error(gains)
        if error is None or gain <= BEYOND * error:
            break
        route = max((first, second), key=lambda chosen: (trial.mean(chosen), -sum(chosen)))
        steps.append(Step(route, gain, error))
    return StaticRoute(route, trial.accuracy(route), trial.accuracy(dense), len(trial.keys), tuple(steps))


def static_route(counts: Sequence[int]) -> StaticConfig:
    """How often each layer runs, as a method."""
    return StaticConfig(
        target="block",
        layers="all",
        skip=tuple(layer for layer, count in enumerate(counts) if count == 0),
        repeat=tuple(layer for layer, count in enumerate(counts) if count == 2),
    )


def ranked_moves(prompts: Iterable[PromptRoutes]) -> list[Move]:
    """Moves by their mean gain (`drawn_gains`), best first."""
    gains = drawn_gains(prompts)
    return sorted(gains, key=lambda move: (-sum(gains[move]) / len(gains[move]), move))


def drawn_gains(prompts: Iterable[PromptRoutes]) -> dict[Move, list[float]]:
    """What the single moves that the searches drew first, before they knew anything, gain in reward over the dense
    route: one number for each prompt that tried the move."""
    gains: dict[Move, list[float]] = {}
    for prompt in prompts:
        moves = ((moves_in(route.counts), route) for route in prompt.tried)
        for move, route in takewhile(lambda pair: len(pair[0]) == 1, moves):
            gains.setdefault(move[0], []).append(logistic(route.margin) - logistic(prompt.dense.margin))
    return gains


def moves_in(counts: Counts) -> list[Move]:
    """The fewest moves from the dense route to this one."""
    found: list[Move] = []
    for layer, count in enumerate(counts):
        if count == 0 and found and found[-1][1] and sum(found[-1]) == layer:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found += [(layer, 1)] if count == 0 else [(layer, 0)] * (count - 1)
    return found


def candidates_of(counts: Counts, moves: Sequence[Move], settings: TreeSettings) -> list[Counts]:
    """What a step tries: the best moves that the route allows, alone and a skip with a repeat, where no more layers
    run than there are."""

    def fits(start: Counts, move: Move) -> bool:
        first, n = move
        touched = start[first : first + n] if n else start[first : first + 1]
        return all(count == 1 for count in touched) and settings.allows(made(start, move))

    fitting = [move for move in moves if fits(counts, move)]
    skips, repeats = [m for m in fitting if m[1]][:SKIPS], [m for m in fitting if not m[1]][:REPEATS]
    found = [made(counts, move) for move in skips + repeats]
    found += [made(made(counts, skip), again) for skip in skips for again in repeats if fits(made(counts, skip), again)]
    return [route for route in dict.fromkeys(found) if sum(route) <= len(route)]


class _Trial:
    """Routes run on prompts, each pair once."""

    def __init__(
        self,
        runner: LayerRunner,
        questions: Mapping[Key, Question],
        journal: Journal,
        seed: int,
        progress: Progress | None,
    ) -> None:
        keys = sorted(questions)
        random.Random(seed).shuffle(keys)
        self.runner, self.questions, self.journal, self.progress = runner, questions, journal, progress
        self.keys = keys[:PROMPTS]
        self.stage = ""
        self._leads: dict[tuple[Key, Counts], float] = {}

    def best_of(self, candidates: Sequence[Counts], keys: Sequence[Key]) -> Counts:
        """The candidate that is left after successive halving; it ran on all of these prompts."""
        rounds = max(1, math.ceil(math.log2(len(candidates))))
        left = list(candidates)
        for number in range(rounds, 0, -1):
            part = keys[: max(1, len(keys) >> (number - 1))]
            scores = {route: sum(rewards) for route, rewards in zip(left, self._rewards(left, part), strict=True)}
            left = sorted(left, key=lambda route: (-scores[route], sum(route), route))[: max(1, len(left) // 2)]
        return left[0]

    def gains(self, route: Counts, before: Counts, keys: Sequence[Key]) -> list[float]:
        """What a route gains over the one before, of each prompt."""
        new, old = self._rewards([route, before], keys)
        return [now - then for now, then in zip(new, old, strict=True)]

    def mean(self, route: Counts) -> float:
        """Reward of all prompts."""
        return sum(self._rewards([route], self.keys)[0]) / len(self.keys)

    def accuracy(self, route: Counts) -> float:
        """Share of all prompts that are answered rightly."""
        self._run([route], self.keys)
        return sum(self._leads[key, route] > 0 for key in self.keys) / len(self.keys)

    def _rewards(self, routes: Sequence[Counts], keys: Sequence[Key]) -> list[list[float]]:
        self._run(routes, keys)
        return [[logistic(self._leads[key, route]) for key in keys] for route in routes]

    def _run(self, routes: Sequence[Counts], keys: Sequence[Key]) -> None:
        wanted = {key: [route for route in routes if (key, route) not in self._leads] for key in keys}
        wanted = {key: missing for key, missing in wanted.items() if missing}
        if not wanted:
            return

        def told(done: int, total: int) -> None:
            if self.progress is not None:
                self.progress(f"{self.stage}: {len(routes)} routes on {done} of {total} prompts")

        self._leads |= leads(self.runner, {key: self.questions[key] for key in wanted}, wanted, told, self.journal)
