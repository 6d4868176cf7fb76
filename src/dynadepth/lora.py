"""LoRA (arXiv 2106.09685) beside the routers: made and stored by PEFT, at work in routed forwards alone.

The adapter is never merged: outside a routed forward (bare, under `disabled`, as the teacher of a tuning) an adapted
layer is the base's own, bit for bit, in every thread, and `detach` puts that layer back. The price, two thin products
a layer, is counted by `cost` and timed by `benchmark`.

On disk it is PEFT's own: `adapter_model.safetensors` and `adapter_config.json`, which load on the unrouted model, too.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dynadepth.architectures import decoder_layers, spec_for
from dynadepth.errors import ConfigError, UnsupportedModelError, did_you_mean
from dynadepth.routing.context import current
from dynadepth.routing.sublayer import is_attached_name, restore_class, swap_class

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The names that PEFT gives its files."""
ADAPTER = "dynadepth"
"""Name of the adapter in PEFT's layers while it is attached; the files do not have it."""
PREFIX = "base_model.model."
"""What PEFT puts before a module's name in its files."""


@dataclass(frozen=True)
class LoraSettings:
    """What `lora` in a recipe says."""

    rank: int
    alpha: float | None = None
    """The update is scaled by alpha / rank; None: 2 · rank."""
    dropout: float = 0.0
    """Of the adapter's input, while tuning."""
    modules: tuple[str, ...] = ()
    """Names of the linear layers that are adapted, such as `down_proj`; none: all of the attentions and MLPs."""

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise ConfigError(f"lora: rank must be a whole number of at least 1, not {self.rank!r}.")
        if self.alpha is not None and not (_is_number(self.alpha) and 0 < self.alpha < float("inf")):
            raise ConfigError(f"lora: alpha must be a number above 0, not {self.alpha!r}.")
        if not (_is_number(self.dropout) and 0 <= self.dropout < 1):
            raise ConfigError(f"lora: dropout must be at least 0 and below 1, not {self.dropout!r}.")
        if not isinstance(self.modules, list | tuple) or not all(isinstance(m, str) and m for m in self.modules):
            raise ConfigError(
                f"lora: modules must be a list of layer names, such as [down_proj], not {self.modules!r}."
            )
        object.__setattr__(self, "modules", tuple(self.modules))

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> LoraSettings:
        """Settings as a recipe has them. Raises ConfigError for an unknown one, or without a rank."""
        known = [field.name for field in dataclasses.fields(LoraSettings)]
        for key in data:
            if key not in known:
                raise ConfigError(f"lora has no setting {key!r}; known: {', '.join(known)}.{did_you_mean(key, known)}")
        if "rank" not in data:
            raise ConfigError("lora needs a rank, such as {rank: 16}.")
        return LoraSettings(**data)

    def config(self, model: PreTrainedModel) -> Any:
        """PEFT's configuration for a model. Raises ConfigError for modules that the model does not have and for a rank
        that none of the adapted layers can have, UnsupportedModelError for a model without any."""
        sides = linear_sides(model)
        known = list(sides)
        if not known:
            raise UnsupportedModelError(
                f"{type(model).__name__} can have no LoRA: its attentions and MLPs have no linear layer; tune without."
            )
        for name in self.modules:
            if name not in known:
                raise ConfigError(
                    f"lora: {type(model).__name__} has no linear layer {name!r} in its attentions and MLPs, which "
                    f"have {', '.join(known)}.{did_you_mean(name, known)}"
                )
        highest = max(sides[name] for name in self.modules or known)
        if self.rank > highest:
            raise ConfigError(
                f"lora: rank {self.rank} is more than any of the adapted layers of this {type(model).__name__} can "
                f"have: give {highest} or less."
            )
        return _peft().LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
            target_modules=list(self.modules or known),
            task_type="CAUSAL_LM",
            fan_in_fan_out=any(isinstance(m, Conv1D) for layer in decoder_layers(model) for m in layer.modules()),
            base_model_name_or_path=getattr(model.config, "_name_or_path", None) or None,
        )


def linear_sides(model: PreTrainedModel) -> dict[str, int]:
    """Names of the linear layers in the decoder's attentions and MLPs, each once, in the order of the model, with the
    highest rank that an update of one so called can have: its smaller side."""
    spec = spec_for(model)
    found = (
        (name.rpartition(".")[2], _smaller_side(module))
        for layer in decoder_layers(model, spec)
        for part in (getattr(layer, spec.attention, None), getattr(layer, spec.mlp, None))
        if part is not None
        for name, module in part.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not is_attached_name(name)
    )
    sides: dict[str, int] = {}
    for name, side in found:
        sides[name] = max(side, sides.get(name, side))
    return sides


