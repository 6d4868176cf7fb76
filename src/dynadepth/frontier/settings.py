"""What a frontier is asked for, and what a cell depends on: the same settings are the same cell, others an error."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynadepth.errors import BudgetError, ConfigError, user_path
from dynadepth.evaluation.files import read_text, with_window
from dynadepth.evaluation.perplexity import protocol
from dynadepth.report.cells import OWN

BUDGETS = (0.875, 0.75, 0.625, 0.5)


@dataclass(frozen=True)
class Settings:
    """One comparison. Texts and tasks as for `evaluation.evaluate`."""

    model: str
    methods: tuple[str, ...]
    budgets: tuple[float, ...] = BUDGETS
    perplexity: tuple[str, ...] = ()
    max_windows: int | None = None
    tasks: tuple[str, ...] = ()
    task_data: str | None = None
    limit: int | None = None
    data: str | None = None
    """Tuning data of every tuned method; None: the recipe's."""
    data_of: Mapping[str, str] = field(default_factory=dict)
    """Tuning data of single methods, by name."""
    max_samples: int | None = None
    seed: int = 0
    bench: bool = True
    context: int = 1024
    """Prompt length of the timing, in tokens."""
    new_tokens: int = 16
    repeats: int = 5
    answer_tokens: int = 48

    def __post_init__(self) -> None:
        for budget in self.budgets:
            if not 0 < budget <= 1:
                raise BudgetError(f"--budgets must be above 0 and at most 1, not {budget:g}.")
        if not self.budgets:
            raise BudgetError("--budgets must name at least one share, such as 0.75.")
        if not self.perplexity:
            raise ConfigError("A frontier needs at least one text for perplexity.")
        for name in ("max_windows", "limit", "max_samples", "context", "new_tokens", "repeats", "answer_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}.")
        for file in self.perplexity:
            protocol(with_window(file)[1])
        names = [Path(file).name for file in self.perplexity]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"two texts are called {twice[0]}: the results are told apart by the files' names.")

    def scored(self) -> dict[str, Any]:
        """What every cell's quality depends on, its method and model apart; texts are read, so that one that cannot
        be is said now."""
        return {
            "texts": {Path(file).name: _digest(read_text(file).encode()) for file in self.perplexity},
            "max_windows": self.max_windows,
            "tasks": {task: self._task_digest(task) for task in self.tasks},
            "limit": self.limit,
            "seed": self.seed,
            "answer_tokens": self.answer_tokens,
        }

    def timed(self) -> dict[str, Any]:
        """What a cell's times depend on."""
        return {"context": self.context, "new_tokens": self.new_tokens, "repeats": self.repeats}

    def _task_digest(self, task: str) -> str | None:
        """Of the task's file; None where it is no file of ours."""
        if self.task_data is None:
            return None
        from dynadepth.evaluation.tasks import task_files

        file = task_files(self.task_data).get(task)
        return None if file is None else _digest(file.read_bytes())


def source_facts(source: str) -> dict[str, Any]:
    """What a tuning data source is: its name and, of a file, its digest."""
    path = user_path(source)
    return {"name": path.name, "sha256": _digest(path.read_bytes())} if path.is_file() else {"name": source}


def parse_data(texts: list[str], known: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """`["self", "mindskip-paper=alpaca.jsonl"]` as the source of all methods and those of single ones."""
    common: str | None = None
    single: dict[str, str] = {}
    for text in texts:
        name, equals, source = text.partition("=")
        if equals and name in known and source:
            single[name] = source
        elif common is not None:
            raise ConfigError(
                f"--data names two sources for every method, {common!r} and {text!r}: write METHOD=SOURCE for one of "
                "a single method."
            )
        else:
            common = text
    return common, single


def parse_budgets(text: str) -> tuple[float, ...]:
    """`"0.75,0.5"` as numbers, each once, in their order."""
    budgets = []
    for part in text.split(","):
        try:
            budgets.append(float(f"{float(part):g}"))  # as cells are named by them
        except ValueError:
            raise BudgetError(
                f"--budgets takes shares above 0 and at most 1, separated by commas, such as 0.75,0.5; not {text!r}."
                f"{' A method without calibration keeps its own budget by itself.' if part.strip() == OWN else ''}"
            ) from None
    return tuple(dict.fromkeys(budgets))


def _digest(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()[:16]
