"""Routers, or the static route of the same skip paths: whichever keeps closer to the dense model on held-out examples.

Both are compared at the same keep ratio, in which a long example counts for more, as in KL; routers of tokens, whose
skipped tokens are not free of the sublayer's work, at the same FLOPs. The static route skips the least important sites
first, as many as that makes; between two whole numbers of them, the figures of both are mixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from torch import nn

from dynadepth.budget import in_order, mixture
from dynadepth.cost import flops, flops_share, path_weights
from dynadepth.dial import set_budget
from dynadepth.methods import StaticConfig
from dynadepth.model import adopt_lora, attach, detach, fixed_routes
from dynadepth.routed import routing_of, unwrapped
from dynadepth.routing.decision import Site
from dynadepth.statistics import paired_bootstrap
from dynadepth.tuning.data import Collator, Example
from dynadepth.tuning.heldout import distances

ROUTERS, STATIC = "routers", "static"


@dataclass(frozen=True)
class Choice:
    """What was chosen, and the figures it rests on: KL(dense‖routed) in nats a token, mean over the budgets."""

    chosen: str
    """`routers` or `static`."""
    why: str
    """In words."""
    kl_routers: float
    kl_static: float
    interval: tuple[float, float] | None
    """Of `kl_routers - kl_static`, 95 %, paired by example; None for one example."""
    n_examples: int
    order: tuple[int, ...]
    """Of the static route: layers, the one that is skipped first coming first."""
    by_budget: tuple[dict[str, float], ...]
    """`budget`, `keep` (of all sublayers of the target, by scored token), `keep_static` (the same, but for routers of
    tokens), `kl_routers`, `kl_static`."""


def choose(
    model: nn.Module,
    examples: Sequence[Example],
    collator: Collator,
    budgets: Sequence[float],
    scores: Mapping[Site, float],
    progress: Callable[[int, int], None] | None = None,
) -> Choice:
    """Compares the calibrated routers of `model` with the static route of `scores` (importance by site) at `budgets`.

    The static route is chosen unless the routers are better beyond the noise, since it costs less. The model's budget
    is the last one compared afterwards.
    """
    order = in_order(scores)
    routed = distances(model, examples, collator, [partial(_at_budget, model, b) for b in budgets], progress)
    keeps = [found.executed for found in routed if found.executed is not None]
    assert len(keeps) == len(budgets), "a routed model records what it executes"
    equal = keeps
    if not routing_of(model).granularity.sticky:
        length = round(sum(len(example.input_ids) for example in examples) / len(examples))
        equal = [as_dear(model, keep, length) for keep in keeps]
    n, tokens = len(examples), max(routed[0].tokens, 1)
    each = n / tokens  # of an example's sum, so that the mean over examples is nats a token
    own = [[each * kl for kl in found.kl] for found in routed]
    twin = [[each * kl for kl in sums] for sums in twins(model, examples, collator, order, equal, progress)]
    a, b = ([sum(column) / len(budgets) for column in zip(*rows, strict=True)] for rows in (own, twin))
    interval = paired_bootstrap(a, b) if n > 1 else None
    kl_routers, kl_static = sum(a) / n, sum(b) / n
    chosen = ROUTERS if interval is not None and interval[1] < 0 else STATIC
    measured = zip(budgets, keeps, equal, own, twin, strict=True)
    return Choice(
        chosen=chosen,
        why=_why(chosen, kl_routers, kl_static, len(budgets), n),
        kl_routers=kl_routers,
        kl_static=kl_static,
        interval=interval,
        n_examples=n,
        order=order,
        by_budget=tuple(
            {
                "budget": budget,
                "keep": keep,
                "keep_static": keep_static,
                "kl_routers": sum(o) / n,
                "kl_static": sum(t) / n,
            }
            for budget, keep, keep_static, o, t in measured
        ),
    )


def as_dear(model: nn.Module, keep: float, length: int) -> float:
    """The keep ratio of a static route that takes as many FLOPs of the target's as routers of tokens do which execute
    `keep` of all its sublayers, in sequences of `length`; sublayers taken as equally dear."""
    routing, base = routing_of(model), unwrapped(model)
    routed = 1.0 - (1.0 - keep) * routing.n_layers / len(routing.sites)
    spent = flops_share(base, dict.fromkeys(routing.sites, routed), length).target
    whole = sum(flops(base, routing.target.name, site.layer, length) for site in routing.sites)
    path = sum(2 * length * path_weights(base, site) for site in routing.sites) / whole
    return min(1.0, 1.0 - (1.0 - spent) / (1.0 - path)) if path < 1.0 else 1.0


def twins(
    model: nn.Module,
    examples: Sequence[Example],
    collator: Collator,
    order: Sequence[int],
    keeps: Sequence[float],
    progress: Callable[[int, int], None] | None = None,
) -> list[list[float]]:
    """For each keep ratio of all sublayers, the Σ KL(dense‖routed) of every example under the static route that skips
    the first layers of `order`. Where no whole number of them has the ratio, of the two next to it, mixed."""
    routing = routing_of(model)
    mixed = [mixture(keep, routing.n_layers, len(order)) for keep in keeps]
    counts = sorted({count for parts in mixed for count, _ in parts})
    routes = [
        partial(fixed_routes, model, {site: site.layer not in order[:count] for site in routing.sites})
        for count in counts
    ]
    fixed = dict(zip(counts, distances(model, examples, collator, routes, progress), strict=True))
    return [[sum(share * fixed[c].kl[i] for c, share in parts) for i in range(len(examples))] for parts in mixed]


def settle(model: nn.Module, order: tuple[int, ...]) -> None:
    """Puts the static route of an order where the routers are, with their skip paths and LoRA. One route for every
    token is one for every sequence, so that it is routed by sequence, which stores no keys of what it skips."""
    routing = routing_of(model)
    path, rank, lora = routing.config.skip_path, routing.config.skip_rank, routing.lora
    detach(model)
    attach(model, StaticConfig(target=routing.target.name, skip_path=path, skip_rank=rank, order=order))
    routing_of(model).take_paths(routing)
    if lora is not None:
        adopt_lora(model, lora)
    routing_of(model).provenance = routing.provenance


def _why(chosen: str, kl_routers: float, kl_static: float, n_budgets: int, n: int) -> str:
    kl, other, of = (kl_routers, kl_static, "static route") if chosen == ROUTERS else (kl_static, kl_routers, "routers")
    noise = ", a difference within the noise" if other < kl else ""
    return (
        f"KL {kl:.4f} against {other:.4f} of the {of}{noise}, {n_budgets} budget{'s' if n_budgets > 1 else ''}, "
        f"{n} held-out text{'s' if n > 1 else ''}"
    )


@contextmanager
def _at_budget(model: nn.Module, budget: float) -> Iterator[None]:
    set_budget(model, **{routing_of(model).target.name: budget})
    yield
