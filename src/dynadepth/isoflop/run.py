"""Runs a study, or what is left of it.

    DIR/cells/CELL.json   one finished run: settings, losses, FLOPs, times, provenance
    DIR/isoflop.json      the recipe and the table
    DIR/corpus            tokenizer and packed tokens of all cells
    DIR/work/CELL         checkpoints of the cell at work; removed behind it, kept where its loss was no number

A cell whose file is there, made with the same settings, is used as it is; one of other settings is an error that names
the difference, before anything is trained. Nothing is remembered beside the files.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dynadepth.benchmark.timing import Work, measure, median, spread
from dynadepth.errors import ConfigError, DataError, DynadepthError, TuningError
from dynadepth.isoflop.recipe import Cell, IsoflopRecipe
from dynadepth.isoflop.table import headline, summary
from dynadepth.pretraining.corpus import Corpus, load, prepare
from dynadepth.pretraining.recipe import PretrainRecipe
from dynadepth.pretraining.run import build, planned, train
from dynadepth.provenance import provenance
from dynadepth.recipe_files import checked, difference
from dynadepth.records import plain, read_json, write_json

FORMAT = 1
CELLS, SUMMARY, CORPUS, WORK = "cells", "isoflop.json", "corpus", "work"
NEW_TOKENS = 8
"""Decoded in the timing, after a context of the rest of a window."""
DETAIL_SECONDS = 1.0
"""Between two lines about a cell's steps."""
KEPT_LOSSES = 200
"""Training losses kept of a cell, each the mean of its share of the steps."""

Findings = dict[Cell, dict[str, Any]]


@dataclass
class Teller:
    """Where progress goes: `say(line)` once a cell, `detail(line)` as often as there is news."""

    say: Callable[[str], object] = lambda line: None
    detail: Callable[[str], object] = lambda line: None


def run_isoflop(
    recipe: IsoflopRecipe, files: Sequence[Path], out: Path, *, valid: Sequence[Path] = (), teller: Teller | None = None
) -> Findings:
    """Trains every cell that `out` does not hold yet and returns all of them.

    Without files the corpus that `out` holds is used. Raises ConfigError for cells made with other settings and for
    budgets below one step, DataError for texts that cannot be used, all before the first cell. A run whose loss turns
    NaN is a cell without losses, which says so.
    """
    teller = teller or Teller()
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ConfigError(f"A study runs in one process, not in {processes}: leave accelerate launch to pretrain.")
    first = recipe.pretraining(next(iter(recipe.cells())))
    corpus = (
        prepare(first, files, valid, out / CORPUS, teller.detail) if files or valid else load(out / CORPUS, first.start)
    )
    corpus.check_size(first.sequence_length, first.batch_size)
    study = _Study(recipe, corpus, out, teller)
    study.collect(list(recipe.cells()))
    study.check(list(recipe.cells()))
    study.work_off(list(recipe.cells()))
    repeats = recipe.repeated(study.losses())
    study.collect(repeats)
    study.work_off(repeats)
    return study.found


