"""The cells of the parity matrix, their inputs and their decisions.

A cell is a target at a granularity (and, where keys of skipped tokens are a question, a KV policy). Targets,
granularities and methods are found where the package finds them: a new one is in the matrix without an edit here.

Shape suffixes: B sequences, T tokens. Padding is on the left or on the right, of another amount in each row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import dynadepth
from dynadepth import MindSkipConfig, Site
from dynadepth.methods.config import KV_POLICIES
from dynadepth.routing.granularity import Granularity, granularity_named
from dynadepth.routing.registry import import_modules, subclasses
from dynadepth.routing.skip_path import AbstractSkipPath
from dynadepth.routing.target import Target, target_named

from .models import FAMILIES, FUSED, LAYERS, MODELS, VOCABULARY, tiny
from .oracle import RANK, surrogate_weights

BATCH, TOKENS, PADDING = 3, 12, (4, 0, 2)
LAYER_RANGE = tuple(range(LAYERS))


@dataclass(frozen=True)
class Cell:
    """One way of routing a model."""

    target: str
    granularity: str
    kv_policy: str
    skip_path: str = "identity"

    def __str__(self) -> str:
        parts = [self.target, self.granularity, self.kv_policy if self.has_policy else "", self.skip_path]
        return "-".join(part for part in parts if part not in ("", "identity"))

    @property
    def has_policy(self) -> bool:
        """Does the KV policy make a difference?"""
        return target_named(self.target).keeps_kv and not self.sticky

    @property
    def sticky(self) -> bool:
        return granularity_named(self.granularity).sticky

    @property
    def settings(self) -> dict[str, Any]:
        """What every method's configuration is given to route all layers this way."""
        return {
            "target": self.target,
            "granularity": self.granularity,
            "kv_policy": self.kv_policy,
            "layers": LAYER_RANGE,
            "skip_path": self.skip_path,
            "skip_rank": RANK,
        }

    @property
    def sites(self) -> list[Site]:
        return [Site(layer, self.target) for layer in LAYER_RANGE]

    def attach(self, model: Any) -> Any:
        return self.with_paths(dynadepth.attach(model, MindSkipConfig(**self.settings)))

    def with_paths(self, model: Any) -> Any:
        """The model, its linear skip paths set to the oracle's weights."""
        for site, path in dynadepth.routing_of(model).paths().items():
            with torch.no_grad():
                weights = surrogate_weights(site.layer, path.bias.shape[0])
                for parameter, value in zip((path.read, path.write, path.bias), weights, strict=True):
                    parameter.copy_(value)
        return model


def _cells() -> Iterator[Cell]:
    import_modules("dynadepth.routing")
    for target in subclasses(Target):
        for granularity in subclasses(Granularity):
            for policy in KV_POLICIES:
                for path in subclasses(AbstractSkipPath):
                    cell = Cell(target.name, granularity.name, policy, path.name)
                    if not (target.general and granularity.general):
                        continue  # one method's own, with tests of its own
                    if cell.has_policy or policy == KV_POLICIES[0]:
                        yield cell


CELLS = tuple(_cells())


def is_refused(name: str, cell: Cell) -> bool:
    """Keys of skipped tokens cannot be projected where queries, keys and values come from one fused matrix."""
    return cell.has_policy and cell.kv_policy == "project" and name.partition("-")[0] in FUSED


REFUSED = [(name, cell) for name in MODELS for cell in CELLS if is_refused(name, cell)]
MATRIX = [
    (name, cell)
    for name in MODELS
    for cell in CELLS
    if not is_refused(name, cell) and (name in FAMILIES or cell.skip_path == "identity")
]
ONCE = [(name, cell) for name, cell in MATRIX if name in FAMILIES]
"""Every family with one attention implementation, for what does not depend on it."""
SHORT = [(name, cell) for name, cell in ONCE if name in ("llama", "mistral", "gemma3", "gpt_neox_serial", "gpt_oss")]
"""A few that differ most, for what hardly depends on the architecture."""


