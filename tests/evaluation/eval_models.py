"""Tiny models in memory, a byte-level tokenizer without a file, and routers that decide by content."""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from dynadepth import MindSkipConfig, attach, routing_of

EOS, BOS = 256, 257
VOCABULARY = 258


def make_tokenizer(adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte; `adds_bos` as Gemma's does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)} | {"<eos>": EOS, "<bos>": BOS}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>" if adds_bos else None, pad_token="<eos>"
    )


def make_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Four layers, float32; weights large enough for distinct predictions."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes))).eval()


def route_by_content(model: PreTrainedModel, granularity: str = "sequence", layers: tuple[int, ...] = (1, 2, 3)) -> Any:
    """Attaches routers with random weights, so that inputs get different routes."""
    attach(model, MindSkipConfig(target="attention", granularity=granularity, layers=layers, kv_policy="project"))
    generator = torch.Generator().manual_seed(1)
    for router in routing_of(model).routers().values():
        router.weight.data = torch.randn(router.weight.shape, generator=generator)
    return model
