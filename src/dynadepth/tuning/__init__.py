"""Router-only tuning: data, objectives, recipes, and the trainer that puts them together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dynadepth.architectures import positions_of
from dynadepth.routed import unwrapped
from dynadepth.tuning.data import Collator, Example, load_examples
from dynadepth.tuning.recipe import Recipe, known_recipes, load_recipe
from dynadepth.tuning.run import TuneResult, tune
from dynadepth.tuning.self_data import plain_passages, self_examples
from dynadepth.tuning.trainer import RouterTrainer

__all__ = [
    "Collator",
    "Example",
    "Recipe",
    "RouterTrainer",
    "TuneResult",
    "examples_for",
    "known_recipes",
    "load_examples",
    "load_recipe",
    "self_examples",
    "tune",
]


def examples_for(
    source: str | Path,
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    *,
    max_samples: int | None = None,
    seed: int = 0,
    cache_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Example]:
    """The recipe's number of examples from a file, a `datasets` name, or (`self`) from the dense model itself, none
    longer than the recipe's `max_length`, or than the model reads.

    With `self`, the recipe's share of `passages` ships with the package, as many as there are, and the rest are the
    model's own answers to prompts, evenly among them.
    """
    count = recipe.max_samples if max_samples is None else max_samples
    length = min(recipe.max_length, positions_of(unwrapped(model)) or recipe.max_length)
    if str(source) != "self":
        return load_examples(source, tokenizer, max_samples=count, max_length=length, seed=seed, shuffle=recipe.shuffle)
    n_plain = round(recipe.passages * count)
    plain = plain_passages(tokenizer, n=n_plain, max_length=length, seed=seed) if n_plain else []
    answers: list[Example] = []
    if len(plain) < count:
        answers = self_examples(
            model,
            tokenizer,
            n=count - len(plain),
            max_new_tokens=recipe.answer_tokens,
            seed=seed,
            progress=progress,
            cache_dir=cache_dir,
            max_length=length,
        )
    # in every part of the list as many of each as in the whole
    placed = [((i + 0.5) / len(part), e) for part in (answers, plain) for i, e in enumerate(part)]
    return [example for _, example in sorted(placed, key=lambda pair: pair[0])]
