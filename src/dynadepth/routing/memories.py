"""What skip paths remember between forwards, by site and row: the part of a `RoutedCache` that is not keys and
values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynadepth.routing.decision import Site
from dynadepth.routing.skip_path import AbstractSkipPath, Memory


class Memories:
    """One `Memory` a site, of the logical rows that take its skip path. `recording`: keep what `crop` must take
    back."""

    def __init__(self, recording: bool = False) -> None:
        self.recording = recording
        self._held: dict[Site, tuple[list[int], Memory]] = {}

    def record(self) -> None:
        """From now on what comes can be taken back."""
        if not self.recording:
            self.recording = True
            self._held = {site: (rows, memory.recording()) for site, (rows, memory) in self._held.items()}

    def of(self, site: Site, rows: Sequence[int], path: AbstractSkipPath, like: Tensor) -> Memory | None:
        """The memory of `rows`, in that order; rows that were not there begin anew."""
        held, memory = self._held.get(site, ([], None))
        if memory is not None and held == list(rows):
            return memory
        fresh = path.begin(len(rows), like)
        if fresh is not None and self.recording:
            fresh = fresh.recording()
        kept = [(new, held.index(row)) for new, row in enumerate(rows) if row in held]
        if fresh is None or memory is None or not kept:
            return fresh
        new, old = torch.tensor(kept, device=like.device).T
        return _grown(fresh, memory, new, old)

    def keep(self, site: Site, rows: Sequence[int], memory: Memory | None) -> None:
        """Remembers what a path returned."""
        if memory is not None:
            self._held[site] = (list(rows), memory)

    def take(self, order: Sequence[int]) -> None:
        """Logical row `j` becomes what row `order[j]` was."""
        for site, (rows, memory) in list(self._held.items()):
            place = {row: i for i, row in enumerate(rows)}
            index = torch.tensor([place[row] for row in order if row in place], dtype=torch.long)
            stay = [j for j, row in enumerate(order) if row in place]
            if not stay:
                del self._held[site]
                continue
            self._held[site] = (stay, memory.map(lambda t, i=index: t.index_select(0, i.to(t.device))))

    def reorder(self, order: Tensor) -> None:
        """`take` where all rows take a site's skip path or none does, without asking the device. What some rows left
        behind when they saw only padding, and now execute there, is forgotten."""
        for site, (rows, memory) in list(self._held.items()):
            if len(rows) != len(order):
                del self._held[site]
                continue
            self._held[site] = (rows, memory.map(lambda t: t.index_select(0, order.to(t.device))))

    def cropped(self, tokens: int) -> dict[Site, tuple[list[int], Memory]] | None:
        """The contents before the latest `tokens` tokens; None where they were not recorded."""
        result = {}
        for site, (rows, memory) in self._held.items():
            earlier = memory.without(tokens)
            if earlier is None:
                return None
            result[site] = (rows, earlier)
        return result

    def restore(self, contents: dict[Site, tuple[list[int], Memory]]) -> None:
        """Puts back what `cropped` returned."""
        self._held = contents

    def clear(self) -> None:
        """Forgets everything."""
        self._held.clear()

    def bytes(self) -> int:
        """Bytes of constant-size state held."""
        return sum(memory.bytes() for _, memory in self._held.values())


def _grown(fresh: Memory, memory: Memory, new: Tensor, old: Tensor) -> Memory:
    """`fresh` with rows `new` replaced by rows `old` of `memory`. What was recorded of other rows was padding."""

    def put(into: Tensor, source: Tensor) -> Tensor:
        if source.dim() > 1 and into.shape[1:] != source.shape[1:]:
            into = into.new_zeros(len(into), *source.shape[1:])
        return into.index_copy(0, new, source[old])

    past = None
    if memory.past is not None and fresh.past is not None:
        past = tuple(put(a, b) for a, b in zip(fresh.past, memory.past, strict=True))
    origin = None
    if memory.origin is not None and fresh.origin is not None:
        origin = _grown(fresh.origin, memory.origin, new, old)
    return Memory(
        put(fresh.last, memory.last), put(fresh.total, memory.total), put(fresh.count, memory.count), origin, past
    )
