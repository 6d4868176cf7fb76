"""A tiny recipe and a text: what the tests of pretraining share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from dynadepth.pretraining import PretrainRecipe

SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
DENSE = PretrainRecipe(
    name="tiny",
    source="test",
    model=SHAPE,
    tokenizer="bytes",
    sequence_length=16,
    batch_size=4,
    learning_rate=0.01,
    evaluations=2,
    checkpoints=3,
    validation_tokens=256,
)
MOD = replace(DENSE, name="tiny-mod", method={"method": "mod", "capacity": 0.25, "predictor_width": 4})
STEP = 64 * (3 * (2 * 16 * 257 + 4 * (2 * (4 * 16 * 16 + 3 * 16 * 24) + 4 * 16 * 16)))
"""FLOPs of a step of the dense recipe, by hand: 64 tokens; head, and per layer weights, then scores with 16 keys."""

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "that",
    "the",
    "dog",
    "ran",
    "off",
    "with",
    "all",
    "of",
    "her",
    "fish",
]


def write_text(folder: Path, n: int = 600, name: str = "text.txt") -> Path:
    """A text of `n` words."""
    path = folder / name
    path.write_text(" ".join(WORDS[(i * i + i // 7) % len(WORDS)] for i in range(n)), encoding="utf-8")
    return path


def to_yaml(recipe: PretrainRecipe, path: Path, **changes: Any) -> Path:
    """The recipe as a file for the command line."""
    import yaml

    values = {k: list(v) if isinstance(v, tuple) else v for k, v in replace(recipe, **changes).to_dict().items()}
    path.write_text(yaml.safe_dump({"kind": "pretraining", **values}), encoding="utf-8")
    return path
