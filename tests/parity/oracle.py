"""What a routed model must answer, by another road: hooks on the bare model, everything computed, then replaced.

Shares no code with the package. A skipped attention or MLP returns zero, a skipped layer returns its input, and under
`drop` a skipped token's keys are hidden from all other tokens by the attention mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def layers_of(model: Any) -> nn.ModuleList:
    decoder = model.get_decoder()
    return decoder.layers


def attention_of(layer: nn.Module) -> nn.Module:
    return layer.attention if hasattr(layer, "attention") else layer.self_attn


def module_of(layer: nn.Module, target: str) -> nn.Module:
    """The module that a target routes."""
    return {"attention": attention_of, "mlp": lambda at: at.mlp, "block": lambda at: at}[target](layer)


def _replace(execute: Tensor, is_block: bool) -> Any:
    """A forward hook; `execute` bool `[B, T]`."""

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        first = output[0] if isinstance(output, tuple) else output
        mixed = torch.where(execute[:, :, None], first, hidden if is_block else torch.zeros_like(first))
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    return hook


def _silence(execute: Tensor) -> Any:
    """A forward hook that zeroes the attention weights `[B, heads, T, K]` of skipped tokens."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        weights = output[1]
        return output if weights is None else (output[0], weights * execute[:, None, :, None], *output[2:])

    return hook


def _hide(execute: Tensor) -> Any:
    """A forward pre-hook that hides the keys of skipped tokens from all tokens but themselves."""

    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        mask = kwargs["attention_mask"]
        assert mask is not None, "give the oracle a padded batch, for which every attention builds a mask"
        visible = (execute[:, None, :] | torch.eye(execute.shape[1], dtype=torch.bool))[:, None]
        if mask.dtype == torch.bool:
            return args, {**kwargs, "attention_mask": mask & visible}
        return args, {**kwargs, "attention_mask": mask.masked_fill(~visible, torch.finfo(mask.dtype).min)}

    return hook


@torch.no_grad()
def reference(bare: Any, cell: Any, given: dict[Any, Tensor], batch: dict[str, Tensor], **options: Any) -> Any:
    """The bare model's outputs for the whole batch at once under the decisions `given`."""
    hooks = []
    for site, decision in given.items():
        layer = layers_of(bare)[site.layer]
        execute = decision if decision.dim() == 2 else decision[:, None].expand(batch["input_ids"].shape)
        module = module_of(layer, cell.target)
        if cell.target != "mlp":
            attention = attention_of(layer)
            hooks.append(attention.register_forward_hook(_silence(execute), prepend=True))
            if cell.has_policy and cell.kv_policy == "drop":
                hooks.append(attention.register_forward_pre_hook(_hide(execute), with_kwargs=True))
        hook = _replace(execute, cell.target == "block")
        hooks.append(module.register_forward_hook(hook, with_kwargs=True, prepend=True))
    try:
        return bare(**batch, **options)
    finally:
        for hook in hooks:
            hook.remove()
