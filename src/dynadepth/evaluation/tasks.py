"""From names to scores: task files of a folder, the bundled questions, or tasks of lm-evaluation-harness.

All of them run through the harness. A local file becomes one of its tasks with the rows as its data set, so that
nothing is downloaded; formats.py says what the rows mean.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynadepth.errors import DataError, DynadepthError, did_you_mean
from dynadepth.evaluation.files import TABLE_SUFFIXES, Row, is_table, read_rows, stem
from dynadepth.evaluation.formats import format_of, usual_metric
from dynadepth.statistics import standard_error

QUESTIONS = Path(__file__).with_name("questions.jsonl")
"""The bundled task: 160 short questions of four choices, so that a machine without data can be shown something."""

FEWSHOT_SEED = 1234
"""The harness's own default; set before each run, so that every variant sees the same examples."""


@dataclass(frozen=True)
class TaskResult:
    """One task's scores. Accuracies are fractions; what a task does not have is None."""

    metric: str | None
    """The usual one: `acc` or `acc_norm`, or the harness's name of another where the task has no accuracy."""

    acc: float | None
    """Share of rows answered rightly; for generated answers by exact match."""

    acc_norm: float | None
    perplexity: float | None
    stderr: float | None
    """Standard error of the usual metric."""

    n: int
    """Rows scored."""

    rows: tuple[float, ...] = ()
    """The usual metric of each row, in the order of the rows: for paired comparisons."""

    acc_rows: tuple[float, ...] = ()
    """`acc` of each row, which is not the usual metric of every task."""

    @property
    def value(self) -> float | None:
        """The usual metric."""
        return {"acc": self.acc, "acc_norm": self.acc_norm}.get(self.metric or "")

    def as_dict(self) -> dict[str, Any]:
        """The fields of the JSON contract."""
        return {key: getattr(self, key) for key in ("metric", "acc", "acc_norm", "perplexity", "stderr", "n")}


@dataclass
class Tasks:
    """Tasks ready to run, any number of times."""

    leaves: dict[str, Any] = field(default_factory=dict)
    """The harness's `Task` of each name."""

    members: dict[str, list[str]] = field(default_factory=dict)
    """For each name asked for, the leaves it stands for: itself, or what a group such as `mmlu` holds."""


def missing_extra(error: ImportError) -> DynadepthError:
    """What to raise from an import of the extra `eval` that failed."""
    return DynadepthError(f"Scoring tasks needs lm-evaluation-harness ({error}): run `pip install 'dynadepth[eval]'`.")


def task_files(folder: str | Path) -> dict[str, Path]:
    """The JSON Lines files of a folder by task name. Raises `DataError` where there is no such folder or file."""
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"There is no task data folder {root}.")
    files = {stem(path): path for path in sorted(root.iterdir(), reverse=True) if path.is_file() and is_table(path)}
    if not files:
        raise DataError(f"The task data folder {root} holds no {' or '.join(TABLE_SUFFIXES)} file.")
    return files


def load_tasks(names: Iterable[str], data: str | Path | None = None) -> Tasks:
    """Builds the named tasks.

    With a folder `data`, names are those of its files without `.jsonl` or `.jsonl.gz`; without one, the harness's own
    (whose data comes from the Hugging Face hub). `questions` is bundled and always there. Raises `DataError` for names
    that do not exist (with the near ones) and for files that cannot be scored, `DynadepthError` without the extra
    `eval`.
    """
    try:
        import datasets  # noqa: F401
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise missing_extra(error) from error
    names = list(dict.fromkeys(names))
    local = {QUESTIONS.stem: QUESTIONS} | (task_files(data) if data is not None else {})
    foreign = [name for name in names if name not in local]
    if data is not None and foreign:
        known = ", ".join(sorted(local))
        raise DataError(
            f"There is no task {foreign[0]!r} in {data}.{did_you_mean(foreign[0], local)} (It has: {known}.)"
        )
    tasks = _load_from_harness(foreign) if foreign else Tasks()
    for name in names:
        if name in local:
            tasks.leaves[name] = _local_task(name, read_rows(local[name]))
            tasks.members[name] = [name]
    tasks.members = {name: tasks.members[name] for name in names}
    return tasks


