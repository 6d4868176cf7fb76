"""Importance by removal: the damage that skipping sublayers does to the model's own distribution, skip paths in place.

Damage is KL(dense‖routed) in nats a token at the real tokens of `batches` (dicts with `input_ids` and `attention_mask`,
`[B, T]`), every `stride`-th position. The model is attached: what a skipped site contributes is what its skip path
says, so the same functions score identity skips and surrogates, for any architecture and target.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dynadepth.architectures.probe import quietly
from dynadepth.budget import Batches
from dynadepth.model import disabled, fixed_routes
from dynadepth.routed import routing_of, unwrapped
from dynadepth.routing.decision import Site

CHUNK = 256
"""Tokens whose vocabulary rows are held in float32 at once."""


class Damage:
    """Measures routes on fixed prompts; the dense model's answers are computed once."""

    def __init__(self, model: nn.Module, batches: Batches, stride: int = 4) -> None:
        """`stride`: of the positions, every so many are compared, which costs less vocabulary head."""
        self.model, self.batches, self.stride = model, batches, stride
        self.sites = routing_of(model).sites
        self.calls = 0
        with quietly(unwrapped(model)), disabled(model):
            self._dense = [self._logits(batch) for batch in batches]

    def of(self, skipped: Iterable[Site]) -> float:
        """The damage of skipping these sites together."""
        skip = set(skipped)
        self.calls += 1
        total, tokens = 0.0, 0
        with quietly(unwrapped(self.model)), fixed_routes(self.model, {site: site not in skip for site in self.sites}):
            for batch, dense in zip(self.batches, self._dense, strict=True):
                found = self._logits(batch)
                for teacher, student in zip(dense.split(CHUNK), found.split(CHUNK), strict=True):
                    log_p, log_q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
                    total += float((log_p.exp() * (log_p - log_q)).sum())
                tokens += len(dense)
        return total / max(tokens, 1)

    def _logits(self, batch: dict[str, Tensor]) -> Tensor:
        """`[N, V]` at the compared positions that are real, in the model's dtype."""
        base: Any = unwrapped(self.model)
        device = next(base.parameters()).device
        mask = batch["attention_mask"].to(device)
        columns = torch.arange(self.stride - 1, mask.shape[1], self.stride, device=device)
        given = {"input_ids": batch["input_ids"].to(device), "attention_mask": mask, "use_cache": False}
        if "logits_to_keep" in inspect.signature(base.forward).parameters:
            logits = base(**given, logits_to_keep=columns).logits
        else:
            logits = base(**given).logits[:, columns]
        return logits[mask[:, columns].bool()]


def alone(damage: Damage, progress: Callable[[int, int], None] | None = None) -> dict[Site, float]:
    """The damage of skipping each routed site alone."""
    scores = {}
    for done, site in enumerate(damage.sites):
        scores[site] = damage.of([site])
        if progress:
            progress(done + 1, len(damage.sites))
    return scores


def greedy(
    damage: Damage, count: int, patience: int = 8, progress: Callable[[int, int], None] | None = None
) -> dict[Site, float]:
    """Skips one site after the other, each time the one whose removal adds the least damage to those before.

    Returns the damage of the whole set when each site joined it, in that order: scores as `static_skip` wants them
    (sites that never joined are not in it). A candidate's increase is measured anew only while it promises to be the
    least, and of at most `patience` candidates a round, by their last known increases (lazy greedy: increases seldom
    shrink), so that about 5 measurements a site do instead of all.
    """
    chosen: dict[Site, float] = {}
    total = 0.0
    increase = dict.fromkeys(damage.sites, float("-inf"))
    while len(chosen) < min(count, len(damage.sites)):
        measured: dict[Site, float] = {}
        rest = [site for site in damage.sites if site not in chosen]
        limit = patience if chosen else len(rest)
        while True:
            best = min(rest, key=lambda site: increase[site])
            if best in measured:
                break
            if len(measured) >= limit:
                best = min(measured, key=lambda site: measured[site])
                break
            increase[best] = measured[best] = damage.of([*chosen, best]) - total
        total += measured[best]
        chosen[best] = total
        if progress:
            progress(len(chosen), min(count, len(damage.sites)))
    return chosen
