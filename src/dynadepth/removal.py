"""Importance by removal: the damage that skipping sublayers does to the model's own distribution, skip paths in place.

Damage is KL(dense‖routed) in nats a token at the real tokens of `batches` (dicts with `input_ids` and `attention_mask`,
`[B, T]`), every `stride`-th position. The model is attached: what a skipped site contributes is what its skip path
says, so the same functions score identity skips and surrogates, for any architecture and target.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dynadepth.architectures import decoder_layers
from dynadepth.architectures.probe import quietly
from dynadepth.budget import Batches, forward
from dynadepth.model import disabled, fixed_routes
from dynadepth.routed import routing_of, unwrapped
from dynadepth.routing.decision import Site
from dynadepth.vocabulary import few_rows

Progress = Callable[[int, int], None]


class Damage:
    """Measures routes on fixed prompts; the dense model's answers are computed once.

    What every layer gives under one route, at first the dense one, is remembered (the prompts' tokens × hidden size ×
    layers numbers, in the model's dtype): a route is computed from the lowest layer on where it differs from that one.
    """

    def __init__(self, model: nn.Module, batches: Batches, stride: int = 4) -> None:
        """`stride`: of the positions, every so many are compared, which costs less vocabulary head."""
        self.model, self.batches, self.stride = model, batches, stride
        self.sites = routing_of(model).sites
        self.calls = 0
        self._layers = decoder_layers(unwrapped(model), routing_of(model).spec)
        self._settled: frozenset[Site] = frozenset()
        self._outputs: list[list[Any]] = [[] for _ in batches]
        with disabled(model):
            self._dense = [self._logits(number, 0, keep=True) for number in range(len(batches))]

    def of(self, skipped: Iterable[Site]) -> float:
        """The damage of skipping these sites together."""
        skip = frozenset(skipped)
        self.calls += 1
        total, tokens = 0.0, 0
        with self._skipping(skip):
            for number, dense in enumerate(self._dense):
                found = self._logits(number, self._lowest_change(skip))
                for teacher, student in few_rows(dense, found):
                    log_p, log_q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
                    total += float((log_p.exp() * (log_p - log_q)).sum())
                tokens += len(dense)
        return total / max(tokens, 1)

    def settle(self, skipped: Iterable[Site]) -> None:
        """Remembers this route's layers: routes that differ from it at high layers alone are then measured faster."""
        skip = frozenset(skipped)
        if skip == self._settled:
            return
        with self._skipping(skip):
            for number, batch in enumerate(self.batches):
                with self._running(number, self._lowest_change(skip), keep=True):
                    forward(self.model, batch)
        self._settled = skip

    def _skipping(self, skip: frozenset[Site]) -> Any:
        return fixed_routes(self.model, {site: site not in skip for site in self.sites})

    def _lowest_change(self, skip: frozenset[Site]) -> int:
        return min((site.layer for site in skip ^ self._settled), default=len(self._layers))

    def _logits(self, number: int, first: int, keep: bool = False) -> Tensor:
        """`[N, V]` of a batch at the compared positions that are real, in the model's dtype; see `_running`."""
        base: Any = unwrapped(self.model)
        batch = self.batches[number]
        device = next(base.parameters()).device
        mask = batch["attention_mask"].to(device)
        columns = torch.arange(self.stride - 1, mask.shape[1], self.stride, device=device)
        given = {"input_ids": batch["input_ids"].to(device), "attention_mask": mask, "use_cache": False}
        with self._running(number, first, keep):
            if "logits_to_keep" in inspect.signature(base.forward).parameters:
                logits = base(**given, logits_to_keep=columns).logits
            else:
                logits = base(**given).logits[:, columns]
        return logits[mask[:, columns].bool()]

    @contextmanager
    def _running(self, number: int, first: int, keep: bool) -> Iterator[None]:
        """Inside the block layers below `first` give what is remembered of them for a batch; with `keep`, what the
        others give is remembered."""
        found: list[Any] = []
        hooks = [layer.register_forward_hook(_kept(found)) for layer in self._layers] if keep else []
        try:
            with quietly(unwrapped(self.model)), _replayed(self._layers, self._outputs[number][:first]):
                yield
        finally:
            for hook in hooks:
                hook.remove()
        if keep:
            self._outputs[number] = found


def _kept(found: list[Any]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output)

    return hook


@contextmanager
def _replayed(layers: Iterable[nn.Module], outputs: list[Any]) -> Iterator[None]:
    """Lets the first layers give these outputs instead of running."""
    stubs = list(zip(layers, outputs, strict=False))
    before = [vars(layer).get("forward") for layer, _ in stubs]  # accelerate's hooks put one on the instance
    try:
        for layer, output in stubs:
            layer.forward = _giving(output)
        yield
    finally:
        for (layer, _), own in zip(stubs, before, strict=True):
            if own is None:
                del layer.forward
            else:
                layer.forward = own


def _giving(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output


def alone(
    damage: Damage, progress: Progress | None = None, known: dict[Site, float] | None = None
) -> dict[Site, float]:
    """The damage of skipping each routed site alone. What is `known` is not measured again; the others join it."""
    scores = {} if known is None else known
    damage.settle(())
    for done, site in enumerate(damage.sites):
        if site in scores:
            continue
        scores[site] = damage.of([site])
        if progress:
            progress(done + 1, len(damage.sites))
    return scores


@dataclass
class GreedySearch:
    """A greedy search and what it has learnt so far: it can be stored between rounds, and gone on with."""

    chosen: dict[Site, float] = field(default_factory=dict)
    """The damage of the whole set when each site joined it, in that order."""
    increase: dict[Site, float] = field(default_factory=dict)
    """By how much each site last raised the damage. At the start these may be the sites' damages `alone`."""

    def extend(self, damage: Damage, count: int, patience: int = 8, progress: Progress | None = None) -> None:
        """Goes on until `count` sites are chosen, or all; see `greedy`. `progress` is called after each round."""
        count = min(count, len(damage.sites))
        while len(self.chosen) < count:
            damage.settle(self.chosen)
            total = next(reversed(self.chosen.values()), 0.0)
            measured: dict[Site, float] = {}
            rest = [site for site in damage.sites if site not in self.chosen]
            limit = patience if self.chosen else len(rest)
            while True:
                best = min(rest, key=lambda site: self.increase.get(site, float("-inf")))
                if best in measured:
                    break
                if len(measured) >= limit:
                    best = min(measured, key=lambda site: measured[site])
                    break
                self.increase[best] = measured[best] = damage.of([*self.chosen, best]) - total
            self.chosen[best] = total + measured[best]
            if progress:
                progress(len(self.chosen), count)


def greedy(damage: Damage, count: int, patience: int = 8, progress: Progress | None = None) -> dict[Site, float]:
    """Skips one site after the other, each time the one whose removal adds the least damage to those before.

    Returns the damage of the whole set when each site joined it, in that order: scores as `static_skip` wants them
    (sites that never joined are not in it). A candidate's increase is measured anew only while it promises to be the
    least, and of at most `patience` candidates a round, by their last known increases (lazy greedy: increases seldom
    shrink), so that about 5 measurements a site do instead of all.
    """
    search = GreedySearch()
    search.extend(damage, count, patience, progress)
    return search.chosen