def _smaller_side(module: nn.Module) -> int:
    if isinstance(module, nn.Linear):
        return min(module.in_features, module.out_features)  # quantised weights have other shapes
    return min(module.weight.shape)  # type: ignore[arg-type]  # of a Conv1D


class RoutedLora:
    """Mixin put before PEFT's class of an adapted layer. `depth_owner` is the routing whose forwards it adapts."""

    depth_owner: Any

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        context = current()
        if context is None or context.owner is not self.depth_owner:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[attr-defined]  # PEFT's
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]  # mixed into PEFT's class


class Lora:
    """What `inject` put into a model. Parameters are float32 as made; `to` changes that."""

    def __init__(self, config: Any, layers: dict[str, nn.Module]) -> None:
        self.config, self.layers = config, layers

    @property
    def rank(self) -> int:
        return int(self.config.r)

    def tensors(self) -> dict[str, Tensor]:
        """All that is learnt, by the names it has in PEFT's files."""
        return {name: parameter.data for name, parameter in self.named_parameters()}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for layer_name, layer in self.layers.items():
            for name, parameter in layer.named_parameters():
                if name.startswith("lora_"):
                    yield f"{PREFIX}{layer_name}.{name.replace(f'.{ADAPTER}.', '.')}", parameter

    def parts(self) -> list[nn.Module]:
        """The modules of the adapter itself, its dropout included."""
        children = [child for layer in self.layers.values() for child in layer.named_children()]
        return [module for name, module in children if name.startswith("lora_")]

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts such tensors in place; ValueError where they are not those of this adapter."""
        own = dict(self.named_parameters())
        if differ := sorted(own.keys() ^ tensors.keys()):
            raise ValueError(f"LoRA tensors {differ[:2]} {'are missing' if differ[0] in own else 'have no layer'}")
        for name, parameter in own.items():
            if parameter.shape != tensors[name].shape:
                raise ValueError(
                    f"LoRA tensor {name} has the shape {list(tensors[name].shape)}, not {list(parameter.shape)}"
                )
            parameter.data.copy_(tensors[name])

    def to(self, dtype: torch.dtype) -> None:
        for _, parameter in self.named_parameters():
            parameter.data = parameter.data.to(dtype)

    def config_text(self) -> str:
        """`adapter_config.json`."""
        values = {key: sorted(v) if isinstance(v, set) else v for key, v in self.config.to_dict().items()}
        return json.dumps({**values, "inference_mode": True}, indent=2, sort_keys=True) + "\n"

    def facts(self) -> dict[str, Any]:
        """What there is to say of it, as JSON."""
        return lora_facts(json.loads(self.config_text()), self.tensors())


def lora_facts(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of an adapter: `rank`, `alpha`, `modules` and `parameters`."""
    return {
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "modules": sorted(config["target_modules"]),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
    }


def inject(model: PreTrainedModel, owner: Any, config: Any) -> Lora:
    """Puts an adapter that changes nothing yet into a routed model: trainable, float32, for the forwards of `owner`.

    Other parameters stay as trainable as they are. Raises ConfigError for a model that PEFT adapts already, or cannot.
    """
    peft = _peft()
    if any(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in model.modules()):
        raise ConfigError(
            f"{type(model).__name__} is under a PEFT adapter already: merge it (merge_and_unload) or unload it first."
        )
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT reads what transformers has renamed
            peft.inject_adapter_in_model(config, model, ADAPTER)
    except (ValueError, TypeError, KeyError) as error:
        vars(model).pop("peft_config", None)
        raise ConfigError(f"PEFT cannot adapt {type(model).__name__}: {' '.join(str(error).split())}") from error
    finally:
        for parameter, wanted in trainable:
            parameter.requires_grad_(wanted)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)
    }
    for layer in layers.values():
        base: Any = layer.base_layer
        layer.train(base.training)
        swap_class(layer, RoutedLora)
        layer.depth_owner = owner
    made = Lora(config, layers)
    made.to(torch.float32)
    return made


def remove(model: PreTrainedModel, lora: Lora) -> None:
    """Puts the base's own layers back."""
    for name, layer in lora.layers.items():
        restore_class(layer, RoutedLora)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base_layer)
    del model.peft_config  # PEFT's note of it


def read_config(data: Mapping[str, Any]) -> Any:
    """PEFT's configuration from `adapter_config.json`. Raises ValueError for one that is not of a LoRA."""
    config = _peft().PeftConfig.from_peft_type(**data)
    if getattr(config, "r", None) is None or not config.target_modules:
        raise ValueError(f"{CONFIG} describes no LoRA")
    config.inference_mode = False  # trainable, as loaded routers are
    return config


def base_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict by the names that the base has without an adapter, and nothing of the adapter."""
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in state.items()
        if not any(part.startswith("lora_") for part in name.split("."))
    }


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError("LoRA needs peft: run `pip install 'dynadepth[train]'`.") from error
    return peft


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
