"""What a routed model must answer, by another road: hooks on the bare model, everything computed, then replaced.

Shares no code with the package. A skipped attention or MLP contributes zero or what its surrogate says, a skipped layer
returns its input (and adds the surrogate's part), and under `drop` a skipped token's keys are hidden from all other
tokens by the attention mask.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def layers_of(model: Any) -> nn.ModuleList:
    decoder = model.get_decoder()
    return decoder.h if hasattr(decoder, "h") else decoder.layers


def attention_of(layer: nn.Module) -> nn.Module:
    return next(getattr(layer, name) for name in ("self_attn", "attention", "attn") if hasattr(layer, name))


def module_of(layer: nn.Module, target: str) -> nn.Module:
    """The module that a target routes."""
    return {"attention": attention_of, "mlp": lambda at: at.mlp, "block": lambda at: at}[target](layer)


POST_NORMS = {"attention": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}


def contributor_of(layer: nn.Module, target: str) -> nn.Module:
    """The module whose output the layer adds to its residual stream: a target's own, or the norm behind it."""
    has_post_norms = hasattr(layer, "post_feedforward_layernorm")  # then post_attention_layernorm is one, too
    return getattr(layer, POST_NORMS[target]) if has_post_norms and target != "block" else module_of(layer, target)


RANK = 3


def surrogate_weights(layer: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The test's linear skip path of a layer: read `[D, 3r]`, write `[r, D]`, bias `[D]`."""
    generator = torch.Generator().manual_seed(100 + layer)
    shapes = ((size, 3 * RANK), (RANK, size), (size,))
    return tuple(torch.randn(shape, generator=generator) * 0.3 for shape in shapes)  # type: ignore[return-value]


def surrogate(layer: int, hidden: Tensor, real: Tensor, unit: bool) -> Tensor:
    """Its contribution `[B, T, D]`, token by token; `unit`: the states are scaled to a root mean square of one."""
    read, write, bias = surrogate_weights(layer, hidden.shape[-1])
    out = torch.zeros_like(hidden)
    for row in range(len(hidden)):
        seen: list[Tensor] = []
        for t in range(hidden.shape[1]):
            if not real[row, t]:
                continue
            h = hidden[row, t]
            seen.append(h / (h.square().mean() + 1e-6).sqrt() if unit else h)
            before = seen[-2] if len(seen) > 1 else torch.zeros_like(h)
            features = torch.stack([seen[-1], before, torch.stack(seen).mean(0)])
            parts = [f @ r for f, r in zip(features, read.split(RANK, dim=1), strict=True)]
            out[row, t] = sum(parts) @ write + bias
    return out


def _replace(execute: Tensor, is_block: bool, inputs: dict[str, Tensor], replaced: Any) -> Any:
    """A forward hook; `execute` bool `[B, T]`. `replaced`: the skip path's contribution for the sublayer's input."""

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = inputs["hidden"]
        first = output[0] if isinstance(output, tuple) else output
        skipped = torch.zeros_like(first) if replaced is None else replaced(hidden)
        mixed = torch.where(execute[:, :, None], first, hidden + skipped if is_block else skipped)
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    return hook


def _note(inputs: dict[str, Tensor]) -> Any:
    """A forward pre-hook that keeps a module's input."""

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs["hidden"] = args[0] if args else kwargs["hidden_states"]

    return hook


def _silence(execute: Tensor) -> Any:
    """A forward hook that zeroes the attention weights `[B, heads, T, K]` of skipped tokens."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        weights = output[1]
        return output if weights is None else (output[0], weights * execute[:, None, :, None], *output[2:])

    return hook


def hide(execute: Tensor) -> Any:
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
                hooks.append(attention.register_forward_pre_hook(hide(execute), with_kwargs=True))
        replaced = None
        if cell.skip_path == "linear":
            real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            # no norm before the sublayer: the layer has none of these names, or it is the block itself
            unit = cell.target == "block" or not (hasattr(layer, "input_layernorm") or hasattr(layer, "ln_1"))
            replaced = partial(surrogate, site.layer, real=real, unit=unit)
        inputs: dict[str, Tensor] = {}
        hooks.append(module.register_forward_pre_hook(_note(inputs), with_kwargs=True, prepend=True))
        hook = _replace(execute, cell.target == "block", inputs, replaced)
        contributor = contributor_of(layer, cell.target) if replaced is not None else module
        hooks.append(contributor.register_forward_hook(hook, with_kwargs=True, prepend=True))
    try:
        return bare(**batch, **options)
    finally:
        for hook in hooks:
            hook.remove()
