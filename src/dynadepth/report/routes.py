"""Routes as people read them: a strip of one mark a layer, the keep ratio of one sequence, and how much the routes of
many differ."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dynadepth.routing.decision import KeepRatio, Site

LEGEND = (
    "■ executed  ▣ executed twice  □ skipped  ▂▄▆ executed for some of the tokens  · not routed, always executes; "
    "layer 0 is on the left"
)
_PARTLY = "▁▂▃▄▅▆▇"


def strip(route: Mapping[str, float], n_layers: int) -> str:
    """`■■□·`: one mark a layer for `{"2.attention": executions per unit}`; `LEGEND` says what they mean."""
    by_layer = {Site.parse(site).layer: share for site, share in route.items()}
    return "".join(_mark(by_layer.get(layer)) for layer in range(n_layers))


def _mark(share: float | None) -> str:
    if share is None:
        return "·"
    if share >= 1:
        return "■" if share == 1 else "▣"
    return "□" if share <= 0 else _PARTLY[min(int(share * len(_PARTLY)), len(_PARTLY) - 1)]


def keep_of(route: Mapping[str, float], n_layers: int) -> KeepRatio:
    """Of one sequence: executed over routed sites, and over all sublayers of the target."""
    executed = sum(min(passes, 1.0) for passes in route.values())
    return KeepRatio(executed / len(route), (executed + n_layers - len(route)) / n_layers)


def depth_of(route: Mapping[str, float], n_layers: int) -> float:
    """Executions of the target's sublayers in one sequence: layers, repeats counted twice."""
    return sum(route.values()) + n_layers - len(route)


def told(keep: Mapping[str, float] | None, mean: float | None) -> tuple[str, bool]:
    """The keep ratio of one answer's route in words, and whether it is above the mean of its method's answers."""
    if not keep:
        return "", False
    more = mean is not None and keep["all"] > mean + 1e-9
    words = f"{keep['all']:.0%} of all, {keep['routed']:.0%} of the routed sites"
    return (f"▲ {words}; its mean: {mean:.0%}" if more else words), more


def mean_keep(answers: Iterable[Mapping[str, Any]]) -> float | None:
    """Of the answers' keep ratios of all sublayers; None where there are none."""
    keeps = [answer["keep_ratio"]["all"] for answer in answers if answer.get("keep_ratio")]
    return sum(keeps) / len(keeps) if keeps else None


SHADES = 5


def shaded(depth: Sequence[tuple[str, float | None]], span: tuple[float, float]) -> list[tuple[str, int]]:
    """An answer in pieces, each with its shade: 0 for the least depth in `span`, `SHADES` − 1 for the most."""
    low, high = span
    pieces: list[tuple[str, int]] = []
    for text, share in depth:
        shade = 0
        if share is not None and high > low:
            shade = min(int(SHADES * (share - low) / (high - low)), SHADES - 1)
        if pieces and pieces[-1][1] == shade:
            pieces[-1] = (pieces[-1][0] + text, shade)
        else:
            pieces.append((text, shade))
    return pieces


def span_of(answers: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
    """The least and the most depth that a token of these answers had."""
    shares = [share for answer in answers for _, share in answer.get("depth") or () if share is not None]
    return min(shares, default=0.0), max(shares, default=0.0)


def variety(sequences: Sequence[Mapping[Site, float]], sticky: bool) -> dict[str, Any]:
    """How dynamic routing was, of the executions per site of each sequence (`Recorder.sequences`).

    `sequences`: their number; `distinct`: different routes among them; `entropy`: of the routes' distribution, in bits
    (0: one route for all; at most log2 of `sequences`); `agreement`: the share of the sites on which two sequences
    agree, mean over all pairs, None of a single one. Where decisions are not `sticky` a sequence has no one route:
    `distinct` and `entropy` are None, and `agreement` is that of two tokens, drawn from two sequences.
    """
    routes = Counter(tuple(sorted(row.items())) for row in sequences)
    count = len(sequences)
    entropy = sum((n / count * math.log2(count / n) for n in routes.values()), 0.0)
    return {
        "distinct": len(routes) if sticky else None,
        "sequences": count,
        "entropy": entropy if sticky else None,
        "agreement": _agreement(sequences),
    }


def _agreement(sequences: Sequence[Mapping[Site, float]]) -> float | None:
    """Mean over sites and pairs of the probability that two units do the same: skip, execute or repeat.

    Of units that execute x times on average those skip that `max(1 - x, 0)` says, and repeat `max(x - 1, 0)`.
    """
    count = len(sequences)
    if count < 2 or not sequences[0]:
        return None
    total = 0.0
    for site in sequences[0]:
        skips = [max(1 - row[site], 0.0) for row in sequences]
        repeats = [max(row[site] - 1, 0.0) for row in sequences]
        once = [1 - skip - repeat for skip, repeat in zip(skips, repeats, strict=True)]
        for shares in (skips, once, repeats):
            total += sum(shares) ** 2 - sum(share**2 for share in shares)
    return total / (len(sequences[0]) * count * (count - 1))
