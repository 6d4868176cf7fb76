"""In which order sublayers are skipped: the one that is missed least goes first.

1 − cosine tells how far a sublayer turns the residual stream, damage how far the model's answers move when it is
skipped. Neither is the better one of every model and text, nor is the sum of their ranks (benchmarks/frontier). Which
one is better for a model shows where its first sublayers are skipped together on long texts of one piece; short ones
put end to end do not tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import nn

from dynadepth.architectures import positions_of
from dynadepth.budget import importance, joined, prompts_to_batches
from dynadepth.removal import Damage, GreedySearch, alone
from dynadepth.routed import routing_of, unwrapped
from dynadepth.routing.decision import Site
from dynadepth.tuning.data import Example, pad_token_id

WINDOW, WINDOWS = 2048, 16
"""Tokens and number of the windows that 1 − cosine is measured on."""
DAMAGE_WINDOWS, DAMAGE_STRIDE = 2, 4
"""Held-out windows on which damage is measured, and of whose tokens every so many are compared."""

LONG_TEXTS, SHARES = 2, (0.25, 0.5)
"""Texts on which two orders are compared, and the shares of the sublayers that are skipped there."""
CLEARLY = 0.9
"""Of the loss of 1 − cosine, what damage must stay below to be taken: two texts do not tell apart what is nearer."""

Scores = dict[Site, float]


def scores_by(
    model: nn.Module,
    order: str,
    examples: Sequence[Example],
    heldout: Sequence[Example],
    tokenizer: Any,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Importance of the routed sites by one of a recipe's orders: 1 − cosine of the examples, damage of the held-out
    ones, greedy removal on these, the sum of both ranks, or (`auto`) 1 − cosine unless damage clearly loses less
    (`compared`). Where tokens decide, `auto` is 1 − cosine. `progress` tells of each in turn."""
    pad = pad_token_id(tokenizer)
    if order == "cosine" or (order == "auto" and not routing_of(model).granularity.sticky):
        return _cosine(model, examples, pad, progress)
    windows = prompts_to_batches(_windows(model, heldout, DAMAGE_WINDOWS), pad)
    with torch.no_grad():
        damage = Damage(model, windows, DAMAGE_STRIDE)
        harm = alone(damage, progress)
        if order == "greedy":
            return one_after_the_other(damage, harm, progress)
    if order == "damage":
        return harm
    cosine = _cosine(model, examples, pad, progress)
    if order == "ranks":
        return by_rank(cosine, harm)
    losses = compared(model, [cosine, harm], long_texts(model, tokenizer), progress)
    return harm if losses[1] < CLEARLY * losses[0] else cosine


def one_after_the_other(damage: Damage, harm: Scores, progress: Callable[[int, int], None] | None = None) -> Scores:
    """Ranks from 1: half of the sites as a greedy search finds them, each the one that is missed least beside those
    before it, and then the others by their last known increase. `harm`: of each alone."""
    search = GreedySearch(increase=dict(harm))
    search.extend(damage, -(-len(harm) // 2), progress=progress)
    rest = sorted((site for site in harm if site not in search.chosen), key=search.increase.__getitem__)
    return {site: float(rank) for rank, site in enumerate([*search.chosen, *rest], 1)}


def compared(
    model: nn.Module,
    orders: Sequence[Scores],
    texts: Sequence[Sequence[int]],
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """KL(dense‖routed) on `texts` of skipping the first sublayers of each order together, with their paths in place:
    the mean over `SHARES` of the sites."""
    with torch.no_grad():
        damage = Damage(model, prompts_to_batches(texts, 0, batch_size=1), DAMAGE_STRIDE)
        counts = [round(share * len(damage.sites)) for share in SHARES]
        ranked = [sorted(scores, key=scores.__getitem__) for scores in orders]
        routes = [order[:count] for order in ranked for count in counts]
        losses = []
        for done, route in enumerate(routes, 1):
            losses.append(damage.of(route))
            if progress:
                progress(done, len(routes))
    each = len(counts)
    return [sum(losses[start : start + each]) / each for start in range(0, len(losses), each)]


def long_texts(model: nn.Module, tokenizer: Any) -> list[list[int]]:
    """The longest topics of Python's own help, as long as windows are (or the model reads)."""
    chosen = sorted(topics.values(), key=len, reverse=True)[:LONG_TEXTS]
    return [tokenizer(text[: 8 * WINDOW], verbose=False)["input_ids"][: _length(model)] for text in chosen]


def by_rank(cosine: Mapping[Site, float], harm: Mapping[Site, float]) -> Scores:
    """The sum of both ranks, which count from 1; of equal sums the less harmful site comes first."""
    first, second = ({site: rank for rank, site in enumerate(sorted(s, key=s.__getitem__), 1)} for s in (cosine, harm))
    return {site: first[site] + second[site] + second[site] / (2 * len(harm)) for site in harm}


def scores_of(
    model: nn.Module,
    examples: Sequence[Example],
    pad: int,
    target: str,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """1 − cosine importance of the target's sublayers on the texts of tuning examples, held-out ones among them, put
    end to end.

    The windows are long because attentions that copy from the context look dispensable where there is little of it, and
    then stand early in the order.
    """
    windows = prompts_to_batches(_windows(model, examples, WINDOWS), pad, batch_size=2)
    return importance(model, windows, target, progress)


def _windows(model: nn.Module, examples: Sequence[Example], count: int) -> list[list[int]]:
    """Long windows of the examples' texts, put end to end. A token with which every example begins (`<bos>`) begins
    every window."""
    first = {e.input_ids[0] for e in examples}
    special = list(first) if len(first) == 1 and len(examples) > 1 else []
    texts = (e.input_ids[len(special) :] for e in examples)
    return [special + ids for ids in joined(texts, _length(model) - len(special), count)]


def _length(model: nn.Module) -> int:
    """Tokens of a long window: as many as the model reads, at most `WINDOW`."""
    return min(WINDOW, positions_of(unwrapped(model)) or WINDOW)


def _cosine(
    model: nn.Module, examples: Sequence[Example], pad: int, progress: Callable[[int, int], None] | None
) -> Scores:
    routing = routing_of(model)
    scores = scores_of(model, examples, pad, routing.target.name, progress)
    return {site: score for site, score in scores.items() if site in routing.states}
