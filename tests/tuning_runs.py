"""A tiny model, examples and recipes: what the tests of tuning runs share."""

import dataclasses
import hashlib

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dynadepth.tuning import Example, Recipe


class Tokenizer:
    pad_token_id = 0
    eos_token_id = 1


RECIPE = Recipe(
    name="test",
    source="test",
    method={"method": "mindskip", "bias": True, "penalty": 0.0, "layers": "all"},
    objective="kl",
    init="importance",
    controller="quantile",
    learning_rate=0.02,
    bias_learning_rate=0.05,
    batch_size=4,
    epochs=2,
    save_steps=2,
    holdout=0.4,
)

LINEAR = dataclasses.replace(
    RECIPE, method={**RECIPE.method, "skip_path": "linear", "skip_rank": 4}, budgets=(0.75, 0.5), kl_share=0.5
)
STATIC = LINEAR.for_method("static")


def tiny(**sizes):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=sizes.get("num_key_value_heads", 2),
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    return model


def examples(n=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(n):
        length = int(torch.randint(8, 24, (1,), generator=generator))
        made.append(Example(torch.randint(2, 64, (length,), generator=generator).tolist(), length // 2))
    return made


def fingerprint(model):
    return {
        name: hashlib.sha256(p.detach().numpy().tobytes()).hexdigest()
        for name, p in model.named_parameters()
        if ".depth_" not in name
    }
