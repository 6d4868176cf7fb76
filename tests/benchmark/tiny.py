"""Tiny random models in memory, one per way of building a decoder layer. Every weight is far from a special value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXTURE = {"num_experts_per_tok": 2, "num_local_experts": 4}
SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}

SPECIAL: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 6},
    "Qwen3": {"head_dim": 8},
    "Gemma2": {"head_dim": 12, "query_pre_attn_scalar": 12, **SLIDING},
    "Gemma3": {"head_dim": 12, "query_pre_attn_scalar": 12, **SLIDING},
    "Phi3": {},
    "Olmo2": {},
    "GPTNeoX": {"num_key_value_heads": None},
    "Granite": {"residual_multiplier": 0.3, "attention_multiplier": 0.4, "embedding_multiplier": 2.0},
    "Mixtral": {**MIXTURE, "sliding_window": None},
    "Olmoe": {"num_experts_per_tok": 2, "num_experts": 4},
    "GptOss": {**MIXTURE, "head_dim": 8, **SLIDING},
}
CONFIGS = {"Gemma3": "Gemma3TextConfig"}


def tiny(name: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random float32 model of a family of `SPECIAL`, in eval mode, with 4 layers."""
    config_class: Callable[..., Any] = getattr(transformers, CONFIGS.get(name, f"{name}Config"))
    given = {**SIZES, **SPECIAL[name], **overrides}
    values = {key: value for key, value in given.items() if value is not None or key == "sliding_window"}
    config = config_class(**values)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.generation_config.eos_token_id = None
    return model


def ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids `[batch, length]` without the special ones."""
    return torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(seed))
