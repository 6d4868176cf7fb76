"""Linear layers that read their weight once where a forward brings a few rows, as a decode step does, on a CPU, and
linear skip paths that take a token in one call.

Of bfloat16 weights: PyTorch rearranges every weight for its matrix product first, which takes longer than the product.
Of torchao's int8 weights with one scale a row: torchao widens them for a product in the model's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dynadepth.compiled import kernel
from dynadepth.routing.skip_path import LinearPath, Memory, Reality
from dynadepth.routing.sublayer import restore_class, swap_class

PLAIN = (nn.Parameter, Tensor)
"""Weights that are numbers and nothing else: not torchao's, not sharded ones."""


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
            and type(weight) in PLAIN
            and input.device.type == "cpu"
            and weight.is_contiguous()
            and not torch.is_autocast_enabled("cpu")
        ):
            return torch.ops.dynadepth.small_linear(input, weight, None, self.bias)
        return super().forward(input)  # type: ignore[misc]  # mixed into nn.Linear


class SmallInt8Linear:
    """Mixin put before an `nn.Linear` whose weight is torchao's. `int8_parts`: that weight, its int8 values `[N, K]`
    and float32 scales `[N]`."""

    weight: Tensor
    bias: Tensor | None
    int8_parts: tuple[Tensor, Tensor, Tensor]

    def forward(self, input: Tensor) -> Tensor:
        weight, values, scale = self.int8_parts
        if (
            not torch.is_grad_enabled()
            and input.numel() <= kernel.MOST_ROWS * values.shape[1]
            and input.dtype in (torch.bfloat16, torch.float32)
            and input.device.type == "cpu"
            and self.weight is weight
            and not torch.is_autocast_enabled("cpu")
        ):
            return torch.ops.dynadepth.small_linear(input, values, scale, self.bias)
        return super().forward(input)  # type: ignore[misc]  # mixed into nn.Linear


class SmallPath:
    """Mixin put before `LinearPath`: one token of each row, without gradients, is one kernel."""

    read: Tensor
    write: Tensor
    bias: Tensor

    def forward(
        self, hidden: Tensor, reality: Reality | None = None, memory: Memory | None = None
    ) -> tuple[Tensor, Memory | None]:
        if (
            not torch.is_grad_enabled()
            and memory is not None
            and memory.past is None
            and hidden.shape[1] == 1
            and len(hidden) <= kernel.MOST_ROWS
            and hidden.dtype in (torch.bfloat16, torch.float32)
            and hidden.dtype is self.read.dtype is self.write.dtype is self.bias.dtype is memory.last.dtype
            and memory.total.dtype is memory.count.dtype is torch.float32
            and all(part.is_contiguous() for part in (self.read, self.write, memory.last, memory.total, memory.count))
            and hidden.device.type == "cpu"
            and not torch.is_autocast_enabled("cpu")
        ):
            given = (hidden, self.read, self.write, self.bias, memory.last, memory.total, memory.count)
            contribution, *parts = torch.ops.dynadepth.path_step(*given)
            after = Memory(*parts)
            return contribution, after if reality is None else memory.unless(reality.real, after)
        return super().forward(hidden, reality, memory)  # type: ignore[misc]  # mixed into LinearPath


def mixin_for(module: nn.Module) -> type | None:
    """What to put before this module: a plain linear layer of bfloat16 or int8 weights, or a linear skip path, on a
    CPU; None for others."""
    if type(module) is LinearPath:
        return SmallPath if module.read.device.type == "cpu" and not module.unit_input else None
    weight: Any = getattr(module, "weight", None)
    if type(module) is not nn.Linear or "forward" in vars(module) or weight.device.type != "cpu":
        return None
    if type(weight) in PLAIN:
        return SmallLinear if weight.dtype is torch.bfloat16 else None
    return SmallInt8Linear if _int8_parts(weight) is not None else None


def _int8_parts(weight: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    """The parts of torchao's `Int8Tensor` (weights alone quantised, symmetric, one scale a row); None for others."""
    values, scale, zero = (getattr(weight, name, None) for name in ("qdata", "scale", "zero_point"))
    if (
        type(weight).__name__ != "Int8Tensor"
        or not isinstance(values, Tensor)
        or not isinstance(scale, Tensor)
        or values.dtype is not torch.int8
        or not values.is_contiguous()
        or scale.numel() != values.shape[0]
        or (zero is not None and bool(zero.any()))
        or any(getattr(weight, name, None) is not None for name in ("act_quant_kwargs", "act_pre_scale"))
    ):
        return None
    return weight, values, scale.detach().reshape(-1).float()


def make_small(model: nn.Module) -> list[nn.Module]:
    """Puts such a mixin before every module that has one; returns them."""
    chosen = [(module, mixin) for module in model.modules() if (mixin := mixin_for(module)) is not None]
    for module, mixin in chosen:
        if mixin is SmallInt8Linear:
            parts: Any = _int8_parts(module.weight)
            module.int8_parts = parts
        swap_class(module, mixin)
    return [module for module, _ in chosen]


def make_plain(modules: list[nn.Module]) -> None:
    """Undoes `make_small`."""
    for module in modules:
        mixin = next(mixin for mixin in (SmallLinear, SmallInt8Linear, SmallPath) if isinstance(module, mixin))
        restore_class(module, mixin)
        if mixin is SmallInt8Linear:
            del module.int8_parts
