"""Sampling from the dense model with random numbers of one's own: each text has its own stream of them.

`generate()` draws from torch's global generator, so a row's text would hang on its neighbours and on whatever ran
before; it would also follow the sampling settings in the model's generation config.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from dynadepth.model import disabled
from dynadepth.routing.roomy import make_roomy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


STAY = 0.75
"""Texts that ended leave the batch when this share of it goes on or less: taking rows out copies the cache."""


def sample(
    model: PreTrainedModel, prompts: list[list[int]], draws: Tensor, temperature: float, ends: set[int], pad: int
) -> list[list[int]]:
    """What the dense model writes behind B prompts, at most S tokens each, an id of `ends` being the last.

    `draws`: numbers in [0, 1), `[B, S]`, one for each token. Routing and dropout are off meanwhile.
    """
    width = max(map(len, prompts))
    tokens = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts], device=model.device)
    lengths = torch.tensor([[len(ids)] for ids in prompts], device=model.device)
    mask = (torch.arange(width, device=model.device) >= width - lengths).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    texts: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # those still in the batch
    going = set(rows)  # those whose text has not ended
    cache: Any = DynamicCache(config=model.config)
    make_roomy(cache)
    for step in range(draws.shape[1]):
        with _dense(model), torch.no_grad():
            outputs = model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        drawn = _draw(outputs.logits[:, -1], draws[rows, step], temperature)
        for row, token in zip(rows, drawn, strict=True):
            if row in going:
                texts[row].append(token)
                if token in ends:
                    going.remove(row)
        if not going:
            break
        if len(going) <= STAY * len(rows):
            stay = [i for i, row in enumerate(rows) if row in going]
            index = torch.tensor(stay, device=mask.device)
            cache.batch_select_indices(index)
            mask, positions = mask[index], positions[index]
            rows, drawn = [rows[i] for i in stay], [drawn[i] for i in stay]
        tokens = torch.tensor(drawn, device=mask.device).unsqueeze(1)
        mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
        positions = positions[:, -1:] + 1
    return texts


def _draw(logits: Tensor, uniforms: Tensor, temperature: float) -> list[int]:
    """One token a row of `[B, V]`, by inversion: the first whose cumulated probability exceeds the row's number."""
    mass = (logits.float() / temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
    levels = uniforms.to(mass).unsqueeze(1) * mass[:, -1:]
    return torch.searchsorted(mass, levels, right=True).clamp_(max=mass.shape[1] - 1).flatten().tolist()


def uniforms(digest: str, count: int) -> Tensor:
    """`count` numbers in [0, 1), the same on every machine."""
    return torch.rand(count, generator=torch.Generator().manual_seed(int(digest, 16) % 2**63))


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every id that ends a text: the model may know more than the tokenizer does."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = named if isinstance(named, (list, tuple)) else [named]
    return {i for i in (*several, tokenizer.eos_token_id) if isinstance(i, int)}


@contextmanager
def _dense(model: PreTrainedModel) -> Iterator[None]:
    """Without routing and dropout inside the block."""
    modes = [(module, module.training) for module in model.modules()] if model.training else []
    model.eval()
    try:
        with disabled(model):
            yield
    finally:
        for module, training in modes:
            module.training = training
