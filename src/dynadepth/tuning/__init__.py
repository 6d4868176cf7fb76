"""Router-only tuning: data, objectives, recipes, and the trainer that puts them together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dynadepth.tuning.data import Collator, Example, load_examples
from dynadepth.tuning.recipe import Recipe, known_recipes, load_recipe
from dynadepth.tuning.self_data import plain_passages, self_examples
from dynadepth.tuning.trainer import RouterTrainer, TuneResult, tune

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
    """The recipe's number of examples from a file, a `datasets` name, or (`self`) from the dense model itself.

    With `self`, some are the model's answers to prompts and the recipe's share of `passages` is plain text that it
    writes, evenly among them: what is tuned on them also holds for longer text without a chat's frame.
    """
    count = recipe.max_samples if max_samples is None else max_samples
    if str(source) != "self":
        return load_examples(
            source, tokenizer, max_samples=count, max_length=recipe.max_length, seed=seed, shuffle=recipe.shuffle
        )
    n_plain = round(recipe.passages * count)

    def write(maker: Callable[..., list[Example]], n: int, before: int, length: int) -> list[Example]:
        if not n:
            return []
        return maker(
            model,
            tokenizer,
            n=n,
            max_new_tokens=length,
            seed=seed,
            progress=None if progress is None else lambda done, _: progress(before + done, count),
            cache_dir=cache_dir,
        )

    answers = write(self_examples, count - n_plain, 0, recipe.answer_tokens)
    passages = write(plain_passages, n_plain, len(answers), recipe.passage_tokens or recipe.answer_tokens)
    # in every part of the list as many of each as in the whole
    placed = [((i + 0.5) / len(part), e) for part in (answers, passages) for i, e in enumerate(part)]
    return [example for _, example in sorted(placed, key=lambda pair: pair[0])]
