"""Tiny random models of every architecture that the parity matrix covers, built in memory.

Widths are a few dozen, windows are shorter than the test sequences, and norm weights and biases are far from one and
zero, so that a mistake in any of them shows. Nothing is loaded from anywhere.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel

VOCABULARY, WIDTH, LAYERS, HEADS, KV_HEADS, WINDOW = 97, 32, 4, 4, 2, 5

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
MIXED = ["sliding_attention", "full_attention"] * (LAYERS // 2)


def _llama() -> PreTrainedModel:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True))


def _mistral() -> PreTrainedModel:
    return hf.MistralForCausalLM(hf.MistralConfig(**COMMON, sliding_window=WINDOW))


def _qwen2() -> PreTrainedModel:
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**COMMON))


def _qwen3() -> PreTrainedModel:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**COMMON, head_dim=16))


def _gemma2() -> PreTrainedModel:
    config = hf.Gemma2Config(
        **COMMON,
        head_dim=16,
        sliding_window=WINDOW,
        layer_types=MIXED,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=2.0,
    )
    return hf.Gemma2ForCausalLM(config)


def _gemma3() -> PreTrainedModel:
    config = hf.Gemma3TextConfig(
        **COMMON, head_dim=16, sliding_window=WINDOW, layer_types=MIXED, query_pre_attn_scalar=16
    )
    return hf.Gemma3ForCausalLM(config)


def _phi3() -> PreTrainedModel:
    return hf.Phi3ForCausalLM(hf.Phi3Config(**COMMON, sliding_window=WINDOW))


def _olmo2() -> PreTrainedModel:
    return hf.Olmo2ForCausalLM(hf.Olmo2Config(**COMMON))


def _smollm3() -> PreTrainedModel:
    return hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**COMMON, no_rope_layers=[1, 0] * (LAYERS // 2)))


def _gpt_neox(parallel: bool) -> PreTrainedModel:
    config = {name: value for name, value in COMMON.items() if name != "num_key_value_heads"}
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**config, use_parallel_residual=parallel))


def _gpt2() -> PreTrainedModel:
    shape = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_inner": 48, "n_positions": 128}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    others = {name: value for name, value in COMMON.items() if name.endswith(("token_id", "vocab_size"))}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**others, **shape, **dropout, tie_word_embeddings=False))


def _granite() -> PreTrainedModel:
    config = hf.GraniteConfig(
        **COMMON, residual_multiplier=0.4, attention_multiplier=0.3, embedding_multiplier=0.5, logits_scaling=0.5
    )
    return hf.GraniteForCausalLM(config)


def _mixtral() -> PreTrainedModel:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2))


def _olmoe() -> PreTrainedModel:
    return hf.OlmoeForCausalLM(hf.OlmoeConfig(**COMMON, num_experts=4, num_experts_per_tok=2, clip_qkv=1.5))


def _gpt_oss() -> PreTrainedModel:
    config = hf.GptOssConfig(
        **COMMON,
        head_dim=16,
        sliding_window=WINDOW,
        layer_types=MIXED,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return hf.GptOssForCausalLM(config)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "olmo2": _olmo2,
    "smollm3": _smollm3,
    "gpt_neox": lambda: _gpt_neox(parallel=True),
    "gpt_neox_serial": lambda: _gpt_neox(parallel=False),
    "gpt2": _gpt2,
    "granite": _granite,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "gpt_oss": _gpt_oss,
}

NATIVE = {"gemma2": "eager", "gpt_oss": "eager"}
"""Soft-capped scores and sinks exist in eager attention alone; the others run sdpa unless a test asks for eager."""

EAGER = ("llama", "gemma3", "gpt_neox")
"""Families that run with eager attention, too: masks and attention weights go other ways there."""

FUSED = ("phi3", "gpt_neox", "gpt_neox_serial")
"""Families whose queries, keys and values come from one matrix: `kv_policy="project"` is refused for them."""

MODELS = (*FAMILIES, *(f"{name}-eager" for name in EAGER))


@torch.no_grad()
def randomise(model: PreTrainedModel, seed: int = 0) -> None:
    """Weights under which every sublayer contributes about as much as the stream that it is added to."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            # Embeddings [V, D] as they are; linear weights [out, in], and gpt-oss's experts [E, in, out], by their
            # fan-in.
            fan_in = parameter.shape[1] if parameter.dim() == 3 else parameter.shape[-1]
            embeds = any(part in name for part in ("embed", "wte", "wpe"))
            parameter.copy_(noise if embeds else noise / fan_in**0.5)
        elif name.endswith("norm.weight") or (".ln_" in name and name.endswith("weight")):
            parameter.copy_(1 + 0.3 * noise)
        else:
            parameter.copy_(0.3 * noise)


@cache
def _built(name: str) -> PreTrainedModel:
    family, _, attention = name.partition("-")
    model = FAMILIES[family]().eval()
    model.set_attn_implementation(attention or NATIVE.get(family, "sdpa"))
    randomise(model)
    return model


def tiny(name: str) -> Any:
    """A fresh copy of the tiny model `name` (one of `MODELS`), float32, in evaluation mode."""
    return copy.deepcopy(_built(name))
