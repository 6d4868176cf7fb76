"""Targets: which sublayer of a decoder layer is routed, and what skipping it means.

A new target is one new subclass in one new module of this package; `target_named` finds it by `name`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dynadepth.routing.registry import named_subclass


class Target(ABC):
    """One kind of routed sublayer. Stateless; `layer` is a decoder layer, `spec` names its parts."""

    name: ClassVar[str]
    general: ClassVar[bool] = True
    """May any method route it? Else those alone that have it as their default."""
    keeps_kv: ClassVar[bool]
    """Does the sublayer write keys and values?"""
    runs_mlp: ClassVar[bool] = True
    """Does the sublayer run the MLP, and the experts where there are any?"""

    @abstractmethod
    def module(self, layer: nn.Module, spec: Any) -> nn.Module:
        """The module of `layer` that is routed; AttributeError where the layer has none."""

    def skipped(self, hidden: Tensor, contribution: Tensor | None) -> Tensor:
        """What the module returns for units that skip: `[B, T, D]`. May be a view of one zero; never written to."""
        return hidden.new_zeros(1).expand(hidden.shape) if contribution is None else contribution

    def canvas(self, hidden: Tensor) -> Tensor:
        """What skipped units return that contribute nothing, as a tensor of its own into which others are written."""
        return torch.zeros_like(hidden)

    def weighted(self, hidden: Tensor, output: Tensor, weight: Tensor) -> Tensor:
        """The module's output `[n, t, D]` for the input `hidden`, with what it contributes multiplied by `weight`
        (float32 `[n, t]`), in float32 where the model's dtype is shorter."""
        return (output * weight.unsqueeze(-1)).to(output.dtype)

    def attention(self, layer: nn.Module, spec: Any) -> nn.Module | None:
        """The attention module whose keys and values this target writes."""
        return getattr(layer, spec.attention) if self.keeps_kv else None


class AttentionTarget(Target):
    """The attention module; the host adds its output to the residual stream."""

    name = "attention"
    keeps_kv = True
    runs_mlp = False

    def module(self, layer: nn.Module, spec: Any) -> nn.Module:
        return getattr(layer, spec.attention)


class MlpTarget(Target):
    """The MLP or mixture of experts; the host adds its output to the residual stream."""

    name = "mlp"
    keeps_kv = False

    def module(self, layer: nn.Module, spec: Any) -> nn.Module:
        return getattr(layer, spec.mlp)


class BlockTarget(Target):
    """The whole decoder layer, which carries the residual stream itself."""

    name = "block"
    keeps_kv = True

    def module(self, layer: nn.Module, spec: Any) -> nn.Module:
        return layer

    def skipped(self, hidden: Tensor, contribution: Tensor | None) -> Tensor:
        return hidden if contribution is None else hidden + contribution

    def canvas(self, hidden: Tensor) -> Tensor:
        return hidden.clone()

    def weighted(self, hidden: Tensor, output: Tensor, weight: Tensor) -> Tensor:
        return (hidden + weight.unsqueeze(-1) * (output - hidden)).to(output.dtype)


def target_named(name: str) -> Target:
    """The target called `name`; ConfigError with the near names otherwise."""
    return named_subclass(Target, name, package="dynadepth.routing")()  # type: ignore[type-abstract]  # a subclass comes out
