"""Sticky routes of one batch at sequence granularity: decided once a row, kept until the rows go away.

Everything here is host-side Python; the one device value is the cached row index that a mixed site gathers with. That
is what makes decoding free of host transfers: the route in force is known without asking the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynadepth.errors import UnsupportedCacheError
from dynadepth.routing.decision import Site


class RouteBook:
    """`decided[row]`: has this row a route? `routes[site][row]`: does it execute there? Rows are logical batch rows."""

    def __init__(self) -> None:
        self.decided: list[bool] = []
        self.routes: dict[Site, list[bool]] = {}
        self._index: dict[Site, bool | Tensor] = {}
        self._skipping: dict[Site, tuple[list[int], Tensor]] = {}
        self._whole: frozenset[Site] | None = None

    def open(self, batch: int) -> None:
        """Starts or continues with `batch` rows; raises where a cache is continued with another number of rows."""
        if not self.decided:
            self.decided = [False] * batch
        elif len(self.decided) != batch:
            raise UnsupportedCacheError(
                f"The cache holds {len(self.decided)} sequences but this forward brings {batch}: "
                "continue with the same batch, or start with an empty cache."
            )

    @property
    def complete(self) -> bool:
        """Every row has its route."""
        return all(self.decided)

    @property
    def uniform(self) -> bool:
        """Every row has the same route, so that reordering rows changes nothing."""
        return self.complete and all(len(set(route)) == 1 for route in self.routes.values())

    def write(self, site: Site, execute: Sequence[bool], fresh: Sequence[bool]) -> None:
        """Sets the decisions of the rows that decide now; rows without a route yet (only padding so far) skip."""
        old = self.routes.get(site, [False] * len(self.decided))
        self.routes[site] = [bool(new) if now else kept for new, now, kept in zip(execute, fresh, old, strict=True)]
        self._forget()

    def rows(self, site: Site, device: torch.device) -> bool | Tensor:
        """True: all rows execute; False: none; else the int64 index of those that do."""
        rows = self._index.get(site)
        if rows is None or (isinstance(rows, Tensor) and rows.device != device):
            route = self.routes[site]
            uniform = all(route) or not any(route)
            rows = all(route) if uniform else torch.tensor([i for i, on in enumerate(route) if on], device=device)
            self._index[site] = rows
        return rows

    def skipping(self, site: Site, device: torch.device) -> tuple[list[int], Tensor]:
        """The rows that do not execute: on the host, and as an int64 index."""
        held = self._skipping.get(site)
        if held is None or held[1].device != device:
            rows = [i for i, on in enumerate(self.routes[site]) if not on]
            held = self._skipping[site] = (rows, torch.tensor(rows, device=device))
        return held

    @property
    def whole(self) -> frozenset[Site]:
        """Sites at which every row executes."""
        if self._whole is None:
            self._whole = frozenset(site for site, route in self.routes.items() if all(route))
        return self._whole

    def take(self, order: Sequence[int]) -> None:
        """Row `j` becomes what row `order[j]` was (beams, selection, repetition)."""
        if not self.decided:
            return
        self.decided = [self.decided[i] for i in order]
        self.routes = {site: [route[i] for i in order] for site, route in self.routes.items()}
        self._forget()

    def clear(self) -> None:
        """Forgets everything: the next prefill decides anew."""
        self.decided, self.routes = [], {}
        self._forget()

    def _forget(self) -> None:
        """Drops what was derived from the routes."""
        self._index.clear()
        self._skipping.clear()
        self._whole = None
