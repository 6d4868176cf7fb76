"""Two tiny random models, their routed forms, and padded prompts: what the tests of the mechanism share.

The weights are large enough for every sublayer to matter, so that a wrong row, mask or key shows in the logits, and
routers are random, so that rows take different routes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from dynadepth import MindSkipConfig, Site, attach, routing_of

VOCABULARY, WIDTH, LAYERS, WINDOW = 61, 16, 4, 4
ALL = tuple(range(LAYERS))
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
FAMILIES = ("llama", "gemma3")
KINDS = (("sequence", "project"), ("route", "project"), ("token", "project"), ("token", "drop"))
"""(granularity, kv_policy): every way of keeping keys and values."""


@cache
def _weights(family: str, seed: int) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    if family == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**COMMON))
    else:  # windows of 4 tokens in every second layer, four norms a layer
        types = ["sliding_attention", "full_attention"] * (LAYERS // 2)
        config = Gemma3TextConfig(**COMMON, sliding_window=WINDOW, layer_types=types, query_pre_attn_scalar=8)
        model = Gemma3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
            else:
                parameter.add_(noise, alpha=0.2)
    return model, model.state_dict()


def bare(family: str = "llama", seed: int = 0, **config: Any) -> Any:
    """A fresh float32 model in evaluation mode: always the same weights for one seed."""
    made, state = _weights(family, seed)
    model = type(made)._from_config(type(made.config)(**{**made.config.to_dict(), **config}))
    model.load_state_dict(state)
    return model.eval()


def paths(model: Any, seed: int = 11) -> Any:
    """Gives linear skip paths random weights of some size. Returns the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path in routing_of(model).paths().values():
            for parameter in path.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def scatter(model: Any, seed: int = 7, scale: float = 1.0) -> Any:
    """Gives the routers random weights, so that decisions differ between rows and tokens. Returns the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for router in routing_of(model).routers().values():
            for parameter in router.parameters():
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def routed(family: str = "llama", seed: int = 0, base: Any = None, **config: Any) -> Any:
    """A tiny model with MindSkip routers, random ones, at every layer."""
    values = {"layers": ALL, **config}
    return paths(scatter(attach(bare(family, seed) if base is None else base, MindSkipConfig(**values))))


def ids(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random ids without padding, int64 `[batch, length]`."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def ragged(lengths: Sequence[int], side: str = "left", seed: int = 0, total: int = 0) -> dict[str, Tensor]:
    """Random prompts of the given lengths, padded to the longest (or `total`): `input_ids`, `attention_mask`."""
    width = max(*lengths, total)
    source = ids(len(lengths), width, seed)
    place = torch.arange(width).expand(len(lengths), -1)
    count = torch.tensor(lengths)[:, None]
    mask = (place >= width - count) if side == "left" else (place < count)
    return {"input_ids": source.masked_fill(~mask, 0), "attention_mask": mask.long()}


def alone(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row of a padded batch, without its padding."""
    real = batch["attention_mask"][row].bool()
    return {name: value[row : row + 1, real] for name, value in batch.items()}


def mixed(rows: int) -> dict[Site, Tensor]:
    """Decisions for attention at every layer that differ by row and by layer; layer 0 is skipped by some, too."""
    return {Site(layer, "attention"): torch.tensor([(row + layer) % 3 != 0 for row in range(rows)]) for layer in ALL}


def checkpoint(model: Any, kwargs: dict[str, Any] | None) -> None:
    """Turns checkpointing of activations on with these arguments (None: off), under the name that the installed
    transformers has for it."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if kwargs is None:
        getattr(model, f"{name}_checkpointing_disable")()
    else:
        getattr(model, f"{name}_checkpointing_enable")(kwargs)
