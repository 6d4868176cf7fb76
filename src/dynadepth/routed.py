"""What is attached to a model, and where to find it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dynadepth.architectures import ArchitectureSpec
from dynadepth.errors import UnsupportedModelError
from dynadepth.lora import Lora, base_state
from dynadepth.methods import DepthConfig
from dynadepth.routing.calibration import Calibration
from dynadepth.routing.decision import Site
from dynadepth.routing.expert_choice import ChoosingRouter
from dynadepth.routing.forward import RoutedModel
from dynadepth.routing.granularity import Granularity
from dynadepth.routing.router import AbstractRouter
from dynadepth.routing.skip_path import AbstractSkipPath
from dynadepth.routing.sublayer import PATH, SublayerState, is_attached_name
from dynadepth.routing.target import Target


@dataclass
class Routing:
    """What is attached to a model: its configuration, its sites, and how its budgets were calibrated."""

    config: DepthConfig
    spec: ArchitectureSpec
    target: Target
    granularity: Granularity
    n_layers: int
    sites: tuple[Site, ...]
    states: dict[Site, SublayerState] = field(default_factory=dict)
    calibration: Calibration | None = None
    lora: Lora | None = None
    """The adapter that routed forwards have beside the routers."""
    budget: float | None = None
    """The budget last set, of all sublayers of the target; None: the routers' own thresholds, or a route as given."""
    speedup: dict[str, Any] | None = None
    """The speed-up that this budget was solved from, and how; None where the budget itself was asked for."""
    control: float | None = None
    """The control last set (`dynadepth.set_control`), where it came after the budget."""
    provenance: dict[str, Any] = field(default_factory=dict)
    gates: dict[int, nn.Module] = field(default_factory=dict)
    """By layer, the gates of mixtures of experts that are watched."""
    predicts: bool = True
    """Has the model a vocabulary head, so that labels are tokens to predict?"""
    trainable_before: tuple[str, ...] = ()
    input_grads: bool = False
    """Were gradients of the embeddings asked for (by gradient checkpointing)? They come back at `detach`."""

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Layers whose cache holds executed tokens with their positions."""
        sparse = self.granularity.name == "token" and self.target.keeps_kv and self.config.kv_policy == "drop"
        return tuple(site.layer for site in self.sites) if sparse else ()

    @property
    def layout(self) -> tuple[Any, ...]:
        """What tells whether a cache filled under one routing can be continued under another."""
        return (self.sites, self.granularity.name, self.sparse_layers)

    @property
    def rests(self) -> bool:
        """Can a skip be known before its site is reached, and leaves nothing there to read?"""
        return self.granularity.sticky and self.config.skip_path == "identity"

    @property
    def is_static(self) -> bool:
        """Is every router constant, so that the configuration alone says what runs?"""
        return all(router.constant is not None for router in self.routers().values())

    @property
    def trainable(self) -> bool:
        """Has any router, skip path or LoRA a parameter to train?"""
        others = [p for path in self.paths().values() for p in path.parameters()]
        others += [] if self.lora is None else [p for _, p in self.lora.named_parameters()]
        return self.learns or any(p.requires_grad for p in others)

    @property
    def learns(self) -> bool:
        """Has any router a parameter to train? Then training runs every unit both ways, else what executes alone."""
        return any(p.requires_grad for router in self.routers().values() for p in router.parameters())

    @property
    def chooses(self) -> bool:
        """Do tokens compete within their sequence while training (see `routing/expert_choice.py`)?"""
        return any(isinstance(state.router, ChoosingRouter) for state in self.states.values())

    def routers(self) -> dict[Site, AbstractRouter]:
        """The router of each site."""
        return {site: state.router for site, state in self.states.items()}

    def paths(self) -> dict[Site, AbstractSkipPath]:
        """The skip path of each site that has parameters."""
        return {site: s.skip_path for site, s in self.states.items() if any(True for _ in s.skip_path.parameters())}

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that is learnt by routers and skip paths, by the names they have on disk."""
        return {
            f"{site}.{infix}{name}": tensor
            for infix, modules in (("", self.routers()), (f"{PATH}.", self.paths()))
            for site, module in modules.items()
            for name, tensor in module.state_dict().items()
        }

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Puts such tensors in place. Raises ValueError naming the first that is missing, too many, of another shape
        or not finite (thresholds may be infinite); then nothing is changed."""
        wanted = self.tensors()
        for name in sorted({*wanted, *tensors}):
            what = f"the {'skip path' if f'.{PATH}.' in name else 'router'} of {'.'.join(name.split('.')[:2])}"
            if name not in tensors:
                raise ValueError(f"{what} is asked for, and {name!r} is missing")
            if name not in wanted:
                raise ValueError(f"{what} is not asked for, and {name!r} is there")
            there, asked = tuple(tensors[name].shape), tuple(wanted[name].shape)
            if there != asked:
                raise ValueError(f"{what} is of another shape: {name!r} has {there} where {asked} is asked for")
            free = torch.isinf if name.endswith(".threshold") else torch.zeros_like
            if not (torch.isfinite(tensors[name]) | free(tensors[name]).bool()).all():
                raise ValueError(f"{what} is not finite: {name!r}")
        for parts, infix in ((self.routers(), ""), (self.paths(), f"{PATH}.")):
            for site, part in parts.items():
                part.load_state_dict({name: tensors[f"{site}.{infix}{name}"] for name in part.state_dict()})

    def base_state(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A state dict of the model without what is attached, by the names of the base."""
        own = {name: tensor for name, tensor in state.items() if not is_attached_name(name)}
        return own if self.lora is None else base_state(own)

    def follow(self, config: DepthConfig, hidden_size: int) -> None:
        """Takes over a configuration of the same sites whose routers are constant: they decide what it says."""
        for site, router in self.routers().items():
            router.constant = config.build_router(site, hidden_size).constant
        self.config = config

    def take_paths(self, other: Routing) -> None:
        """Copies another routing's skip paths of the same sites, in their dtype."""
        for site, path in self.paths().items():
            source = other.states[site].skip_path
            path.load_state_dict(source.state_dict())
            path.to(next(source.parameters()).dtype)

    def keep_of(self, budget: float) -> float:
        """The keep ratio of the routed sites that a budget of all sublayers of the target asks for."""
        return (budget * self.n_layers - (self.n_layers - len(self.sites))) / len(self.sites)

    def budget_of(self, keep: float) -> float:
        """The inverse of `keep_of`."""
        return (keep * len(self.sites) + self.n_layers - len(self.sites)) / self.n_layers

    def lowest_budget(self) -> float:
        """The budget at which every routed site skips everything."""
        return (self.n_layers - len(self.sites)) / self.n_layers


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, under a PeftModel if there is one."""
    if isinstance(model, PreTrainedModel):
        return model
    find: Any = getattr(model, "get_base_model", None)
    base = find() if find else None
    if not isinstance(base, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a transformers PreTrainedModel (or a PeftModel around one): "
            "nothing to route."
        )
    return base


def is_attached(model: nn.Module) -> bool:
    """Does the model have routers?"""
    return isinstance(unwrapped(model), RoutedModel)


def routing_of(model: nn.Module) -> Routing:
    """The model's routing; UnsupportedModelError where nothing is attached."""
    base = unwrapped(model)
    if not isinstance(base, RoutedModel):
        raise UnsupportedModelError(
            f"{type(base).__name__} has no routers: call dynadepth.attach(model, config) first."
        )
    return base.depth_routing
