"""`CostTable`: what one `generate()` call takes on one machine, dense and at several keep ratios, as plain arithmetic.

Time is close to linear in the number of sublayers that execute, so that a few measured points tell the rest: between
them the table interpolates, and it turns a speed-up asked for into the largest keep ratio that reaches it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from typing import Any

from dynadepth.errors import ConfigError


@dataclass(frozen=True)
class Times:
    """Median seconds of the whole batch."""

    prefill_s: float
    decode_s: float
    """One step, in the middle of the new tokens."""


@dataclass(frozen=True)
class Workload:
    """The `generate()` call whose time counts: the forwards of a prompt of `context` tokens and `new_tokens` new ones.

    The prefill gives the first new token and a step each of the others.
    """

    context: int = 1024
    new_tokens: int = 64
    batch: int = 1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}.")

    def __str__(self) -> str:
        return f"{self.context:,} + {self.new_tokens:,} tokens{'' if self.batch == 1 else f', batch {self.batch}'}"

    def seconds(self, times: Times) -> float:
        """Of the whole call."""
        return times.prefill_s + (self.new_tokens - 1) * times.decode_s


@dataclass(frozen=True)
class CostTable:
    """Measured times of a workload."""

    workload: Workload
    dense: Times
    routed: Mapping[float, Times]
    """By the keep ratio of the routed sites, the lowest 0."""
    spread: float = 0.0
    """The largest interquartile range over median among the times."""

    def __post_init__(self) -> None:
        if not all(0 < self.workload.seconds(times) < math.inf for times in (self.dense, *self.routed.values())):
            raise ValueError("times must be positive and finite")
        if min(self.routed, default=1) != 0 or max(self.routed) > 1:
            raise ValueError("keep ratios must lie between 0 and 1, the lowest at 0")

    @property
    def curve(self) -> list[tuple[float, float]]:
        """Keep ratio and seconds of a call, both rising, from 0 to 1.

        Against the noise of measuring: a larger share is never faster, and executing everything no faster than dense.
        """
        keeps = sorted(self.routed)
        seconds = list(accumulate((self.workload.seconds(self.routed[keep]) for keep in keeps), max))
        whole = (1.0, max(seconds[-1], self.workload.seconds(self.dense)))
        return [point for point in zip(keeps, seconds, strict=True) if point[0] < 1] + [whole]

    def speedup(self, keep: float) -> float:
        """Time of the dense call over that of the routed one at a keep ratio of the routed sites."""
        keep = min(keep, 1.0)
        (low, fast), (high, slow) = next(pair for pair in pairwise(self.curve) if keep <= pair[1][0])
        share = (keep - low) / (high - low)
        seconds = fast * (1 - share) + slow * share  # exact at both ends
        return self.workload.seconds(self.dense) / seconds

    def keep_for(self, times: float) -> float | None:
        """The largest keep ratio at which the call is `times` as fast as dense; None where none is."""
        allowed = self.workload.seconds(self.dense) / times * (1 + 1e-12)  # the best one is reached, rounded or not
        for (low, fast), (high, slow) in reversed(list(pairwise(self.curve))):
            if slow <= allowed:
                return high
            if fast <= allowed:
                return low + (high - low) * min(1.0, (allowed - fast) / (slow - fast))
        return None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; read back by `from_dict`."""
        points = [{"keep": keep, **asdict(self.routed[keep])} for keep in sorted(self.routed)]
        return {**asdict(self.workload), "dense": asdict(self.dense), "routed": points, "spread": self.spread}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> CostTable:
        """The inverse of `to_dict`. Raises KeyError, TypeError or ValueError for what is no table."""
        routed = {float(p["keep"]): _times(p) for p in data["routed"]}
        workload = Workload(data["context"], data["new_tokens"], data["batch"])
        return CostTable(workload, _times(data["dense"]), routed, float(data["spread"]))


def _times(data: Mapping[str, Any]) -> Times:
    return Times(float(data["prefill_s"]), float(data["decode_s"]))
