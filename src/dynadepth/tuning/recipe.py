"""Recipes: everything that a tuning run depends on, as strict YAML. The papers' settings and ours are in `recipes/`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynadepth.errors import ConfigError
from dynadepth.lora import LoraSettings
from dynadepth.methods import DepthConfig, StaticConfig, config_from_dict
from dynadepth.methods.config import method_named
from dynadepth.recipe_files import checked, known_recipes, read_recipe, recipe_folder
from dynadepth.routing.granularity import granularity_named

__all__ = ["DEFAULT", "Recipe", "known_recipes", "load_recipe", "recipe_folder", "recipe_from_dict"]

DEFAULT = "default"


@dataclass(frozen=True)
class Recipe:
    """One tuning recipe. `method` holds the method's name and settings (see its configuration class)."""

    name: str
    source: str
    """Where the settings come from."""
    method: dict[str, Any]
    budget: float = 0.75
    """Share of all sublayers of the target that may execute, where the command line names none."""
    objective: str = "kl"
    """`ce`: the task's own loss; `kl`: KL(dense‖routed) on the answer's tokens, the dense model being the same
    backbone."""
    order: str = "cosine"
    """What orders the sublayers for `init: importance` and static routes. `cosine`: 1 − cosine of the residual stream;
    `damage`: KL(dense‖routed) on held-out text when each is skipped alone, its fitted skip path in place
    (`removal.alone`); `greedy`: by KL, too, each the least harmful one beside those before it
    (`removal.GreedySearch`; minutes); `ranks`: the sum of the ranks of `cosine` and `damage`; `auto`: `cosine`, unless
    `damage` clearly loses less where its first sublayers are skipped together (`orders.py`)."""
    init: str = "zeros"
    """`zeros`, or `importance`: biases start from `order`'s scores, so that tuning starts at the static route; of a
    static route without an order, the scores are its order; routers of tokens start from what skipping each token would
    cost, predicted from its state (`token_routers`)."""
    controller: str = "none"
    """Of the routers' thresholds, `none`: they stay; `quantile`: they follow the logits' quantile, which pins the hard
    keep ratio. A static route has no thresholds and keeps to the budget."""
    data: str = "self"
    """Where the command line names none: a file, a `datasets` name, or `self`."""
    max_samples: int = 96
    max_length: int = 256
    """Tokens a sample; longer answers are cut."""
    shuffle: bool = True
    holdout: float = 0.33
    """Share of the samples kept for calibration and for the before and after figures."""
    answer_tokens: int = 96
    """Length of the answers the model writes with `data: self`."""
    passages: float = 0.25
    """Share of the samples that are plain text with `data: self`: passages that ship with the package."""
    learning_rate: float = 1e-3
    bias_learning_rate: float | None = None
    """For router biases; None: the same."""
    path_learning_rate: float = 1e-3
    """For linear skip paths, which start from their closed-form fit."""
    lora: dict[str, Any] = field(default_factory=dict)
    """A LoRA tuned beside the routers in all steps, such as `{rank: 16}` (see `dynadepth.lora.LoraSettings`); none: no
    LoRA."""
    lora_learning_rate: float = 2e-4
    """For the LoRA, which starts without effect."""
    budgets: tuple[float, ...] = field(default=())
    """Budgets of which every step draws one, so that one set of routers serves them all; none: the budget asked for."""
    joint: float = 1.0
    """Share of the steps, the first ones, in which routers learn. It takes running every unit both ways; in the other
    steps skip paths learn alone, and only what executes runs."""
    score: str = "answers"
    """Tokens that the loss counts: `answers`, or `all`, the prompts' too."""
    kl_share: float = 1.0
    """Share of the scored tokens at which `objective: kl` compares distributions, drawn anew every step."""
    lr_scheduler: str = "cosine"
    warmup: float = 0.03
    """Share of the steps."""
    weight_decay: float = 0.0
    batch_size: int = 8
    gradient_accumulation: int = 1
    epochs: float = 1.0
    max_steps: int = -1
    """Overrides `epochs` where positive."""
    calibrate: bool = True
    """Measure thresholds for every budget afterwards. Without it the routers keep the method's own threshold. A static
    route has none."""
    choose: bool = False
    """Compare the tuned routers with the static route of the same skip paths on the held-out samples, at the budgets,
    and save the better of the two (`dynadepth.tuning.choice`)."""
    save_steps: int = 10
    """A checkpoint to resume from every so many steps."""
    report_to: tuple[str, ...] = field(default=())
    """Trackers, as in transformers' TrainingArguments: `tensorboard`, `wandb`, ..."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("objective", ("ce", "kl")),
            ("order", ("cosine", "damage", "greedy", "ranks", "auto")),
            ("init", ("zeros", "importance")),
            ("controller", ("none", "quantile")),
            ("score", ("answers", "all")),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}.")
        for name in ("max_samples", "max_length", "batch_size", "gradient_accumulation", "save_steps", "answer_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}.")
        rates = {name: getattr(self, name) for name in ("learning_rate", "path_learning_rate", "lora_learning_rate")}
        rates |= {} if self.bias_learning_rate is None else {"bias_learning_rate": self.bias_learning_rate}
        for name, rate in rates.items():
            if not 0 <= rate < math.inf:
                raise ConfigError(f"{name} must be a number of at least 0, not {rate}.")
        for name, least in (("warmup", 0), ("weight_decay", 0), ("epochs", 1e-9)):
            if not least <= getattr(self, name) < math.inf:
                raise ConfigError(
                    f"{name} must be a number {'above' if least else 'of at least'} 0, not {getattr(self, name)}."
                )
        if not 0 < self.kl_share <= 1:
            raise ConfigError(f"kl_share must be above 0 and at most 1, not {self.kl_share}.")
        for budget in self.budgets:
            if not isinstance(budget, float | int) or not 0 < budget <= 1:
                raise ConfigError(f"budgets must be numbers above 0 and at most 1, not {budget!r}.")
        if self.choose and not self.calibrate:
            raise ConfigError(
                f"Recipe {self.name!r} cannot choose between routers and a static route: without calibration its "
                "routers have no budget to be compared at; set calibrate to true."
            )
        if self.lora:
            LoraSettings.from_dict(self.lora)
        for name in ("passages", "joint"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be a share between 0 and 1, not {getattr(self, name)}.")
        if not 0 < self.holdout < 1:
            raise ConfigError(f"holdout must be between 0 and 1, not {self.holdout}.")

    def config(self, **overrides: Any) -> DepthConfig:
        """The method's configuration, with the overrides that are not None. Raises ConfigError where other settings
        contradict it."""
        method = str(self.method.get("method", ""))
        if method_named(method).trains_base:
            raise ConfigError(
                f"Method {method!r} is trained together with the whole model, and tuning keeps the model frozen: "
                "train it with `dynadepth pretrain`, or attach it before a training of your own."
            )
        if method_named(method).from_routes:
            raise ConfigError(
                f"Method {method!r} learns from searched routes: search them with `dynadepth search`, then tune with "
                "--routes FILE."
            )
        config = config_from_dict({**self.method, **{k: v for k, v in overrides.items() if v is not None}})
        if isinstance(config, StaticConfig):
            self._check_static(config)
        elif self.budgets and self.controller != "quantile":
            raise ConfigError("budgets are met by thresholds that follow the logits: set controller to quantile.")
        return config

    def _check_static(self, config: StaticConfig) -> None:
        if self.choose:
            raise ConfigError(
                f"Recipe {self.name!r} cannot choose between routers and a static route: its method is static and "
                "tunes no routers; name another method."
            )
        if not granularity_named(config.granularity).sticky:
            raise ConfigError(
                "A static route is the same for every token: tune it at sequence granularity, not "
                f"{config.granularity}."
            )
        if config.skip:
            raise ConfigError(
                f"skip {list(config.skip)} is a bare route, which no budget fits: give method.order, or leave both out "
                "and set init to importance."
            )
        if config.order and self.init == "importance":
            raise ConfigError(
                f"init: importance measures an order, and method.order {list(config.order)} gives one: leave one out."
            )
        if config.order and self.order != "cosine":
            raise ConfigError(
                f"order: {self.order} measures an order, and method.order {list(config.order)} gives one: leave one "
                "out."
            )
        if not config.order and self.init == "zeros":
            raise ConfigError("A static route needs an order: set init to importance to measure one, or method.order.")

    def for_method(self, method: str) -> Recipe:
        """This recipe for the method of that name, with those of the method's settings that the other has, too.

        The method is named, so that nothing is left to choose.
        """
        known = {f.name for f in dataclasses.fields(method_named(method))}
        kept = {name: value for name, value in self.method.items() if name in known}
        return dataclasses.replace(self, method={**kept, "method": method}, choose=False)

    def in_doubt(self) -> Recipe:
        """This recipe with what can be told by measuring left to measurement: routers or a static route, and the order
        that both start from, where the recipe has the default one."""
        order = "auto" if self.order == "cosine" else self.order
        return dataclasses.replace(self, choose=True, order=order)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def load_recipe(name_or_path: str | Path = DEFAULT) -> Recipe:
    """A recipe by name or from a YAML file. Unknown names and settings are errors that name the near ones."""
    return recipe_from_dict(*read_recipe(name_or_path))


def recipe_from_dict(data: dict[str, Any], where: str) -> Recipe:
    """A recipe from its settings, each checked for name and type."""
    method = data.get("method")
    if isinstance(method, dict) and "method" in method and method_named(str(method["method"])).from_routes:
        raise ConfigError(
            f"{where}: method {method['method']!r} learns from searched routes: tune it with --routes FILE, from "
            "`dynadepth search`."
        )
    return Recipe(**checked(Recipe, data, where))
