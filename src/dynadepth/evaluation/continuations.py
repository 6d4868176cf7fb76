"""Log-probabilities of continuations after contexts, one route a prompt, each prompt read once.

Requests whose prompts (the tokens that a router may see) are the same are scored together. Where they read the same
tokens altogether (the letters of a multiple choice), they are one row of one forward. Where they go on differently,
the prompt is read once, and the rests continue on its cache, as generation would: at sequence granularity the route
sticks there.

Shape suffixes: B rows, T tokens, N scored positions, P (position, token) pairs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from dynadepth.evaluation.scoring import Scorer, States, pair_log_probs
from dynadepth.routed import is_attached, routing_of, unwrapped

Answer = tuple[float, bool]
"""Summed log-probability of a continuation in nats, and whether greedy decoding would write it."""

Tokens = tuple[int, ...]

SHORTEST_SHARED = 4
"""A prompt of fewer tokens (a lone `<bos>`, say) is not worth a cache."""

RUN = 32
"""Batches of prompts about as long, among which those whose rests are about as long may be put together."""

MOST_RESTS = 8
"""At most so many rests continue one prompt in one forward; more are further entries of the batch."""


@dataclass
class Request:
    """A continuation to be scored."""

    context: list[int]
    continuation: list[int]
    """At least one token."""

    pooled: int
    """How many of the tokens, at least one, are the prompt: all that a sequence-level router may see."""

    @property
    def tokens(self) -> Tokens:
        """What the model reads: everything but the last token, which is only predicted."""
        return (*self.context, *self.continuation[:-1])

    @property
    def prompt(self) -> Tokens:
        """The tokens that decide the route."""
        return self.tokens[: self.pooled]


Rests = dict[Tokens, list[int]]
"""What is read after a prompt -> indices of the requests that read it."""


class ContinuationScorer:
    """Scores requests with a routed or bare causal language model."""

    def __init__(self, model: Any, pad_token: int) -> None:
        self.model = model
        self.pad_token = pad_token
        self.scorer = Scorer(model, is_attached(model))
        # At token granularity there is no route to share, and the recorder takes a cache for one sequence a row.
        self.shares = _takes_positions(model) and (not is_attached(model) or routing_of(model).granularity.sticky)

    def __call__(
        self, requests: list[Request], batch_size: int, progress: Callable[[int], object] | None = None
    ) -> list[Answer]:
        """Answers in the order of the requests. `batch_size` counts prompts; `progress` is given the number
        answered."""
        prompts: dict[Tokens, Rests] = {}
        for index, request in enumerate(requests):
            rest = request.tokens[request.pooled :]
            prompts.setdefault(request.prompt, {}).setdefault(rest, []).append(index)
        alone: list[tuple[Tokens, Tokens]] = []
        shared: list[tuple[Tokens, Rests]] = []
        for prompt, rests in prompts.items():
            if self.shares and len(rests) > 1 and len(prompt) >= SHORTEST_SHARED:
                shared += [(prompt, dict(part)) for part in _batched(rests.items(), MOST_RESTS)]
            else:
                alone += [(prompt, rest) for rest in rests]
        alone.sort(key=lambda row: (len(row[0]) + len(row[1]), row), reverse=True)
        shared.sort(key=lambda row: (len(row[0]), row[0]), reverse=True)
        shared = [row for run in _batched(shared, RUN * batch_size) for row in _ordered(run, batch_size)]

        answers: dict[int, Answer] = {}
        for batch in _batched(alone, batch_size):
            answers |= self._score_alone([(p, r, prompts[p][r]) for p, r in batch], requests)
            if progress is not None:
                progress(len(answers))
        for group in _batched(shared, batch_size):
            answers |= self._score_shared(group, requests)
            if progress is not None:
                progress(len(answers))
        return [answers[index] for index in range(len(requests))]

    def _score_alone(self, batch: list[tuple[Tokens, Tokens, list[int]]], requests: list[Request]) -> dict[int, Answer]:
        ids_BT, mask_BT = self._padded([prompt + rest for prompt, rest, _ in batch], left=False)
        prompt_BT = torch.arange(ids_BT.shape[1], device=self.model.device) < self._column(len(p) for p, _, _ in batch)
        states = self.scorer(ids_BT, mask_BT, prompt_BT)
        places = _Places()
        for row, (prompt, rest, indices) in enumerate(batch):
            for index in indices:
                continuation = requests[index].continuation
                places.add(index, continuation, row, len(prompt) + len(rest) - len(continuation))
        return places.answers([states])

    def _score_shared(self, batch: list[tuple[Tokens, Rests]], requests: list[Request]) -> dict[int, Answer]:
        ids_BT, mask_BT = self._padded([prompt for prompt, _ in batch], left=True)
        positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
        first = self.scorer(ids_BT, mask_BT, mask_BT, position_ids=positions_BT, use_cache=True)
        if not _selectable(first.cache):
            self.shares = False
            return dict(self._one_by_one(batch, requests))
        rows = [(parent, rest) for parent, (_, rests) in enumerate(batch) for rest in rests if rest]
        forwards = [first]
        if rows:  # else all that is asked for is predicted inside the prompts
            lengths = [len(prompt) for prompt, _ in batch]
            forwards.append(self._go_on(first.cache, mask_BT, lengths, rows))
        places = _Places()
        at = {row: number for number, row in enumerate(rows)}
        for parent, (_, rests) in enumerate(batch):
            for rest, indices in rests.items():
                for index in indices:
                    continuation = requests[index].continuation
                    start = len(rest) - len(continuation)  # in the rest; below 0: predicted inside the prompt
                    before = max(0, min(len(continuation), -start))
                    places.add(index, continuation[:before], parent, ids_BT.shape[1] + start, forward=0)
                    places.add(index, continuation[before:], at.get((parent, rest), -1), max(start, 0), forward=1)
        return places.answers(forwards)

    def _go_on(self, cache: Any, mask_BT: Tensor, lengths: list[int], rows: list[tuple[int, Tokens]]) -> States:
        """Reads rests, each behind the prompt (its row in the cache, of `lengths` tokens) that it belongs to."""
        parents = torch.tensor([parent for parent, _ in rows], device=self.model.device)
        cache.batch_select_indices(parents)
        rest_ids_BT, rest_mask_BT = self._padded([rest for _, rest in rows], left=False)
        starts_B1 = self._column(lengths[parent] for parent, _ in rows)
        return self.scorer(
            rest_ids_BT,
            torch.cat([mask_BT[parents], rest_mask_BT], dim=1),
            None,
            position_ids=starts_B1 + torch.arange(rest_ids_BT.shape[1], device=self.model.device),
            past_key_values=cache,
            use_cache=True,
        )

    def _one_by_one(self, batch: list[tuple[Tokens, Rests]], requests: list[Request]) -> Iterator[tuple[int, Answer]]:
        for prompt, rests in batch:
            for rest, indices in rests.items():
                yield from self._score_alone([(prompt, rest, indices)], requests).items()

    def _padded(self, rows: list[Tokens], left: bool) -> tuple[Tensor, Tensor]:
        """Ids int64 and mask bool, `[B, T]`."""
        longest = max(map(len, rows))
        ids_BT = torch.full((len(rows), longest), self.pad_token)
        for ids_T, row in zip(ids_BT, rows, strict=True):
            start = longest - len(row) if left else 0
            ids_T[start : start + len(row)] = torch.tensor(row)
        lengths_B1 = torch.tensor([len(row) for row in rows])[:, None]
        columns_T = torch.arange(longest)
        mask_BT = columns_T >= longest - lengths_B1 if left else columns_T < lengths_B1
        return ids_BT.to(self.model.device), mask_BT.to(self.model.device)

    def _column(self, values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), device=self.model.device)[:, None]


class _Places:
    """Which positions of which forwards predict which token of which request."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, int, int], int] = {}  # (forward, row, position) -> number
        self._pairs: list[tuple[int, int, int]] = []  # (request, number of the place, token)

    def add(self, request: int, tokens: list[int], row: int, position: int, forward: int = 0) -> None:
        """The tokens are predicted at `position` and those after it."""
        for offset, token in enumerate(tokens):
            place = self._places.setdefault((forward, row, position + offset), len(self._places))
            self._pairs.append((request, place, token))

    def answers(self, forwards: list[States]) -> dict[int, Answer]:
        """Looks all of them up, the head applied once a place."""
        device = forwards[0].states_BTD.device
        found = []
        numbers = []
        for i, states in enumerate(forwards):
            chosen = [(row, position, n) for (forward, row, position), n in self._places.items() if forward == i]
            if chosen:
                rows_N, positions_N, numbers_N = torch.tensor(chosen, device=device).unbind(1)
                found.append(states.states_BTD[rows_N, positions_N])
                numbers.append(numbers_N)
        order_N = torch.cat(numbers).argsort()
        _, places_P, tokens_P = torch.tensor(self._pairs, device=device).unbind(1)
        log_probs_P, top_P = pair_log_probs(torch.cat(found)[order_N], forwards[0].to_logits, places_P, tokens_P)
        out: dict[int, Answer] = {}
        for (request, _, _), log_prob, top in zip(self._pairs, log_probs_P.tolist(), top_P.tolist(), strict=True):
            total, greedy = out.get(request, (0.0, True))
            out[request] = (total + log_prob, greedy and top)
        return out


