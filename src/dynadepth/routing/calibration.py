"""`Calibration`: which router threshold gives which keep ratio, measured on held-out prompts."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass


@dataclass(frozen=True)
class Calibration:
    """`thresholds[i]` (logit space) was measured to keep `keeps[i]` of the routed (unit, site) pairs; keeps increase."""

    keeps: tuple[float, ...]
    thresholds: tuple[float, ...]
    n_sequences: int

    def threshold(self, keep: float) -> float:
        """The threshold for a keep ratio of the routed sites in [0, 1], interpolated between the measured ones."""
        if keep >= 1:
            return -math.inf
        if keep <= 0:
            return math.inf
        i = bisect_left(self.keeps, keep)
        if i == 0:
            return self.thresholds[0]
        if i == len(self.keeps):
            return self.thresholds[-1]
        low, high = self.keeps[i - 1], self.keeps[i]
        share = (keep - low) / (high - low) if high > low else 0.0
        return self.thresholds[i - 1] + share * (self.thresholds[i] - self.thresholds[i - 1])
