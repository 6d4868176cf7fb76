"""Pretraining recipes: everything that a run from scratch (or a continued one) depends on, as strict YAML."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynadepth.errors import ConfigError
from dynadepth.methods import DepthConfig, config_from_dict
from dynadepth.recipe_files import at_least, checked, read_recipe

BYTES, BPE = "bytes", "bpe"


@dataclass(frozen=True)
class PretrainRecipe:
    """One pretraining run. The FLOP budget decides how many steps it takes, and the cosine schedule ends there."""

    name: str
    source: str
    """Where the settings come from."""
    model: dict[str, Any] = field(default_factory=dict)
    """Settings of the transformers configuration, `model_type` (default: `llama`) among them."""
    start: str = ""
    """A model folder or name whose weights and tokenizer are trained on; none: from scratch, as `model` says."""
    method: dict[str, Any] = field(default_factory=dict)
    """The routing method's name and settings: `mod`, or for a mixture of experts `mode-staged` or `mode-integrated`;
    none: nothing is routed."""
    flops: float = 1e13
    """Training budget, forward and backward, where the command line names none."""
    tokenizer: str = BPE
    """`bytes`, or `bpe`: byte-level pair encoding learnt on the training text."""
    vocab_size: int = 1024
    """Of `bpe`, with its one special token."""
    sequence_length: int = 256
    batch_size: int = 32
    """Sequences a step, over all processes and micro-batches."""
    gradient_accumulation: int = 1
    """Micro-batches that a step is made of."""
    learning_rate: float = 3e-3
    min_learning_rate: float = 0.1
    """Where the cosine ends, as a share of the learning rate."""
    warmup: float = 0.05
    """Share of the steps."""
    weight_decay: float = 0.1
    """Of matrices; norms, biases and router vectors have none."""
    beta2: float = 0.95
    gradient_clip: float = 1.0
    bf16: bool = False
    """Matrix products in bfloat16 (autocast), weights and optimiser in float32."""
    holdout: float = 0.05
    """Share of the text, its end, that validates where no text is marked or given for that."""
    validation_ids: tuple[str, ...] = ()
    """`id`s of the rows that validate, in tables; none: all rows whose `split` is `valid`. Rows so marked are never
    trained on."""
    validation_tokens: int = 65536
    """At most so many of the held-out tokens are scored, spread over them."""
    evaluations: int = 4
    """Times that the validation loss is measured, the last at the end."""
    checkpoints: int = 8
    """Checkpoints to resume from, evenly spaced, of which the last two are kept; 0: none."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokenizer not in (BYTES, BPE):
            raise ConfigError(f"tokenizer must be {BYTES} or {BPE}, not {self.tokenizer!r}.")
        names = ("batch_size", "gradient_accumulation", "evaluations", "validation_tokens")
        at_least(self, 1, names)
        at_least(self, 2, ("sequence_length",))
        at_least(self, 0, ("weight_decay", "gradient_clip", "checkpoints"))
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must be a whole number from 0 to {2**32 - 1}, not {self.seed}.")
        if self.tokenizer == BPE and self.vocab_size < 258:
            raise ConfigError(f"vocab_size must be at least 258 (all bytes, the end of a text, one merge), not "
                              f"{self.vocab_size}; or set tokenizer to bytes.")  # fmt: skip
        for name in ("flops", "learning_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be a number above 0, not {getattr(self, name)}.")
        for name in ("min_learning_rate", "warmup", "holdout", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}.")
        if self.batch_size % self.gradient_accumulation:
            raise ConfigError(
                f"batch_size {self.batch_size} is no multiple of gradient_accumulation {self.gradient_accumulation}."
            )
        if self.start and self.model:
            raise ConfigError(f"start {self.start!r} gives the model's shape: leave model out.")
        if not self.start and not self.model:
            raise ConfigError(f"Recipe {self.name!r} has neither a model to make nor one to start from.")
        self.depth_config()

    def depth_config(self) -> DepthConfig | None:
        """The method's configuration; None of a dense model. Raises ConfigError for what cannot be pretrained."""
        if not self.method:
            return None
        config = config_from_dict(self.method)
        if not config.trains_base:
            raise ConfigError(
                f"Method {config.name!r} tunes routers for a model that is finished (`dynadepth tune`); methods that "
                "train the model itself are pretrained: mod, mode-staged, mode-integrated."
            )
        return config

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def load_recipe(name_or_path: str | Path) -> PretrainRecipe:
    """A pretraining recipe by name or from a YAML file."""
    data, where = read_recipe(name_or_path, "pretraining")
    return PretrainRecipe(**checked(PretrainRecipe, data, where))