def run_tasks(lm: Any, tasks: Tasks, limit: int | None = None) -> dict[str, TaskResult]:
    """Scores `lm` (a `DynadepthLM`, or any model of the harness) on the first `limit` rows of each task."""
    from lm_eval.evaluator import evaluate

    for task in tasks.leaves.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    with _without_bars():
        outcome = evaluate(lm, {"tasks": tasks.leaves}, limit=limit, bootstrap_iters=0, log_samples=True)
    assert outcome is not None, "only rank 0 has results"
    return {
        name: _summary(name, [row for leaf in leaves for row in _one_filter(outcome["samples"][leaf])], leaves, outcome)
        for name, leaves in tasks.members.items()
    }


def _local_task(name: str, rows: list[Row]) -> Any:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    format_ = format_of(name, rows)
    rows = [{key: row[key] for key in format_.fields} for row in rows]  # others may differ in type from row to row
    config = format_.config(name) | {"custom_dataset": lambda **_: {"test": Dataset.from_list(rows)}}
    with quietly():
        return ConfigurableTask(config=config)


def _load_from_harness(names: list[str]) -> Tasks:
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    for name in names:
        if name not in manager.all_tasks:
            near = did_you_mean(name, [QUESTIONS.stem, *manager.all_tasks])
            raise DataError(
                f"There is no task {name!r}.{near} (Tasks are those of lm-evaluation-harness, listed by `lm-eval ls "
                "tasks`, or the files of a folder given as --task-data.)"
            )
    tasks = Tasks()
    for name in names:
        try:
            loaded = manager.load([name])
        except OSError as error:  # what a missing network and a missing data set have in common
            cause = str(error).splitlines()[0].rstrip(".")
            raise DataError(
                f"The data of task {name!r} could not be loaded ({cause}): go online once, or give files as "
                "--task-data."
            ) from error
        tasks.leaves |= loaded["tasks"]
        tasks.members[name] = list(loaded["tasks"])
    return tasks


def _one_filter(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A sample is logged once a filter (GSM8K of the harness has two): the last one is the most forgiving."""
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    chosen = [sample for sample in samples if sample["filter"] == filters[-1]]
    return sorted(chosen, key=lambda sample: sample["doc_id"])


def _summary(name: str, samples: list[dict[str, Any]], leaves: list[str], outcome: Any) -> TaskResult:
    def column(*metrics: str) -> list[float] | None:
        for metric in metrics:
            if all(isinstance(sample.get(metric), (int, float)) for sample in samples):
                return [float(sample[metric]) for sample in samples]
        return None

    def mean(values: list[float] | None) -> float | None:
        return None if values is None else sum(values) / len(values)

    acc, acc_norm = column("acc", "exact_match"), column("acc_bytes", "acc_norm")
    metric: str | None = usual_metric(name)
    rows = acc_norm if metric == "acc_norm" else acc
    if rows is None:
        rows, metric = (acc, "acc") if acc is not None else (acc_norm, "acc_norm")
    perplexity = mean(column("perplexity"))  # the harness logs each row's log-likelihood under this name
    if rows is None:
        figures = {key.split(",")[0]: value for key, value in outcome["results"][leaves[0]].items() if "," in key}
        metric = next((key for key in figures if not key.endswith("_stderr")), None)
        if len(leaves) == 1 and isinstance(figures.get("word_perplexity"), float):
            return TaskResult("word_perplexity", None, None, figures["word_perplexity"], None, len(samples))
    return TaskResult(
        metric=metric,
        acc=mean(acc),
        acc_norm=mean(acc_norm),
        perplexity=None if perplexity is None else math.exp(-perplexity),
        stderr=None if rows is None else standard_error(rows),
        n=len(samples),
        rows=tuple(rows or ()),
        acc_rows=tuple(acc or ()),
    )


@contextmanager
def quietly() -> Iterator[None]:
    """Without the harness's advice on options that a caller of ours does not have."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without the harness's progress bar over the building of requests, which has no switch."""
    from lm_eval.api import task

    original = task.tqdm
    task.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        task.tqdm = original
