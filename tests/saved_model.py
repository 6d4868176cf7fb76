"""A tiny random Llama with a word-level tokenizer, saved as a folder, and routers for it: what commands are given."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import dynadepth
from dynadepth.budget import calibrate, prompts_to_batches

WORDS = [
    "the", "a", "of", "to", "and", "in", "is", "for", "it", "on", "why", "sky", "blue", "what", "who", "how", "are",
    "you", "give", "me", "three", "function", "Python", "object", "class",
]  # fmt: skip
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
N_LAYERS = 4


def save_model(folder: Path, **sizes: int) -> Path:
    """A model folder; `sizes` override the configuration's."""
    values = {
        "vocab_size": len(SPECIAL) + len(WORDS),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        **sizes,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**values, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    return folder


def attach_routers(model: PreTrainedModel) -> PreTrainedModel:
    """Random routers on every attention, calibrated on random prompts."""
    dynadepth.attach(model, dynadepth.MindSkipConfig(layers=tuple(range(N_LAYERS)), bias=True))
    generator = torch.Generator().manual_seed(1)
    for router in dynadepth.routing_of(model).routers().values():
        with torch.no_grad():
            router.weight.copy_(torch.randn(router.weight.shape, generator=generator))
    prompts = torch.randint(4, 20, (16, 12), generator=generator).tolist()
    calibrate(model, prompts_to_batches(prompts, 0, 16), keeps=(0.5, 0.75))
    dynadepth.set_budget(model, attention=0.5)
    return model


def save_routers(folder: Path, model_folder: Path, order: list[int] | None = None) -> Path:
    """Routers of `attach_routers` for the model in `model_folder`; `order` is that of a tuning result."""
    model = attach_routers(LlamaForCausalLM.from_pretrained(model_folder).eval())
    if order is not None:
        dynadepth.routing_of(model).provenance = {"result": {"order": order}}
    dynadepth.save(model, folder)
    return folder
