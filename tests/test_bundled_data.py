"""The two data files that ship inside the package: tuning prompts and questions."""

from __future__ import annotations

import json
from collections import Counter
from importlib.resources import files
from typing import Any

import pytest


def _rows(*parts: str) -> list[dict[str, Any]]:
    resource = files("dynadepth")
    for part in parts:
        resource = resource / part
    # Split on "\n" only: str.splitlines would also split on U+2028 and the like.
    lines = resource.read_text(encoding="utf-8").split("\n")
    assert lines[-1] == "", "the file must end with a newline"
    return [json.loads(line) for line in lines[:-1]]


@pytest.fixture(scope="module")
def prompts() -> list[dict[str, Any]]:
    return _rows("tuning", "self_prompts.jsonl")


@pytest.fixture(scope="module")
def questions() -> list[dict[str, Any]]:
    return _rows("evaluation", "questions.jsonl")


def _key(text: str) -> str:
    return " ".join(text.casefold().split())


def _is_clean(value: Any) -> bool:
    return isinstance(value, str) and value != "" and value == value.strip()


def test_prompt_schema(prompts: list[dict[str, Any]]) -> None:
    for row in prompts:
        assert set(row) == {"id", "domain", "prompt"}, row
        assert all(_is_clean(value) for value in row.values()), row


def test_prompt_counts(prompts: list[dict[str, Any]]) -> None:
    assert len(prompts) >= 200
    assert len({row["domain"] for row in prompts}) >= 20


def test_prompts_are_unique(prompts: list[dict[str, Any]]) -> None:
    assert len({row["id"] for row in prompts}) == len(prompts)
    assert len({_key(row["prompt"]) for row in prompts}) == len(prompts)


def test_prompt_lengths_vary(prompts: list[dict[str, Any]]) -> None:
    lengths = [len(row["prompt"].split()) for row in prompts]
    classes = (
        sum(n <= 20 for n in lengths),
        sum(20 < n < 60 for n in lengths),
        sum(n >= 60 for n in lengths),
    )
    assert min(classes) >= 0.25 * len(prompts), classes


def test_question_schema(questions: list[dict[str, Any]]) -> None:
    for row in questions:
        assert set(row) == {"id", "topic", "query", "choices", "gold"}, row
        assert all(_is_clean(row[name]) for name in ("id", "topic", "query")), row
        assert isinstance(row["choices"], list), row
        assert all(_is_clean(choice) for choice in row["choices"]), row


def test_question_counts(questions: list[dict[str, Any]]) -> None:
    assert len(questions) >= 120


def test_questions_are_unique(questions: list[dict[str, Any]]) -> None:
    assert len({row["id"] for row in questions}) == len(questions)
    assert len({_key(row["query"]) for row in questions}) == len(questions)


def test_four_distinct_choices(questions: list[dict[str, Any]]) -> None:
    for row in questions:
        assert len(row["choices"]) == 4, row
        assert len({_key(choice) for choice in row["choices"]}) == 4, row


def test_gold_in_range_and_balanced(questions: list[dict[str, Any]]) -> None:
    for row in questions:
        assert type(row["gold"]) is int, row
        assert 0 <= row["gold"] <= 3, row
    counts = Counter(row["gold"] for row in questions)
    assert set(counts) == {0, 1, 2, 3}
    assert max(counts.values()) <= 0.35 * len(questions), counts
