"""`RouteRecipe`: what tuning from searched routes depends on, as strict YAML; the counterpart of `recipe.Recipe` for
methods whose routers learn from routes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynadepth.errors import ConfigError
from dynadepth.methods import DepthConfig, config_from_dict
from dynadepth.methods.config import method_named
from dynadepth.recipe_files import checked, read_recipe

DEFAULT = "drllm-paper"


@dataclass(frozen=True)
class RouteRecipe:
    """One recipe. `method` holds the method's name and settings (see its configuration class)."""

    name: str
    source: str
    """Where the settings come from."""
    method: dict[str, Any]
    gamma: float = 2.0
    """Focusing exponent of the focal loss; 0 is cross-entropy."""
    beta: float = 0.999
    """Of the effective number of a class, in [0, 1); 0 weighs classes alike, near 1 by inverse frequency."""
    learning_rate: float = 1e-3
    warmup_steps: int = 500
    """Steps over which the learning rate rises from 0; at most half of all steps. It is constant afterwards."""
    weight_decay: float = 0.0
    batch_size: int = 16
    """Routes a step."""
    epochs: int = 25
    patience: int = 5
    """Epochs without a better macro-F1 on the validation prompts after which tuning stops."""
    routes_per_prompt: int = 1
    """The first so many routes of a prompt are examples."""
    order: str = "worth"
    """Which routes of a prompt come first: by `worth`, the search's own measure, in which a few layers less are worth
    more than any lead; or by `margin`, the lead of the right answer."""
    margin: float = 0.0
    """Routes with a smaller lead, in nats, are no examples."""
    towards: str = "gold"
    """`control`: the examples are routes towards a wrong answer, which the search's control kept. What routers learn
    from them, any search leaves: a baseline for what they learn from `gold`."""
    dense: bool = False
    """Prompts that the dense model answers rightly, and of which no route is an example, are examples of executing
    everything."""
    credible: bool = False
    """Of routes that correct a wrong answer, only those count whose margin is above what the same search reached
    towards a wrong option (`control`)."""
    validation: float = 0.1
    """Share of the prompts that tell when to stop."""
    holdout: float = 0.1
    """Share of the prompts that steer nothing: the figures of the result are theirs."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "patience", "routes_per_prompt"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("gamma", "learning_rate", "warmup_steps", "weight_decay", "margin"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must be zero or more, not {getattr(self, name)}.")
        for name, known in (("order", ("worth", "margin")), ("towards", ("gold", "control"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be {known[0]} or {known[1]}, not {getattr(self, name)!r}.")
        if self.towards == "control" and (self.credible or self.dense):
            raise ConfigError("towards: control takes the control's routes alone: leave credible and dense out.")
        if not 0 <= self.beta < 1:
            raise ConfigError(f"beta must be at least 0 and below 1, not {self.beta}.")
        if not (self.validation > 0 and self.holdout > 0 and self.validation + self.holdout < 1):
            raise ConfigError(
                f"validation and holdout must be shares above 0 that leave something to train on, not "
                f"{self.validation} and {self.holdout}."
            )

    def config(self) -> DepthConfig:
        """The method's configuration; ConfigError for a method whose routers do not learn from routes."""
        check_learns_from_routes(str(self.method.get("method", "")))
        return config_from_dict(self.method)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def check_learns_from_routes(method: str) -> None:
    """Raises ConfigError for an unknown method, and for one whose routers do not learn from routes."""
    if not method_named(method).from_routes:
        raise ConfigError(
            f"Method {method!r} does not learn from routes: leave --routes out, or name a method that does, such as "
            "drllm."
        )


def load_route_recipe(name_or_path: str | Path = DEFAULT) -> RouteRecipe:
    """A recipe by name or from a YAML file. Unknown names and settings are errors that name the near ones."""
    data, where = read_recipe(name_or_path)
    method = data.get("method")
    if isinstance(method, dict) and "method" in method and not method_named(str(method["method"])).from_routes:
        raise ConfigError(
            f"{where}: method {method['method']!r} does not learn from routes: leave --routes out, or give a recipe "
            f"of a method that does, such as {DEFAULT}."
        )
    return RouteRecipe(**checked(RouteRecipe, data, where))