class _Study:
    def __init__(self, recipe: IsoflopRecipe, corpus: Corpus, out: Path, teller: Teller) -> None:
        self.recipe, self.corpus, self.out, self.teller = recipe, corpus, out, teller
        self.found: Findings = {}

    def settings(self, cell: Cell) -> dict[str, Any]:
        return plain({"recipe": self.recipe.pretraining(cell).to_dict(), "corpus": self.corpus.facts})

    def collect(self, cells: Sequence[Cell]) -> None:
        """Takes in the finished ones."""
        for cell in cells:
            path = self.out / CELLS / f"{cell.name}.json"
            if not path.exists():
                continue
            try:
                document = read_cell(path)
            except DataError as error:
                self.teller.say(f"{error} It is trained again.")
                continue
            if differs := difference(document["settings"], self.settings(cell)):
                raise ConfigError(
                    f"{path} was made with other settings ({differs}): give another --out, or remove that file to "
                    "have it trained again."
                )
            self.found[cell] = document

    def check(self, cells: Sequence[Cell]) -> None:
        """Makes the models of what is left without training them: what cannot be trained is said now."""
        for cell in cells:
            if cell not in self.found:
                own = self.recipe.pretraining(cell)
                try:
                    planned(build(own, self.corpus), own, self.corpus, cell.budget)
                except DynadepthError as error:
                    raise ConfigError(f"{cell.name} cannot be trained: {error}") from error

    def losses(self) -> dict[Cell, float]:
        return {cell: headline(found) for cell, found in self.found.items() if "failed" not in found}

    def work_off(self, cells: Sequence[Cell]) -> None:
        """Trains those that are not finished."""
        for number, cell in enumerate(cells, start=1):
            if cell in self.found:
                continue
            place = f"[{number}/{len(cells)}] {cell.name}"
            left = [c for c in cells if c not in self.found]
            document = plain(self._measure(cell, place, left))
            write_json(self.out / CELLS / f"{cell.name}.json", document)
            if "failed" not in document:  # whose message may name the last good model
                shutil.rmtree(self.out / WORK / cell.name, ignore_errors=True)
            self.found[cell] = document
            self._write_summary()
            self.teller.say(f"{place}: {_told(document)}{self._time_left(left[1:])}")
        self._write_summary()

    def _measure(self, cell: Cell, place: str, left: Sequence[Cell]) -> dict[str, Any]:
        recipe, work = self.recipe.pretraining(cell), self.out / WORK / cell.name
        self._fresh_unless_same(work, cell)
        model = build(recipe, self.corpus)
        plan = planned(model, recipe, self.corpus, cell.budget)
        last = time.monotonic()

        def tell(stage: str, done: int, total: int, figures: dict[str, float]) -> None:
            nonlocal last
            if time.monotonic() - last >= DETAIL_SECONDS or done == total:
                last = time.monotonic()
                self.teller.detail(
                    f"{place}: step {done} of {total}, loss {figures['loss']:.3f}{self._time_left(left, done / total)}"
                )

        document = {
            "format": FORMAT,
            **asdict(cell),
            "settings": self.settings(cell),
            "provenance": provenance(seed=cell.seed, dtype=model.dtype),
        }
        try:
            result = train(model, self.corpus, recipe, plan, work, progress=tell)
        except TuningError as error:
            return {**document, "failed": str(error)}
        measured = asdict(result)
        measured["losses"] = _thinned(measured["losses"])
        self.teller.detail(f"{place}: timing")
        return {**document, **measured, "timing": self._timed(model, cell)}

    def _fresh_unless_same(self, work: Path, cell: Cell) -> None:
        """Removes what a run of other settings left half done."""
        note, wanted = work / "settings.json", self.settings(cell)
        if work.exists() and (not note.is_file() or read_json(note) != wanted):
            shutil.rmtree(work)
        write_json(note, wanted)

    def _timed(self, model: PreTrainedModel, cell: Cell) -> dict[str, Any]:
        """Times as fast as the dense model of the same size, and as that of the reference size, in turns."""
        recipe = self.recipe
        models = {
            "cell": model.eval(),
            "own": _dense(recipe.dense(cell.size), self.corpus),
            "reference": _dense(recipe.dense(recipe.reference_size), self.corpus),
        }
        length = recipe.pretraining(cell).sequence_length
        ids = torch.from_numpy(self.corpus.windows(length, recipe.time_rows * length))
        new = min(NEW_TOKENS, length // 2)
        samples = measure(models, Work(ids, length - new), repeats=recipe.time_repeats)
        found: dict[str, Any] = {"rows": len(ids), "context": length - new, "reference": recipe.reference_size}
        for part in ("prefill", "decode"):
            times = {name: getattr(sample, part) for name, sample in samples.items()}
            for against in ("own", "reference"):
                ratios = [dense / mine for mine, dense in zip(times["cell"], times[against], strict=True)]
                found[f"{part} against {against}"] = {"times": median(ratios), "spread": spread(ratios)}
        kept = {name: sample.kv_bytes["decode"] for name, sample in samples.items()}
        return {**found, "kv share": kept["cell"] / kept["own"]}

    def _time_left(self, left: Sequence[Cell], done: float = 0.0) -> str:
        """From how long finished cells took for their FLOPs; the first of `left` is `done` by that share."""
        took = [found for found in self.found.values() if "failed" not in found]
        flops = sum(cell.budget for cell in left) - done * (left[0].budget if left else 0.0)
        if not took or not left:
            return ""
        seconds = flops * sum(f["seconds"] for f in took) / sum(f["flops"] for f in took)
        return f"; about {max(1, round(seconds / 60))} min left"

    def _write_summary(self) -> None:
        write_json(
            self.out / SUMMARY,
            {
                "format": FORMAT,
                "recipe": self.recipe.to_dict(),
                "corpus": self.corpus.facts,
                "summary": summary(self.found),
                "provenance": provenance(),
            },
        )


def read_cell(path: Path) -> dict[str, Any]:
    """A cell's document. Raises DataError for a file that is none."""
    document = read_json(path)
    if document.get("format") != FORMAT:
        raise DataError(f"{path} has format {document.get('format')!r}, this version reads {FORMAT}.")
    parts: dict[str, type] = {"settings": dict}
    if "failed" not in document:
        parts |= {"valid": dict, "plan": dict, "timing": dict, "flops": int}
    for name, kind in parts.items():
        if not isinstance(document.get(name), kind):
            raise DataError(f"{path} is damaged: it has no {name!r}.")
    return document


def read_study(out: Path) -> tuple[IsoflopRecipe, Findings]:
    """The recipe and the finished cells of a folder. Raises DataError where there is none."""
    document = read_json(out / SUMMARY)
    try:
        recipe = IsoflopRecipe(**checked(IsoflopRecipe, document["recipe"], str(out / SUMMARY)))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{out / SUMMARY} is damaged: it has no recipe ({error!r}).") from error
    found = {}
    for path in sorted((out / CELLS).glob("*.json")):
        cell = read_cell(path)
        found[Cell(cell["budget"], cell["size"], cell["variant"], cell["seed"])] = cell
    return recipe, found


def _dense(recipe: PretrainRecipe, corpus: Corpus) -> PreTrainedModel:
    return build(recipe, corpus).eval()


def _thinned(losses: list[float]) -> list[float]:
    """At most `KEPT_LOSSES` of them, each the mean of as many steps."""
    width = -(-len(losses) // KEPT_LOSSES)
    return [round(sum(part) / len(part), 4) for i in range(0, len(losses), width) if (part := losses[i : i + width])]


def _told(document: dict[str, Any]) -> str:
    if "failed" in document:
        return f"failed ({document['failed']})"
    return f"loss {headline(document):.4f}, {document['steps']} steps, {document['seconds']:.0f} s"
