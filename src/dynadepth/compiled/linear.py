"""Linear layers that read their weight once where a forward brings a few rows, as a decode step does (CPU, bfloat16).

There PyTorch rearranges every weight for its matrix product first, which takes longer than the product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dynadepth.compiled import kernel
from dynadepth.routing.sublayer import restore_class, swap_class


class SmallLinear:
    """Mixin put before `nn.Linear`; everything but a few rows without gradients takes the base's way."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        if (
            not torch.is_grad_enabled()
            and input.numel() <= kernel.MOST_ROWS * weight.shape[1]
            and input.dtype is torch.bfloat16
            and weight.dtype is torch.bfloat16
            and input.device.type == "cpu"
            and weight.is_contiguous()
            and not torch.is_autocast_enabled("cpu")
        ):
            return torch.ops.dynadepth.small_linear(input, weight, None, self.bias)
        return super().forward(input)  # type: ignore[misc]  # mixed into nn.Linear


def serves(module: nn.Module) -> bool:
    """Is this a plain linear layer that `SmallLinear` can stand before?"""
    weight: Any = getattr(module, "weight", None)
    return (
        type(module) is nn.Linear
        and type(weight) in (nn.Parameter, Tensor)
        and weight.dtype is torch.bfloat16
        and weight.device.type == "cpu"
        and "forward" not in vars(module)
    )


def make_small(model: nn.Module) -> list[nn.Module]:
    """Puts `SmallLinear` before every linear layer that it serves; returns them."""
    chosen = [module for module in model.modules() if serves(module)]
    for module in chosen:
        swap_class(module, SmallLinear)
    return chosen


def make_plain(modules: list[nn.Module]) -> None:
    """Undoes `make_small`."""
    for module in modules:
        restore_class(module, SmallLinear)
