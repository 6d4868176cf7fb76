"""What the methods of a frontier share: the bare model, tuning data, importance scores, and routers tuned once.

Routers are tuned, and skip paths fitted, into `DIR/routers/NAME` and used again where their settings are the same; an
interrupted tuning goes on from its last checkpoint. What a run with other settings finished is never overwritten.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynadepth import adapter
from dynadepth.architectures import decoder_layers
from dynadepth.errors import AdapterError, ConfigError, DataError, NewerFormatError
from dynadepth.evaluation.scoring import DenseStates
from dynadepth.frontier.scores import read_scores, scores_path, write_scores
from dynadepth.frontier.settings import Settings, source_facts
from dynadepth.methods import StaticConfig
from dynadepth.model import attach, detach
from dynadepth.recipe_files import difference
from dynadepth.report.cells import ROUTERS, Cell, cell_name, plain
from dynadepth.report.stamp import model_facts, sign
from dynadepth.route_file import RouteFile
from dynadepth.routed import is_attached, routing_of
from dynadepth.routing.decision import Site
from dynadepth.tuning import Example, Recipe, examples_for, tune
from dynadepth.tuning.data import pad_token_id
from dynadepth.tuning.orders import scores_of
from dynadepth.tuning.start import fit_batches, fit_tokens, held_out, shares_of
from dynadepth.tuning.surrogate import fit_paths

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OF_TEXTS = ("max_samples", "max_length", "shuffle", "answer_tokens", "passages")
"""What of a recipe decides the texts that are tuned on."""


@dataclass
class Workbench:
    """One run's model and everything made from it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: Settings
    out: Path
    tell: Callable[[str], None] = lambda line: None
    """Takes news of long work."""
    say: Callable[[str], object] = lambda line: None
    """Takes what has to stay on the screen."""
    finished: dict[str, Cell] = field(default_factory=dict)
    """Cells by name."""
    routes: dict[str, RouteFile] = field(default_factory=dict)
    """Files of searched routes that were read, by path."""
    dense_states: DenseStates = field(default_factory=DenseStates)
    """What dense makes of the texts, for all cells."""
    _examples: dict[tuple[Any, ...], list[Example]] = field(default_factory=dict)
    _damaged: set[str] = field(default_factory=set)
    """Rows whose damaged routers were said."""

    @cached_property
    def n_layers(self) -> int:
        return len(decoder_layers(self.model))

    @cached_property
    def fingerprint(self) -> str:
        """Of the model's weights."""
        return str(model_facts(self.settings.model, self.model)["fingerprint"])

    def cell(self, row: str, budget: float | None) -> Cell:
        """A cell that is finished."""
        return self.finished[cell_name(row, budget)]

    def source(self, row: str, recipe: Recipe) -> str:
        """Where a method's tuning data comes from."""
        return self.settings.data_of.get(row) or self.settings.data or recipe.data

    def examples(self, row: str, recipe: Recipe) -> list[Example]:
        """The method's tuning data, read or written once."""
        source = self.source(row, recipe)
        key = (source, *(getattr(recipe, name) for name in OF_TEXTS))
        if key not in self._examples:
            try:
                self._examples[key] = examples_for(
                    source,
                    self.model,
                    self.tokenizer,
                    recipe,
                    max_samples=self.settings.max_samples,
                    seed=self.settings.seed,
                    cache_dir=self.out / "self-data",
                    progress=lambda done, total: self.tell(f"the model answers prompts to tune on: {done} of {total}"),
                )
            except DataError as error:
                raise DataError(
                    f"{error} (This is the tuning data of {row}: give another as --data {row}=FILE, or leave the "
                    "method out with --methods.)"
                ) from error
        return self._examples[key]

    def split(self, row: str, recipe: Recipe) -> tuple[list[Example], list[Example]]:
        """The method's held-out examples, and those that are tuned or fitted on."""
        examples = self.examples(row, recipe)
        held = held_out(recipe, len(examples), len(shares_of(recipe, recipe.budget)))
        return examples[:held], examples[held:]

    def scores(self, row: str, recipe: Recipe, target: str) -> dict[Site, float]:
        """1 − cosine importance of the target's sublayers, on the method's tuning data; measured once."""
        settings = plain({**self.text_settings(row, recipe), "cosine": target})
        own = scores_path(self.out, row)
        for path in (own, *sorted(own.parent.glob("*.json"))):
            with suppress(DataError):
                made, (scores,) = read_scores(path, "cosine")
                if made == settings:
                    return scores
        examples = self.examples(row, recipe)
        scores = scores_of(
            self.model,
            examples,
            pad_token_id(self.tokenizer),
            target,
            lambda done, total: self.tell(f"importance: {done} of {total}"),
        )
        write_scores(own, settings, {"cosine": scores}, self.settings.seed, self.model.dtype)
        return scores

    def tuning_settings(self, row: str, recipe: Recipe) -> dict[str, Any]:
        """What a method's routers depend on, as JSON."""
        return plain({"recipe": recipe.to_dict(), **self._sources(row, recipe)})

    def text_settings(self, row: str, recipe: Recipe) -> dict[str, Any]:
        """What is measured on a method's tuning data, without tuning, depends on, as JSON."""
        texts = {name: getattr(recipe, name) for name in (*OF_TEXTS, "holdout")}
        return plain({"texts": texts, **self._sources(row, recipe)})

    def _sources(self, row: str, recipe: Recipe) -> dict[str, Any]:
        return {
            "data": source_facts(self.source(row, recipe)),
            "max_samples": self.settings.max_samples,
            "seed": self.settings.seed,
            "model": self.fingerprint,
        }

    def is_tuned(self, row: str, recipe: Recipe) -> bool:
        """Are the method's routers finished? Raises `ConfigError` where they are, with other settings."""
        return self.is_made(row, self.tuning_settings(row, recipe))

    def is_made(self, row: str, settings: dict[str, Any]) -> bool:
        """Is what the method learnt finished? Raises `ConfigError` where it is, with other settings."""
        folder = self.out / ROUTERS / row
        try:
            made = adapter.read(folder)[0].get("provenance") or {}
        except NewerFormatError as error:
            raise ConfigError(f"{error} Or give another --out: they are not made again in their place.") from error
        except AdapterError as error:
            if (folder / adapter.CONFIG).exists() and row not in self._damaged:
                self._damaged.add(row)
                self.say(f"{error} They are made again.")
            return False
        if "frontier" not in made or "stopped" in made:
            return False
        if differs := difference(made["frontier"], settings):
            raise ConfigError(
                f"The routers in {folder} were made with other settings ({differs}): give another --out, or remove "
                "that folder and the method's cells."
            )
        return True

    def routers(self, row: str, recipe: Recipe) -> Path:
        """The folder of the method's routers, tuned now if need be."""
        folder = self.out / ROUTERS / row
        if self.is_tuned(row, recipe):
            return folder

        def progress(stage: str, done: int, total: int, figures: dict[str, float]) -> None:
            self.tell(f"{row}, {stage}: {done} of {total}" + "".join(f", {k} {v:.3f}" for k, v in figures.items()))

        examples = self.examples(row, recipe)
        try:
            tune(
                self.model, self.tokenizer, examples, recipe, out=folder, seed=self.settings.seed, progress=progress
            )  # fmt: skip
            routing_of(self.model).provenance["frontier"] = self.tuning_settings(row, recipe)
            sign(self.model, folder, self.settings.model, self.settings.seed)
        finally:
            if is_attached(self.model):
                detach(self.model)
            self.model.eval()
        return folder

    def fit_settings(self, row: str, recipe: Recipe, config: StaticConfig) -> dict[str, Any]:
        """What fitted skip paths depend on, as JSON."""
        fit = {"config": config.to_dict(), "tokens": fit_tokens(self.model)}
        return plain({**self.text_settings(row, recipe), "fit": fit})

    def is_fitted(self, row: str, recipe: Recipe, config: StaticConfig) -> bool:
        """Are the method's skip paths fitted? Raises `ConfigError` where they are, with other settings."""
        return self.is_made(row, self.fit_settings(row, recipe, config))

    def paths(self, row: str, recipe: Recipe, config: StaticConfig) -> Path:
        """The folder of skip paths fitted in closed form at every site of `config`, now if need be: on as many of the
        training texts as a tuning fits them on, and not tuned."""
        folder = self.out / ROUTERS / row
        if self.is_fitted(row, recipe, config):
            return folder
        texts = fit_batches(self.model, self.split(row, recipe)[1], pad_token_id(self.tokenizer))
        started = time.monotonic()
        attach(self.model, config)
        try:
            explained = fit_paths(
                self.model, texts, lambda done, total: self.tell(f"{row}, fitting skip paths: {done} of {total}")
            )
            routing = routing_of(self.model)
            for path in routing.paths().values():
                path.to(self.model.dtype)
            routing.provenance = {
                "frontier": self.fit_settings(row, recipe, config),
                "result": {
                    "seconds": time.monotonic() - started,
                    "steps": 0,
                    "n_trainable": sum(p.numel() for path in routing.paths().values() for p in path.parameters()),
                    "n_train": sum(len(batch["input_ids"]) for batch in texts),
                    "n_heldout": 0,
                    "explained": {str(site): share for site, share in explained.items()},
                },
            }
            sign(self.model, folder, self.settings.model, self.settings.seed)
        finally:
            detach(self.model)
        return folder
