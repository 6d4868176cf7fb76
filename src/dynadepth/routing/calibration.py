"""`Calibration`: which router threshold gives which keep ratio, measured on held-out prompts."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

TOLERANCE = 0.02
"""How far a measured keep ratio may be from its budget."""

SLACK = 2 * TOLERANCE / 3
"""How far a threshold may be moved into a gap between sites that answer alike for every input. With 30 of them a budget
further from any whole count than this may stay inside a site's bunch: wherever that is cut, the tolerance holds."""

WIDER, AROUND = 32.0, 8
"""A spacing of the quantiles so many times as wide as most of the `AROUND` before and after it is a gap."""


@dataclass(frozen=True)
class CalibrationPoint:
    """One measured keep ratio of the routed sites, and the logits that the routers gave under it (quantiles,
    ascending)."""

    keep: float
    quantiles: tuple[float, ...]

    def threshold(self, keep: float, slack: float = 0.0) -> float:
        """The logit that the share `keep` of the units reaches or exceeds, or one in a gap within `slack` of it.

        Routers that answer nearly the same for every input have their logits in narrow bunches, one a site. A threshold
        inside a bunch cuts it by differences that mean nothing, and cuts it elsewhere on the next prompts; one in a gap
        between bunches keeps what it kept.
        """
        steps = len(self.quantiles) - 1
        place = (1 - min(max(keep, 0.0), 1.0)) * steps
        near = [at for at in range(steps) if abs(at + 0.5 - place) <= slack * steps and self._is_gap(at)]
        if near:
            at = min(near, key=lambda at: (abs(at + 0.5 - place), at))
            return (self.quantiles[at] + self.quantiles[at + 1]) / 2
        low = min(int(place), steps - 1)
        below, above = self.quantiles[low], self.quantiles[low + 1]
        return below + (place - low) * (above - below)

    def _is_gap(self, at: int) -> bool:
        """Is the spacing after this quantile much wider than those around it?"""
        around = range(max(0, at - AROUND), min(len(self.quantiles) - 1, at + AROUND + 1))
        widths = sorted(self.quantiles[i + 1] - self.quantiles[i] for i in around)
        return self.quantiles[at + 1] - self.quantiles[at] > WIDER * widths[len(widths) // 2]


@dataclass(frozen=True)
class Calibration:
    """Points of increasing keep. They differ because skipping lower sites changes what the routers above see."""

    points: tuple[CalibrationPoint, ...]
    n_sequences: int

    def threshold(self, keep: float) -> float:
        """The threshold (logit space) for a keep ratio of the routed sites, between the two nearest points by
        distance."""
        if keep >= 1:
            return -math.inf
        if keep <= 0:
            return math.inf
        keeps = [point.keep for point in self.points]
        right = bisect_right(keeps, keep)
        if right == 0 or right == len(keeps):
            return self.points[min(right, len(keeps) - 1)].threshold(keep, SLACK)
        low, high = self.points[right - 1], self.points[right]
        share = (keep - low.keep) / (high.keep - low.keep)
        return (1 - share) * low.threshold(keep, SLACK) + share * high.threshold(keep, SLACK)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; read back by `from_dict`."""
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Calibration:
        """The inverse of `to_dict`. Raises ValueError for what no threshold can be read from."""
        points: Sequence[dict[str, Any]] = data["points"]
        if not points or any(len(p["quantiles"]) < 2 for p in points):
            raise ValueError("a calibration without quantiles")
        return Calibration(
            tuple(CalibrationPoint(float(p["keep"]), tuple(map(float, p["quantiles"]))) for p in points),
            int(data["n_sequences"]),
        )
