"""OLMo 2 and 3, EXAONE 4: no norm before a sublayer, one behind it."""

from dynadepth.architectures.spec import ArchitectureSpec

OLMO2 = ArchitectureSpec(
    model_types=("olmo2", "olmo3", "exaone4"),
    attention_norms=(None, "post_attention_layernorm"),
    mlp_norms=(None, "post_feedforward_layernorm"),
)
