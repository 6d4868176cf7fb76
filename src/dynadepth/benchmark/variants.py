"""Kinds of routing to be timed beside one another, without anything tuned: a route is drawn, its mechanism is real.

What a route costs does not depend on how good it is. Routers are MindSkip's linear ones with random weights at every
attention; their thresholds are set so that on the very prompts timed the asked share executes:

    static          the drawn route as a fixed one, whose routers are never asked
    sequence        routers asked at the prefill; the same route for every row
    route           routers asked for whole routes, at the lowest site; the same route for every row
    mixed           routers asked at the prefill; at each site another half of the rows (needs two rows)
    mixed-route     routers asked for whole routes; at each site another half of the rows (needs two rows)
    token-project   a decision a token, keys and values of skipped tokens stored
    token-drop      a decision a token, keys and values of skipped tokens left out

`static`, `sequence` and `route` skip the same attentions, those of `drawn_skip`, and have one pruned twin.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dynadepth.architectures import decoder_layers
from dynadepth.benchmark.pruned import shared_copy
from dynadepth.errors import ConfigError, did_you_mean
from dynadepth.methods import MindSkipConfig, StaticConfig
from dynadepth.model import attach
from dynadepth.routed import routing_of
from dynadepth.routing.decision import Site
from dynadepth.routing.skip_path import skip_path_named

KINDS = ("static", "sequence", "route", "mixed", "mixed-route", "token-project", "token-drop")
KEEP = 0.5
"""Share executed where none is named."""


@dataclass(frozen=True)
class Variant:
    """One kind of routing at one keep ratio; `str()` is how it is written, `sequence@0.5`."""

    kind: str
    keep: float = KEEP
    """Share of all attentions that executes, in [0, 1]; 1 lets all execute with the mechanism in place."""
    skip_path: str = "identity"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(
                f"there is nothing called {self.kind!r} to compare.{did_you_mean(self.kind, KINDS)} Known: "
                f"{', '.join(KINDS)}, each alone or with a keep ratio, such as sequence@0.75."
            )
        if not 0 <= self.keep <= 1:
            raise ConfigError(f"{self} has a keep ratio outside 0 to 1: write {self.kind}@0.75, for example.")
        skip_path_named(self.skip_path)

    def __str__(self) -> str:
        return f"{self.kind}@{self.keep:g}"

    @classmethod
    def parse(cls, text: str, skip_path: str = "identity") -> Variant:
        """From `sequence` or `sequence@0.75`. Raises `ConfigError`."""
        kind, at, share = text.strip().partition("@")
        try:
            keep = float(share) if at else KEEP
        except ValueError:
            raise ConfigError(f"{text!r} has no number behind the @: write {kind}@0.75, for example.") from None
        return cls(kind, keep, skip_path)

    @property
    def by_row(self) -> bool:
        """Do rows of a batch take different routes?"""
        return self.kind.startswith("mixed")

    @property
    def by_input(self) -> bool:
        """Do decisions follow what a row or token is?"""
        return self.by_row or self.granularity == "token"

    @property
    def granularity(self) -> str:
        """The routers'; of a static route, which has none, `sequence`."""
        return next((name for name in ("route", "token") if name in self.kind.split("-")), "sequence")

    @property
    def kv_policy(self) -> str:
        """Without effect but at `token` granularity."""
        return self.kind.removeprefix("token-") if self.granularity == "token" else "project"


def drawn_skip(n_layers: int, keep: float) -> tuple[int, ...]:
    """The layers whose attention is skipped: the whole number nearest to `(1 - keep) · n_layers`, drawn."""
    return tuple(sorted(random.Random(0).sample(range(n_layers), round((1 - keep) * n_layers))))


def drawn_sites(model: PreTrainedModel, keep: float) -> frozenset[Site]:
    """The sites of `drawn_skip`."""
    return frozenset(Site(layer, "attention") for layer in drawn_skip(len(decoder_layers(model)), keep))


def build(bare: PreTrainedModel, variant: Variant) -> PreTrainedModel:
    """A routed model on the weights of `bare`, which stays as it is; `settling` makes its decisions those asked for."""
    model = shared_copy(bare).eval()
    skip = drawn_skip(len(decoder_layers(model)), variant.keep)
    if variant.kind == "static":
        attach(model, StaticConfig(skip=skip, skip_path=variant.skip_path))
    else:
        attach(
            model,
            MindSkipConfig(
                layers="all",
                granularity=variant.granularity,
                kv_policy=variant.kv_policy,
                skip_path=variant.skip_path,
            ),
        )
    generator = torch.Generator().manual_seed(0)
    for site, router in routing_of(model).routers().items():
        for parameter in router.parameters():
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        router.threshold.fill_(float("inf") if site.layer in skip else float("-inf"))
    for path in routing_of(model).paths().values():
        path.to(model.dtype)  # float32 while they are tuned
    return model


@contextmanager
def settling(model: PreTrainedModel, variant: Variant) -> Iterator[None]:
    """Inside the block, which holds one prefill, each router moves its threshold between the logits it has just given,
    before it decides: `variant.keep` of these rows or tokens executes at every site.

    Where a route is the same for all rows there is nothing to move.
    """

    def between(router: torch.nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> None:
        router.threshold = _threshold(logits.flatten(), variant.keep)

    routers = routing_of(model).routers().values() if variant.by_input else ()
    hooks = [router.register_forward_hook(between) for router in routers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _threshold(logits: Tensor, keep: float) -> Tensor:
    """Midway between the last logit `[n]` that executes and the first that does not; infinite where there is none."""
    count = round(keep * len(logits))
    if count in (0, len(logits)):
        return logits.new_full((), float("-inf") if count else float("inf"))
    ordered = logits.sort(descending=True).values
    return (ordered[count - 1] + ordered[count]) / 2


def applicable(variants: Iterable[Variant], batch: int) -> list[Variant]:
    """Those that a batch of this size can show: one row cannot be mixed."""
    return [variant for variant in variants if batch > 1 or not variant.by_row]
