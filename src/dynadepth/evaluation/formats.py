"""What a row of a task file means: the zero-shot prompt, what is scored, and which figure is the task's usual one.

A file's format is recognised by the fields of its rows; where fields alone cannot tell (ARC and HellaSwag have the
same), its name can. Each format becomes a config of lm-evaluation-harness, whose prompts and metrics these are. The
score of a choice is the summed log-probability of `" " + choice` after the prompt; `acc_norm` divides it by the
choice's length in bytes (the harness's `acc_bytes`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dynadepth.errors import DataError
from dynadepth.evaluation.files import Row

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

NORMALISED = frozenset(("arc", "hellaswag", "openbookqa", "piqa"))
"""Tasks with one of these words in their name are usually reported by `acc_norm`."""

BARE_QUERY = frozenset(("hellaswag", "openbookqa"))
"""Tasks with one of these words in their name are prompted with the query alone, without `Question:` and `Answer:`."""


@dataclass(frozen=True)
class Format:
    """How rows with certain fields are scored."""

    fields: frozenset[str]
    """Fields that a row of this format has; the format with the most matching fields wins."""

    output_type: str
    """`multiple_choice`, `loglikelihood` or `generate_until`, as the harness calls them."""

    text: Callable[[Row], Any]
    """The prompt; for WinoGrande the gold index, which is how the harness marks options that differ in context."""

    target: Callable[[Row], Any]
    """The gold index, the text to be scored, or the answer."""

    choices: Callable[[Row], list[str]] | None = None

    def config(self, name: str) -> dict[str, Any]:
        """The harness's task config, without its data set."""
        config: dict[str, Any] = {
            "task": name,
            "test_split": "test",
            "output_type": self.output_type,
            "doc_to_text": self.text,
            "doc_to_target": self.target,
            "metric_list": [_mean(metric) for metric in self.metrics],
            "num_fewshot": 0,
        }
        if self.choices is not None:
            config["doc_to_choice"] = self.choices
        if self.output_type == "loglikelihood":
            config["metric_list"].append(
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
            )
        if self.output_type == "generate_until":
            config |= _LAST_NUMBER
        return config

    @property
    def metrics(self) -> tuple[str, ...]:
        """The harness's metrics that are means over rows."""
        if self.output_type == "generate_until":
            return ("exact_match",)
        # The harness would normalise by the options, which for WinoGrande are the contexts and not what is scored.
        normalised = self.output_type == "multiple_choice" and "context_options" not in self.fields
        return ("acc", "acc_bytes") if normalised else ("acc",)


def _mean(metric: str) -> dict[str, Any]:
    config: dict[str, Any] = {"metric": metric, "aggregation": "mean", "higher_is_better": True}
    if metric == "exact_match":
        config |= {"ignore_case": True, "regexes_to_ignore": [",", r"\$", r"\.$"]}
    return config


# The last number of the answer, as the harness's own gsm8k reads it under "flexible-extract".
_LAST_NUMBER: dict[str, Any] = {
    "generation_kwargs": {"until": ["Question:", "</s>", "<|im_end|>"], "do_sample": False, "max_gen_toks": 256},
    "filter_list": [
        {
            "name": "last-number",
            "filter": [
                {"function": "regex", "group_select": -1, "regex_pattern": r"(-?[$0-9.,]{2,})|(-?[0-9]+)"},
                {"function": "take_first"},
            ],
        }
    ],
}


def _gold(row: Row) -> int:
    return int(row["gold"])


def _lettered(row: Row) -> str:
    options = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, row["choices"], strict=False))
    return f"{row['query']}\n{options}Answer:"


def _choice(fields: str, text: Callable[[Row], Any], choices: Callable[[Row], list[str]]) -> Format:
    return Format(frozenset(fields.split()), "multiple_choice", text, _gold, choices)


QUESTION = _choice("query choices gold", lambda row: f"Question: {row['query']}\nAnswer:", lambda row: row["choices"])
QUERY = _choice("query choices gold", lambda row: row["query"], lambda row: row["choices"])

FORMATS = (
    QUESTION,
    _choice(  # MMLU
        "subject query choices gold", _lettered, lambda row: list(LETTERS[: len(row["choices"])])
    ),
    _choice(  # BoolQ
        "passage question choices gold",
        lambda row: f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:",
        lambda row: row["choices"],
    ),
    _choice(  # RTE
        "premise hypothesis choices gold",
        lambda row: f"{row['premise']}\nQuestion: {row['hypothesis']} True or False?\nAnswer:",
        lambda row: row["choices"],
    ),
    Format(  # WinoGrande
        frozenset(("context_options", "continuation", "gold")),
        "multiple_choice",
        _gold,
        lambda row: row["continuation"],
        lambda row: row["context_options"],
    ),
    Format(  # LAMBADA
        frozenset(("context", "continuation")),
        "loglikelihood",
        lambda row: row["context"],
        lambda row: " " + row["continuation"],
    ),
    Format(  # GSM8K
        frozenset(("question", "answer", "final")),
        "generate_until",
        lambda row: f"Question: {row['question']}\nAnswer:",
        lambda row: row["final"],
    ),
)


def usual_metric(name: str) -> str:
    """`acc_norm` for ARC, HellaSwag, OpenBookQA and PIQA, else `acc`."""
    return "acc_norm" if _words(name) & NORMALISED else "acc"


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", name.lower()))


def format_of(name: str, rows: list[Row]) -> Format:
    """The format of a file's rows, all of them checked.

    Raises `DataError` where the first row's fields are those of no format, or a row breaks its format.
    """
    fields = set(rows[0])
    known = [format_ for format_ in FORMATS if format_.fields <= fields]
    if not known:
        hint = " It holds plain text: score it as --perplexity FILE." if "text" in fields else ""
        shapes = "; ".join(" ".join(sorted(format_.fields)) for format_ in FORMATS)
        raise DataError(f"{name!r} has the fields {', '.join(rows[0])}, which no task has.{hint} Known: {shapes}.")
    best = max(known, key=lambda format_: len(format_.fields))
    if best is QUESTION and _words(name) & BARE_QUERY:
        best = QUERY
    for number, row in enumerate(rows, start=1):
        if problem := _problem(best, row):
            raise DataError(f"Row {number} of {name!r} {problem}.")
    return best


def _problem(format_: Format, row: Row) -> str | None:
    """What is wrong with a row, as the end of a sentence."""
    if missing := format_.fields - set(row):
        return f"has no field {', '.join(sorted(missing))}"
    choosing = format_.output_type == "multiple_choice"
    for field in sorted(format_.fields - {"choices", "context_options", "gold"}):
        if not isinstance(row[field], str) or not (row[field] or choosing):
            return f"needs text in the field {field!r}, not {row[field]!r}"
    if not choosing:
        return None
    choices = row["context_options" if "context_options" in format_.fields else "choices"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        return f"needs two or more texts to choose from, not {choices!r}"
    if not isinstance(row["gold"], int) or not 0 <= row["gold"] < len(choices):
        return f"has gold = {row['gold']!r}, which is no index of its {len(choices)} choices"
    return None