def over(pairs: list[tuple[str, Cell]]) -> Any:
    """Parametrises a test with `name` and `cell`."""
    return pytest.mark.parametrize(("name", "cell"), pairs, ids=[f"{name}-{cell}" for name, cell in pairs])


def inputs(side: str = "left", seed: int = 0) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, `[B, T]`; ids are random under the padding, too, so that a leak shows."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (BATCH, TOKENS), generator=generator)
    mask = torch.ones_like(ids)
    for row, amount in enumerate(PADDING):
        mask[row, slice(0, amount) if side == "left" else slice(TOKENS - amount, TOKENS)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def decisions(cell: Cell, seed: int = 0) -> dict[Site, Tensor]:
    """Bools `[B]` or `[B, T]` for every site: rows and tokens mixed; one layer that all skip, one that all execute.

    The third layer is run by the first row alone, which with padding on the left begins after the others.
    """
    generator = torch.Generator().manual_seed(seed)
    given = {}
    for site in cell.sites:
        if cell.sticky:
            pattern = ((True, False, True), (False, False, False), (True, False, False), (True, True, True))
            given[site] = torch.tensor(pattern[site.layer])
            continue
        execute = torch.rand(BATCH, TOKENS, generator=generator) < 0.6
        if site.layer == 1:
            execute[0] = False  # a row that skips, beside rows that do not
        if site.layer == 2:
            execute[:, : TOKENS // 2] = False  # a first chunk in which nothing executes
        if site.layer == 3:
            execute[:, : TOKENS // 2] = True  # a first chunk in which everything executes, and later holes
        given[site] = execute
    return given


@torch.no_grad()
def routed(name: str, cell: Cell, batch: dict[str, Tensor], seed: int = 0, **options: Any) -> Any:
    """A fresh tiny model with random routers that disagree: each threshold lies in the widest gap between the middle
    logits of this batch, far from all of them."""
    model = cell.attach(tiny(name))
    generator = torch.Generator().manual_seed(seed)
    real = batch["attention_mask"].bool()
    # From the bottom: each router sees what those below it leave.
    for site, router in dynadepth.routing_of(model).routers().items():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        logits = model(**batch, **options).depth_logits[site]
        ordered = (logits[real] if logits.dim() == 2 else logits).sort().values
        low, high = len(ordered) // 4, -(-3 * len(ordered) // 4)
        gaps = ordered[low + 1 : high] - ordered[low : high - 1]
        place = low + int(gaps.argmax())
        router.threshold.copy_((ordered[place] + ordered[place + 1]) / 2)
    return model


def in_chunks(
    model: Any, batch: dict[str, Tensor], lengths: tuple[int, ...], given: Any = None, **options: Any
) -> list[Any]:
    """The outputs of a prefill of `lengths[0]` tokens and its continuations on one cache.

    `given`: decisions to inject, those of a token cut like the ids.
    """
    outputs: list[Any] = []
    cache, start = None, 0
    for length in lengths:
        part = slice(start, start + length)
        now = None if given is None else {s: d if d.dim() == 1 else d[:, part] for s, d in given.items()}
        mask = batch["attention_mask"][:, : start + length]
        arguments = {"input_ids": batch["input_ids"][:, part], "attention_mask": mask, "past_key_values": cache}
        routes = nullcontext() if now is None else dynadepth.fixed_routes(model, now)
        with torch.no_grad(), routes:
            outputs.append(model(**arguments, **options))
        cache, start = outputs[-1].past_key_values, start + length
    assert start == batch["input_ids"].shape[1]
    return outputs


def assert_same(found: Tensor, wanted: Tensor, real: Tensor | None = None, atol: float = 2e-5) -> None:
    """Equal within float tolerance, at the real tokens `[B, T]` where given; and not by being nothing."""
    if real is not None:
        found, wanted = found[real.bool()], wanted[real.bool()]
    assert torch.isfinite(wanted).all()
    torch.testing.assert_close(found, wanted, atol=atol, rtol=1e-4)
