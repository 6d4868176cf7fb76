"""Routes as people read them: a strip of one mark a layer, and the keep ratio of one sequence."""

from __future__ import annotations

from collections.abc import Mapping

from dynadepth.routing.decision import KeepRatio, Site

LEGEND = (
    "■ executed  □ skipped  ▂▄▆ executed for some of the tokens  · not routed, always executes; layer 0 is on the left"
)
_PARTLY = "▁▂▃▄▅▆▇"


def strip(route: Mapping[str, float], n_layers: int) -> str:
    """`■■□·`: one mark a layer for `{"2.attention": share executed}`; `LEGEND` says what they mean."""
    by_layer = {Site.parse(site).layer: share for site, share in route.items()}
    return "".join(_mark(by_layer.get(layer)) for layer in range(n_layers))


def _mark(share: float | None) -> str:
    if share is None:
        return "·"
    if share >= 1:
        return "■"
    return "□" if share <= 0 else _PARTLY[min(int(share * len(_PARTLY)), len(_PARTLY) - 1)]


def keep_of(route: Mapping[str, float], n_layers: int) -> KeepRatio:
    """Of one sequence: executed over routed sites, and over all sublayers of the target."""
    executed = sum(route.values())
    return KeepRatio(executed / len(route), (executed + n_layers - len(route)) / n_layers)
