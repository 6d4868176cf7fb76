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
    """`decided[row]`: has this row a route? `routes[site][row]`: how often does it execute there (a bool, or 0, 1, 2)?
    Rows are logical batch rows. `repeating`: may one of them be a 2?"""

    def __init__(self) -> None:
        self.decided: list[bool] = []
        self.routes: dict[Site, list[int]] = {}
        self.repeating = False
        self._index: dict[tuple[Site, int], bool | Tensor] = {}
        self._skipping: dict[Site, tuple[list[int], Tensor]] = {}
        self._whole: frozenset[Site] | None = None
        self._resting: frozenset[Site] | None = None

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

    def write(self, site: Site, times: Sequence[int], fresh: Sequence[bool]) -> None:
        """Sets the decisions of the rows that decide now; rows without a route yet (only padding so far) skip."""
        old = self.routes.get(site, [False] * len(self.decided))
        self.routes[site] = [new if now else kept for new, now, kept in zip(times, fresh, old, strict=True)]
        self.repeating = self.repeating or max(times) > 1
        self._forget()

    def rows(self, site: Site, device: torch.device, times: int = 1) -> bool | Tensor:
        """True: all rows execute (at least so many `times`); False: none; else the int64 index of those that do."""
        rows = self._index.get((site, times))
        if rows is None or (isinstance(rows, Tensor) and rows.device != device):
            chosen = [i for i, count in enumerate(self.routes[site]) if count >= times]
            whole = len(chosen) in (0, len(self.decided))
            rows = bool(chosen) if whole else _index(chosen, device)
            self._index[site, times] = rows
        return rows

    def skipping(self, site: Site, device: torch.device) -> tuple[list[int], Tensor]:
        """The rows that do not execute: on the host, and as an int64 index."""
        held = self._skipping.get(site)
        if held is None or held[1].device != device:
            rows = [i for i, on in enumerate(self.routes[site]) if not on]
            held = self._skipping[site] = (rows, _index(rows, device))
        return held

    @property
    def whole(self) -> frozenset[Site]:
        """Sites at which every row executes once."""
        if self._whole is None:
            once = {site: all(count == 1 for count in route) for site, route in self.routes.items()}
            self._whole = frozenset(site for site in once if once[site])
        return self._whole

    @property
    def resting(self) -> frozenset[Site]:
        """Sites at which no row executes."""
        if self._resting is None:
            self._resting = frozenset(site for site, route in self.routes.items() if not any(route))
        return self._resting

    @property
    def mixed(self) -> frozenset[Site]:
        """Sites at which some rows execute and others do not."""
        return frozenset(site for site, route in self.routes.items() if any(route) and not all(route))

    def take(self, order: Sequence[int]) -> None:
        """Row `j` becomes what row `order[j]` was (beams, selection, repetition)."""
        if not self.decided:
            return
        self.decided = [self.decided[i] for i in order]
        self.routes = {site: [route[i] for i in order] for site, route in self.routes.items()}
        self._forget()

    def clear(self) -> None:
        """Forgets everything: the next prefill decides anew."""
        self.decided, self.routes, self.repeating = [], {}, False
        self._forget()

    def _forget(self) -> None:
        """Drops what was derived from the routes."""
        self._index.clear()
        self._skipping.clear()
        self._whole = self._resting = None


def _index(rows: list[int], device: torch.device) -> Tensor:
    """An index that outlives the forward: an ordinary tensor, even where that one ran in inference mode."""
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=torch.long, device=device)
