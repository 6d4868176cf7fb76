"""How prompts are answered under routes: log-probabilities of their answers, margins, and the search's reward.

Shape suffixes: X predicting positions, P (position, token) pairs, D features, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dynadepth.search.layers import LayerRunner
from dynadepth.search.questions import Question
from dynadepth.search.tree import Counts
from dynadepth.vocabulary import log_sums, logit_chunks


@dataclass(frozen=True)
class Reply:
    """What a prompt's answers are worth under one route."""

    log_probs: tuple[float, ...]
    """Of a multiple choice: summed log-probability of each option, nats."""

    margins: tuple[tuple[float, ...], ...] = ()
    """Of a short answer, for the right results and the wrong ones: each token's log-probability minus that of the
    most likely other token, nats."""

    @property
    def chosen(self) -> int | None:
        """The option with the highest log-probability; None for a short answer."""
        return max(range(len(self.log_probs)), key=self.log_probs.__getitem__) if self.log_probs else None

    def margin(self, target: int) -> float:
        """By how much the option `target` beats the best other one; of a short answer, 0 the right results and 1 the
        wrong ones, at the token where it is least. Nats; above 0 where the target is the answer."""
        if self.log_probs:
            return self.log_probs[target] - max(p for o, p in enumerate(self.log_probs) if o != target)
        return min(self.margins[target])

    def reward(self, target: int) -> float:
        """Between 0 and 1: the logistic function of the margin, of a short answer its mean over the tokens (which,
        other than their least, tells a route that gets more of them right). The paper's reward is 1 for a right
        answer, else 0: routes that come near an answer are then all alike."""
        margins = (self.margin(target),) if self.log_probs else self.margins[target]
        return sum(map(logistic, margins)) / len(margins)


def logistic(margin: float) -> float:
    """Share of two alternatives' probability that belongs to the one which is ahead by `margin` nats; 0 of nan."""
    if math.isnan(margin):
        return 0.0
    return 1 / (1 + math.exp(-max(-60.0, min(60.0, margin))))


def replies(runner: LayerRunner, questions: Sequence[Question], asked: Sequence[tuple[int, Counts]]) -> list[Reply]:
    """Answers each (number of the question, route); the runner has taken the questions' rows."""
    if not asked:
        return []
    predicted = [question.predicted() for question in questions]
    places = [sorted({place for place, _, _ in pairs}) for pairs in predicted]
    most = max(len(places[number]) for number, _ in asked)
    picked: list[Tensor] = []
    for (number, _), state_TD in zip(asked, runner.run(asked), strict=True):
        own = places[number] + places[number][-1:] * (most - len(places[number]))
        picked.append(state_TD[own])
    states = runner.finish(torch.stack(picked))
    # The head runs on real places alone.
    states_XD = torch.cat([states.states_BTD[at, : len(places[number])] for at, (number, _) in enumerate(asked)])
    starts, start = [], 0
    for number, _ in asked:
        starts.append(start)
        start += len(places[number])
    pairs = [
        (starts[at] + places[number].index(place), token)
        for at, (number, _) in enumerate(asked)
        for place, token, _ in predicted[number]
    ]
    log_probs, others = _look_up(
        states_XD, states.to_logits, pairs, with_others=any(question.options is None for question in questions)
    )
    out, done = [], 0
    for number, _ in asked:
        end = done + len(predicted[number])
        out.append(_reply(questions[number], predicted[number], log_probs[done:end], others[done:end]))
        done = end
    return out


def with_rivals(runner: LayerRunner, questions: Sequence[Question]) -> list[Question]:
    """The questions, the short answers among them with a wrong result about as likely as the right one. The runner has
    taken the questions' rows.

    Where a token of the results is the dense model's choice it stays; elsewhere it is replaced by the token of the
    nearest log-probability, itself not the model's choice: as many tokens have to change as on the way to the right
    results, and they are about as far off. (Where the right token is the second likeliest its rival is less likely, by
    however much: such a control is the harder of the two.) Where the dense model has them all right there is no rival.
    """
    short = [number for number, question in enumerate(questions) if question.options is None]
    found = list(questions)
    dense = (1,) * len(runner.layers)
    for number, state_TD in zip(short, runner.run([(number, dense) for number in short]), strict=True):
        question = questions[number]
        places = [len(question.context) - 1 + at for at in question.results]
        states = runner.finish(state_TD[places][None])
        right_X = torch.tensor([question.continuations[0][at] for at in question.results], device=state_TD.device)
        wrong_X = _rivals(states.to_logits(states.states_BTD[0]).float(), right_X)
        found[number] = replace(question, wrong=() if wrong_X.equal(right_X) else tuple(wrong_X.tolist()))
    return found


def _rivals(logits_XV: Tensor, right_X: Tensor) -> Tensor:
    """The right token where it is the likeliest; else the other token, not the likeliest, that is nearest to it."""
    top_X = logits_XV.argmax(-1)
    distance_XV = (logits_XV - logits_XV.gather(1, right_X[:, None])).abs()
    distance_XV.scatter_(1, torch.stack((right_X, top_X), 1), torch.inf)
    return torch.where(top_X == right_X, right_X, distance_XV.argmin(-1))


def _reply(
    question: Question, predicted: list[tuple[int, int, int]], log_probs: list[float], others: list[float]
) -> Reply:
    groups: dict[int, list[int]] = {}
    for at, (_, _, group) in enumerate(predicted):
        groups.setdefault(group, []).append(at)
    if question.options is not None:
        return Reply(tuple(math.fsum(log_probs[at] for at in groups[group]) for group in sorted(groups)))
    return Reply((), tuple(tuple(log_probs[at] - others[at] for at in groups[group]) for group in sorted(groups)))


def _look_up(
    states_XD: Tensor, to_logits: Callable[[Tensor], Tensor], pairs: list[tuple[int, int]], with_others: bool
) -> tuple[list[float], list[float]]:
    """For each (row of `states_XD`, token): its log-probability and, if asked for, the highest one of another token."""
    rows_P, tokens_P = torch.tensor(pairs, device=states_XD.device).unbind(1)
    order_P = rows_P.argsort(stable=True)
    sorted_P = rows_P[order_P]
    found_P = torch.empty(len(pairs), dtype=torch.float32, device=states_XD.device)
    others_P = torch.zeros_like(found_P)
    for start, chunk_XV in logit_chunks(states_XD, to_logits):
        bounds = torch.tensor([start, start + len(chunk_XV)], device=states_XD.device)
        first, last = torch.searchsorted(sorted_P, bounds).tolist()
        chosen = order_P[first:last]
        rows, tokens = rows_P[chosen] - start, tokens_P[chosen]
        total_P = log_sums(chunk_XV)[rows]
        found_P[chosen] = chunk_XV[rows, tokens].float() - total_P
        if with_others:
            top = chunk_XV.float().topk(2, dim=-1)
            is_top = top.indices[rows, 0] == tokens
            others_P[chosen] = torch.where(is_top, top.values[rows, 1], top.values[rows, 0]) - total_P
    return found_P.tolist(), others_P.tolist()
