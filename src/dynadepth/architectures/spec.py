"""`ArchitectureSpec` and the look-up of a model's own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from dynadepth.errors import UnsupportedModelError
from dynadepth.routing.registry import import_modules

Projector = Callable[[nn.Module, Tensor, Any], tuple[Tensor, Tensor]]


def project_kv(attention: nn.Module, hidden: Tensor, position_embeddings: Any) -> tuple[Tensor, Tensor]:
    """Keys and values `[n, heads, t, d]` of normed states `[n, t, D]`, for attentions with separate `k_proj`, `v_proj`.

    A `k_norm` is applied before or after the split into heads, by its size; rotary embeddings by the model's own
    function.
    """
    module: Any = attention
    heads = (*hidden.shape[:-1], -1, module.head_dim)
    keys = module.k_proj(hidden)
    norm = getattr(module, "k_norm", None)
    if norm is not None and norm.weight.shape[-1] != module.head_dim:
        keys, norm = norm(keys), None
    values = module.v_proj(hidden)
    clip = getattr(getattr(module, "config", None), "clip_qkv", None)  # OLMo, OLMoE
    if clip is not None:
        keys, values = keys.clamp(-clip, clip), values.clamp(-clip, clip)
    keys, values = keys.view(heads), values.view(heads).transpose(1, 2)
    keys = (norm(keys) if norm is not None else keys).transpose(1, 2)
    if getattr(module, "use_rope", True):
        rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
        keys = rotate(keys, keys, *position_embeddings)[1]
    return keys, values


@dataclass(frozen=True)
class ArchitectureSpec:
    """Names of the parts of a decoder layer. Defaults are those of Llama and most families after it."""

    model_types: tuple[str, ...] = ()
    """`config.model_type` values this spec is for."""
    layers: str = "layers"
    """Attribute of the decoder that holds its layers."""
    attention: str = "self_attn"
    mlp: str = "mlp"
    attention_norms: tuple[str | None, str | None] = ("input_layernorm", None)
    """Norms before and after the attention, None where there is none."""
    mlp_norms: tuple[str | None, str | None] = ("post_attention_layernorm", None)
    parallel: str | None = None
    """Config attribute that is true where attention and MLP read the same input (GPT-NeoX)."""
    residual_scale: str | None = None
    """Layer attribute that scales what is added to the residual stream (Granite)."""
    projector: Projector | None = project_kv
    """Keys and values of given tokens; None where the projections are fused. Proved by the probe before it is used."""
    note: str = ""
    """Why something is not supported, for the message."""


STANDARD = ArchitectureSpec()


def text_config(model: PreTrainedModel) -> Any:
    """The configuration of the text decoder (the model's own, but for multimodal models)."""
    return model.config.get_text_config(decoder=True)


def positions_of(model: PreTrainedModel) -> int | None:
    """Most tokens that the model reads, where its configuration says."""
    limit: int | None = getattr(text_config(model), "max_position_embeddings", None)
    return limit


def spec_for(model: PreTrainedModel) -> ArchitectureSpec:
    """The spec declared for the model's type, else the standard one."""
    import_modules("dynadepth.architectures")
    model_type = text_config(model).model_type
    for name, module in list(sys.modules.items()):
        if name.startswith("dynadepth.architectures."):
            for value in vars(module).values():
                if isinstance(value, ArchitectureSpec) and model_type in value.model_types:
                    return value
    return STANDARD


def decoder_layers(model: PreTrainedModel, spec: ArchitectureSpec | None = None) -> nn.ModuleList:
    """The decoder layers of a model, or UnsupportedModelError saying what was looked for."""
    spec = spec or spec_for(model)
    decoder = decoder_of(model)
    layers = getattr(decoder, spec.layers, None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be routed: its decoder {type(decoder).__name__} has no list of layers "
            f"called {spec.layers!r}. Declare its parts in a new file of dynadepth/architectures."
        )
    return layers


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The module whose forward runs the layers (the model itself, for a model without a head)."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return model if decoder is None else decoder
