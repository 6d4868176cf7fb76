"""GPT-2: learnt positions, and queries, keys and values side by side in one matrix, of which two thirds project."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dynadepth.architectures.spec import ArchitectureSpec


def project_kv(attention: nn.Module, hidden: Tensor, position_embeddings: Any) -> tuple[Tensor, Tensor]:
    """Keys and values `[n, heads, t, d]` of normed states `[n, t, D]`; positions are in the states."""
    module: Any = attention
    width = module.split_size
    weight, bias = module.c_attn.weight[:, width:], module.c_attn.bias[width:]  # inputs come first in a Conv1D
    parts = (hidden @ weight + bias).split(width, dim=-1)
    keys, values = (part.view(*hidden.shape[:-1], -1, module.head_dim).transpose(1, 2) for part in parts)
    return keys, values


GPT2 = ArchitectureSpec(
    model_types=("gpt2",),
    layers="h",
    attention="attn",
    attention_norms=("ln_1", None),
    mlp_norms=("ln_2", None),
    projector=project_kv,
)
