"""What cannot be routed is refused with the reason and the way out, and left as it was."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import dynadepth
from dynadepth import MindSkipConfig
from dynadepth.errors import UnsupportedModelError

from .matrix import CELLS, REFUSED, Cell, inputs, over
from .models import LAYERS, WIDTH, tiny
from .test_execute_all import form


def refuse(model: Any, config: MindSkipConfig, *words: str) -> None:
    """Attaching raises one sentence with all these words, and changes nothing."""
    before = form(model)
    with pytest.raises(UnsupportedModelError) as caught:
        dynadepth.attach(model, config)
    for word in (type(model).__name__, *words):
        assert re.search(word, str(caught.value)), caught.value
    assert form(model) == before
    assert not dynadepth.is_attached(model)


@over(REFUSED)
def test_fused_projections(name: str, cell: Cell) -> None:
    words = ("kv_policy='project'", "fused", "kv_policy='drop'", "granularity='sequence'")
    refuse(tiny(name), MindSkipConfig(**cell.settings), *words)


def test_projections_that_differ_from_the_declared_ones() -> None:
    class Shifted(nn.Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden + hidden.roll(1, dims=1))  # keys that know the token before

    model = tiny("llama")
    model.model.layers[2].self_attn.k_proj.__class__ = Shifted
    config = MindSkipConfig(granularity="token", layers=(1, 2))
    refuse(model, config, "layer 2", "differs from what the module stores", "kv_policy='drop'")


class BiasedPostNorm(LlamaDecoderLayer):
    """A made-up layer: a LayerNorm with bias behind the attention, so that what is skipped still moves the stream."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attention, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.after(attention)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class NormedStream(LlamaDecoderLayer):
    """A made-up layer: the norm stands on the residual stream itself, as in the first transformers."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        hidden_states = self.input_layernorm(hidden_states + self.self_attn(hidden_states, **kwargs)[0])
        return self.post_attention_layernorm(hidden_states + self.mlp(hidden_states))


@pytest.mark.parametrize("cell", CELLS, ids=str)
@pytest.mark.parametrize("kind", [BiasedPostNorm, NormedStream])
def test_layers_that_a_skip_would_change(kind: type[nn.Module], cell: Cell) -> None:
    model = tiny("llama")
    layer = model.model.layers[1]
    layer.__class__ = kind
    if kind is BiasedPostNorm:
        layer.after = nn.LayerNorm(WIDTH)
        nn.init.normal_(layer.after.bias)
    model(**inputs())
    refuse(model, MindSkipConfig(**cell.settings), r"layers \[1\]", "not the identity")
    others = {**cell.settings, "layers": (0, 2, 3)}
    assert dynadepth.is_attached(dynadepth.attach(model, MindSkipConfig(**others)))


@pytest.mark.parametrize("target", ["attention", "mlp", "block"])
def test_state_space_models(target: str) -> None:
    config = hf.MambaConfig(vocab_size=97, hidden_size=WIDTH, num_hidden_layers=LAYERS, state_size=4)
    words = ("MambaBlock has no 'self_attn'", "norm, mixer", "Only layers with attention")
    refuse(hf.MambaForCausalLM(config), MindSkipConfig(target=target), *words)


def test_hybrid_models_name_the_layer_without_attention() -> None:
    config = hf.Qwen3NextConfig(
        vocab_size=97,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = hf.Qwen3NextForCausalLM(config).eval()
    refuse(model, MindSkipConfig(layers=(2, 3)), "layer 2", "linear_attn")


def test_models_with_parts_of_other_names() -> None:
    config = hf.BloomConfig(vocab_size=97, hidden_size=WIDTH, n_layer=2, n_head=4)
    refuse(hf.BloomForCausalLM(config), MindSkipConfig(), "'layers'", "dynadepth/architectures")


def test_models_without_weights() -> None:
    with torch.device("meta"):
        model = type(tiny("llama"))(tiny("llama").config)
    refuse(model, MindSkipConfig(), "meta device", "load them")


def test_modules_that_are_no_transformers_models() -> None:
    with pytest.raises(UnsupportedModelError, match="Linear is not a transformers PreTrainedModel"):
        dynadepth.attach(nn.Linear(2, 2), MindSkipConfig())
