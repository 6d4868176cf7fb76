"""Static routes: the same sublayers are skipped for every input. The baseline that dynamic routing has to beat."""

from __future__ import annotations

from dataclasses import dataclass

from dynadepth.errors import ConfigError
from dynadepth.methods.config import DepthConfig, whole_numbers
from dynadepth.routing.decision import Site
from dynadepth.routing.router import AbstractRouter, ConstantRouter


@dataclass(frozen=True)
class StaticConfig(DepthConfig):
    """Skips `skip`, executes everything else (LLM-Drop, arXiv 2406.15786, is such a route chosen by cosine)."""

    name = "static"

    skip: tuple[int, ...] = ()
    """Layers whose target is skipped."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "skip", whole_numbers("skip", self.skip))
        if isinstance(self.layers, tuple) and not set(self.skip) <= set(self.layers):
            missing = sorted(set(self.skip) - set(self.layers))
            raise ConfigError(f"skip names layers {missing} that are not among the routed layers {list(self.layers)}.")

    def default_layers(self, n_layers: int) -> tuple[int, ...]:
        """Only what is skipped needs routing."""
        return self.skip or tuple(range(n_layers))

    def build_router(self, site: Site, hidden_size: int) -> AbstractRouter:
        return ConstantRouter(execute=site.layer not in self.skip)