def common_prefix(contexts: list[list[int]]) -> int:
    """Number of tokens with which all contexts begin."""
    for i, tokens in enumerate(zip(*contexts, strict=False)):
        if len(set(tokens)) > 1:
            return i
    return min(map(len, contexts))


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def _ordered(run: list[tuple[Tokens, Rests]], batch_size: int) -> list[tuple[Tokens, Rests]]:
    """By the length of the prompts, as they come, or of the longest rests: whichever pads less."""

    def read(order: list[tuple[Tokens, Rests]]) -> int:
        total = 0
        for batch in _batched(order, batch_size):
            rests = [len(rest) for _, rests in batch for rest in rests]
            total += max(len(prompt) for prompt, _ in batch) * len(batch) + max(rests) * len(rests)
        return total

    return min(run, sorted(run, key=lambda row: max(map(len, row[1])), reverse=True), key=read)


def _takes_positions(model: Any) -> bool:
    """Whether the model's own forward takes position ids (some with ALiBi do not), which left padding needs."""
    own = (vars(base).get("forward") for base in type(unwrapped(model)).__mro__)
    return any("position_ids" in inspect.signature(forward).parameters for forward in own if forward is not None)


def _selectable(cache: Any) -> bool:
    """Whether rows can be repeated: keys and values can, the states of linear attention cannot."""
    return isinstance(cache, DynamicCache) and all(isinstance(layer, DynamicLayer) for layer in cache.layers)
