"""`DepthConfig`: what every method's configuration states, and how it is read back from JSON."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from dynadepth.errors import ConfigError, did_you_mean
from dynadepth.routing.decision import RoutingTrace, Site
from dynadepth.routing.granularity import granularity_named
from dynadepth.routing.registry import named_subclass
from dynadepth.routing.router import AbstractRouter
from dynadepth.routing.skip_path import skip_path_named
from dynadepth.routing.target import target_named

KV_POLICIES = ("project", "drop")


def whole_numbers(name: str, value: Any) -> tuple[int, ...]:
    """The value of a setting that lists layers, as it is; ConfigError unless it is distinct whole numbers."""
    numbers = tuple(value) if isinstance(value, Iterable) else (None,)
    if any(type(i) is not int for i in numbers) or len(set(numbers)) != len(numbers):
        raise ConfigError(f"{name} must be distinct whole numbers, not {value!r}.")
    return numbers


@dataclass(frozen=True)
class DepthConfig(ABC):
    """What is routed, in which units. Subclasses (one a method) add their settings; `name` is the method's name."""

    name: ClassVar[str]
    trains_base: ClassVar[bool] = False
    """Is the base model trained with the routers? Else it is frozen."""
    watches_experts: ClassVar[bool] = False
    """Does it want to know what the gates of mixtures of experts assign?"""
    has_thresholds: ClassVar[bool] = True
    """Do thresholds on its routers' logits say how much executes, so that budgets can be set?"""
    from_routes: ClassVar[bool] = False
    """Do the routers learn from given routes, and not from what the model answers?"""

    target: str = "attention"
    """`attention`, `mlp` or `block`."""
    granularity: str = "sequence"
    """`sequence`, `route` or `token`."""
    layers: tuple[int, ...] | str | None = None
    """Routed layers; `"all"`; None: the method's default for the model's depth."""
    kv_policy: str = "project"
    """`token` granularity: are keys and values of skipped tokens still computed (`project`) or left out (`drop`)?"""
    skip_path: str = "identity"
    """What a skipped sublayer contributes: nothing (`identity`), or a `linear` surrogate."""
    skip_rank: int = 64
    """Rank of a `linear` skip path, at most the hidden size; without effect on others."""

    def __post_init__(self) -> None:
        for setting, found in (
            ("target", target_named(self.target)),
            ("granularity", granularity_named(self.granularity)),
        ):
            if not found.general and getattr(type(self), setting) != found.name:
                raise ConfigError(f"Method {self.name!r} has no {setting} {found.name!r}.")
        if self.kv_policy not in KV_POLICIES:
            raise ConfigError(f"kv_policy must be one of {', '.join(KV_POLICIES)}, not {self.kv_policy!r}.")
        skip_path_named(self.skip_path)
        if type(self.skip_rank) is not int or self.skip_rank < 1:
            raise ConfigError(f"skip_rank must be a whole number of at least 1, not {self.skip_rank!r}.")
        if self.layers is not None and self.layers != "all":
            layers = tuple(sorted(whole_numbers("layers", self.layers)))
            if not layers:
                raise ConfigError("layers must name at least one layer; None stands for the method's default.")
            object.__setattr__(self, "layers", layers)

    def default_layers(self, n_layers: int) -> tuple[int, ...]:
        """Layers routed where `layers` is None."""
        return tuple(range(n_layers))

    def routed_layers(self, n_layers: int) -> tuple[int, ...]:
        """The layers routed in a model of `n_layers`."""
        if self.layers is None:
            return self.default_layers(n_layers)
        return tuple(range(n_layers)) if isinstance(self.layers, str) else self.layers

    @abstractmethod
    def build_router(self, site: Site, hidden_size: int) -> AbstractRouter:
        """A new router for one site."""

    def at_budget(self, budget: float, n_layers: int) -> DepthConfig | None:
        """This configuration with the constant routers that hold `budget`, a share of all sublayers of the target;
        None where no configuration does, as where thresholds hold it."""
        return None

    def depth_loss(self, trace: RoutingTrace, weights: Tensor) -> Tensor | None:
        """The method's auxiliary loss of one forward: float32 scalar; `weights` `[B]` sum to one over the optimiser
        step."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the method's name; read back by `config_from_dict`."""
        return {"method": self.name, **dataclasses.asdict(self)}


def method_named(method: str) -> type[DepthConfig]:
    """The configuration class of a method; ConfigError with the near names for an unknown one."""
    return named_subclass(DepthConfig, method, "dynadepth.methods", "method")  # type: ignore[type-abstract]  # a subclass comes out


def config_from_dict(data: dict[str, Any]) -> DepthConfig:
    """The configuration written by `to_dict`. Unknown methods and settings are errors that name the near ones."""
    values = dict(data)
    method = str(values.pop("method", ""))
    kind = method_named(method)
    known = [field.name for field in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            raise ConfigError(f"Method {method!r} has no setting {key!r}.{did_you_mean(key, known)}")
    for key, value in values.items():
        if isinstance(value, list):
            values[key] = tuple(value)
    return kind(**values)
