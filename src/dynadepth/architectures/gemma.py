"""Gemma 2 and 3: a norm before and one after each sublayer (RMSNorm of zero is zero, so a skip is still the
identity)."""

from dynadepth.architectures.spec import ArchitectureSpec

GEMMA = ArchitectureSpec(
    model_types=("gemma2", "gemma3", "gemma3_text"),
    attention_norms=("input_layernorm", "post_attention_layernorm"),
    mlp_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
