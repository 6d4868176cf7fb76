"""A saved tiny model, and data files in its few words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saved_model import save_model

WORDS = ["sky", "blue", "the", "Python", "object", "class", "why", "you", "me", "three", "of", "on"]


def choices(n: int, shift: int = 0) -> list[dict[str, Any]]:
    """Questions of three options, no two alike."""
    rows = []
    for number in range(n):
        word = [WORDS[(number * 5 + 3 * at + shift) % len(WORDS)] for at in range(7)]
        query = " ".join(["what", "is", *word[: 2 + number % 3], f"{'for ' * (number // 12)}in"])
        options = [f"{word[4]} {word[5]}", word[6], f"the {word[3]}"]
        rows.append({"id": f"q{number}", "query": query, "choices": options, "gold": number % 3})
    return rows


def shorts(n: int) -> list[dict[str, Any]]:
    """Questions whose answers hold marked results."""
    rows = []
    for number in range(n):
        one, two, three = (WORDS[(number * 7 + at) % len(WORDS)] for at in (0, 2, 5))
        answer = f"{one} is <<{one}={two}>>{two} and <<a={three}>>{three} of it\n#### {three}"
        rows.append({"id": f"s{number}", "question": f"how {one} {two} ?", "answer": answer, "final": three})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def arc(tmp_path: Path) -> Callable[..., Path]:
    """A multiple-choice file of n questions, whose name asks for the format of ARC."""
    return lambda n=6, name="arc_tiny.jsonl": write_rows(tmp_path / name, choices(n))
