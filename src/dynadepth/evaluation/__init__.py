"""Scoring: perplexity, divergence from the dense model, and tasks through lm-evaluation-harness.

`evaluate` does all of it and answers with what `dynadepth eval --json` writes, provenance apart. Tasks need the extra
`eval`; perplexity does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynadepth.architectures import positions_of
from dynadepth.errors import ConfigError, DataError
from dynadepth.evaluation.files import read_text, with_window
from dynadepth.evaluation.perplexity import Divergence, Perplexity, divergence, perplexity, protocol
from dynadepth.evaluation.scoring import DenseStates
from dynadepth.evaluation.spent import spending
from dynadepth.model import disabled
from dynadepth.routed import is_attached
from dynadepth.statistics import paired_bootstrap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dynadepth.evaluation.tasks import TaskResult

__all__ = ["Divergence", "Perplexity", "divergence", "evaluate", "paired_bootstrap", "perplexity", "read_text"]

_perplexity = perplexity  # `evaluate` has an argument of that name
Progress = Callable[[str], object]


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Iterable[str] = (),
    task_data: str | Path | None = None,
    limit: int | None = None,
    perplexity: Iterable[str | Path] = (),
    compare_dense: bool = False,
    batch_size: int = 8,
    max_windows: int | None = None,
    seed: int = 0,
    with_rows: bool = False,
    progress: Progress | None = None,
    dense_states: DenseStates | None = None,
) -> dict[str, Any]:
    """Scores a model as it stands: routed where routers are attached, else dense.

    `tasks`: stems of the files in `task_data`, or names of lm-evaluation-harness without it, or the bundled
    `questions`; `limit` takes their first rows. `perplexity`: text files, of which `max_windows` takes the first
    windows; `book.txt@4096` scores the last quarter of windows of 4,096 tokens. With `compare_dense` the dense model is
    scored on the same rows and tokens, which gives `dense`, `kl`, `agreement` and, per task, `diff_vs_dense` and
    `acc_diff_vs_dense`: 95 % paired bootstrap intervals (from `seed`) of the difference of the usual metric and of
    `acc`. `progress` is given a line after each batch, for a status line. A model without routers is its own dense
    model. `with_rows` adds the scores behind the means as `rows`, for paired comparisons: `tasks` (the usual metric of
    each row), `perplexity` (nats a token of each window) and, with `compare_dense`, `kl` of each window; and, as
    `spent`, what `Spent.joined` puts together where tasks and texts are scored one by one.
    `dense_states`, kept between calls for one model, saves the dense forwards over texts that an earlier call made.

    Returns the `eval` JSON but for its provenance; absent values are None. `keep_ratio` is that of the sequences read
    (prefill), `depth` their mean executions of the target's sublayers (repeats count twice), `flops_share` and
    `kv_share` those of the whole model, `flops_share_target` that of the target's sublayers with routers and skip
    paths, for sequences of their mean length.

    Raises `DataError` for files and names that cannot be scored, `ConfigError` where there is nothing to do.
    """
    names, files = list(tasks), [str(file) for file in perplexity]
    if not names and not files:
        raise ConfigError("there is nothing to score: name at least one task or one file for perplexity.")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}.")
    # Before anything slow, so that a bad name costs nothing.
    texts = {file: (read_text(file), protocol(with_window(file)[1])) for file in files}
    for file, (_, lengths) in texts.items():
        _check_positions(file, lengths, positions_of(model))
    suite = _Suite(model, tokenizer, names, task_data, batch_size, progress) if names else None

    compare = compare_dense and is_attached(model)
    measured: dict[str, Perplexity] = {}
    divergences: dict[str, Divergence] = {}
    with spending(model) as spent:
        results = suite.run(limit) if suite else {}
        for file, (text, lengths) in texts.items():
            options: dict[str, Any] = {
                **lengths,
                "batch_size": max(1, batch_size * 512 // lengths["window"]),  # windows are long
                "max_windows": max_windows,
                "progress": _said(progress, file),
            }
            try:
                if compare_dense:
                    divergences[file] = divergence(model, tokenizer, text, dense_states=dense_states, **options)
                    measured[file] = divergences[file].routed
                else:
                    measured[file] = _perplexity(model, tokenizer, text, **options)
            except DataError as error:
                raise DataError(f"{file}: {error}") from error
    out = _block(results, measured)
    out |= {"dense": None, "kl": None, "agreement": None}
    if compare_dense:
        dense = results
        if suite and compare:
            with disabled(model):
                dense = suite.run(limit)
        for name, result in results.items():
            for key, of in (("diff_vs_dense", "rows"), ("acc_diff_vs_dense", "acc_rows")):
                rows = getattr(result, of), getattr(dense[name], of)
                paired = len(rows[0]) == len(rows[1]) > 1
                out["tasks"][name][key] = list(paired_bootstrap(*rows, seed=seed)) if paired else None
        out["dense"] = _block(dense, {file: d.dense for file, d in divergences.items()})
        count = sum(d.n_tokens for d in divergences.values())
        if count:
            out["kl"] = sum(d.kl * d.n_tokens for d in divergences.values()) / count
            out["agreement"] = sum(d.agreement * d.n_tokens for d in divergences.values()) / count
    done = spent()
    if with_rows:
        out["rows"] = {
            "tasks": {name: list(result.rows) for name, result in results.items()},
            "perplexity": {file: list(figures.rows) for file, figures in measured.items()},
            "kl": {file: list(d.rows) for file, d in divergences.items()},
        }
        out["spent"] = asdict(done)
    return out | done.figures(model)


def _check_positions(file: str, lengths: Mapping[str, Any], positions: int | None) -> None:
    """Raises `DataError` where the file's name asks for windows that the model cannot read."""
    if lengths.get("exact") and positions is not None and lengths["window"] > positions:
        raise DataError(
            f"{file} asks for windows of {lengths['window']:,} tokens, and the model reads {positions:,}: ask for "
            f"@{positions}, or leave the text out."
        )


class _Suite:
    """The tasks, and the model wrapped for the harness: made once, run once a variant."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        names: list[str],
        data: str | Path | None,
        batch_size: int,
        progress: Progress | None,
    ) -> None:
        from dynadepth.evaluation.tasks import load_tasks, quietly

        self.tasks = load_tasks(names, data)
        from dynadepth.evaluation.lm_eval import DynadepthLM

        with quietly():
            self.lm = DynadepthLM(
                model,
                tokenizer=tokenizer,
                batch_size=batch_size,
                progress=_said(progress, ", ".join(names)),
                bars=False,
            )

    def run(self, limit: int | None) -> dict[str, TaskResult]:
        from dynadepth.evaluation.tasks import run_tasks

        return run_tasks(self.lm, self.tasks, limit)


def _block(results: Mapping[str, TaskResult], measured: Mapping[str, Perplexity]) -> dict[str, Any]:
    """The keys that routed and dense have in common."""
    values = [result.value for result in results.values() if result.value is not None]
    return {
        "tasks": {name: result.as_dict() for name, result in results.items()},
        "average": sum(values) / len(values) if values else None,
        "perplexity": {file: figures.as_dict() for file, figures in measured.items()},
    }


def _said(progress: Progress | None, what: str) -> Progress | None:
    return None if progress is None else lambda line: progress(f"{what}: {line}")
