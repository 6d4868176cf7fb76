"""Static routes: the same sublayers are skipped for every input. The baseline that dynamic routing has to beat, and
what serves where it does not.

`order` gives a route a dial: a budget skips the first layers of the order, in the nearest whole number, and executes
everything else. Without one, `skip` is a bare fixed route.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dynadepth.errors import ConfigError
from dynadepth.methods.config import DepthConfig, whole_numbers
from dynadepth.routing.decision import Site
from dynadepth.routing.repeat import check_can_repeat
from dynadepth.routing.router import AbstractRouter, ConstantRouter


def skip_count(budget: float, n_layers: int) -> int:
    """How many of `n_layers` sublayers a fixed route skips at a budget: the nearest whole number."""
    return round((1 - budget) * n_layers)


@dataclass(frozen=True)
class StaticConfig(DepthConfig):
    """Skips `skip`, executes everything else (LLM-Drop, arXiv 2406.15786, is such a route chosen by cosine)."""

    name = "static"

    skip: tuple[int, ...] = ()
    """Layers whose target is skipped. With an `order` they are its first ones: the route in force."""
    order: tuple[int, ...] = ()
    """Layers in the order in which lower budgets skip them, the first one first; none: no budget can be set."""

    repeat: tuple[int, ...] = ()
    """Layers executed twice; target `block`, granularity `sequence`, skip path `identity` only. Not with an `order`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "repeat", tuple(sorted(whole_numbers("repeat", self.repeat))))
        if self.repeat:
            self._check_repeat()
        object.__setattr__(self, "skip", tuple(sorted(whole_numbers("skip", self.skip))))
        object.__setattr__(self, "order", whole_numbers("order", self.order))
        if isinstance(self.layers, tuple) and not set(self.skip) <= set(self.layers):
            missing = sorted(set(self.skip) - set(self.layers))
            raise ConfigError(f"skip names layers {missing} that are not among the routed layers {list(self.layers)}.")
        if not self.order:
            return
        if self.layers is not None:
            raise ConfigError(f"order says which layers are routed: leave layers out, which is {self.layers!r}.")
        first = self.order[: len(self.skip)]
        if set(self.skip) != set(first):
            raise ConfigError(
                f"skip {list(self.skip)} and order {list(self.order)} contradict each other: an order skips its first "
                f"layers, of this number {sorted(first)}; leave skip out and set a budget, or leave the order out."
            )

    def _check_repeat(self) -> None:
        check_can_repeat(self.target, self.granularity, self.skip_path)
        both = sorted(set(self.repeat) & set(self.skip))
        if both:
            raise ConfigError(f"layers {both} are named by skip and by repeat: a layer does one or the other.")
        if self.order:
            raise ConfigError(f"an order says what budgets skip, not what repeats: leave repeat {self.repeat} out.")
        if isinstance(self.layers, tuple) and not set(self.repeat) <= set(self.layers):
            missing = sorted(set(self.repeat) - set(self.layers))
            raise ConfigError(f"repeat names layers {missing} that are not among the routed ones {list(self.layers)}.")

    def routed_layers(self, n_layers: int) -> tuple[int, ...]:
        for setting in ("skip", "repeat"):
            if beyond := [layer for layer in getattr(self, setting) if not 0 <= layer < n_layers]:
                raise ConfigError(
                    f"{setting} names layers {beyond} that do not exist: the model has {n_layers}, 0 to {n_layers - 1}."
                )
        return super().routed_layers(n_layers)

    def default_layers(self, n_layers: int) -> tuple[int, ...]:
        """Only what is skipped or repeated, or may be skipped, needs routing."""
        return tuple(sorted(self.order)) or tuple(sorted(self.skip + self.repeat)) or tuple(range(n_layers))

    def at_budget(self, budget: float, n_layers: int) -> StaticConfig | None:
        """Skips the first layers of the order (`skip_count`); None without an order."""
        return replace(self, skip=self.order[: skip_count(budget, n_layers)]) if self.order else None

    def build_router(self, site: Site, hidden_size: int) -> AbstractRouter:
        return ConstantRouter(2 if site.layer in self.repeat else site.layer not in self.skip)
