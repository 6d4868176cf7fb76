"""Data files in the few words of the saved tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WORDS = ["sky", "blue", "the", "Python", "object", "class", "why", "you", "me", "three", "of", "on"]


def choices(n: int, shift: int = 0) -> list[dict[str, Any]]:
    """Questions of three options, no two alike."""
    rows = []
    for number in range(n):
        word = [WORDS[(number * 5 + 3 * at + shift) % len(WORDS)] for at in range(7)]
        query = " ".join(["what", "is", *word[: 2 + number % 3], f"{'for ' * (number // 12)}in"])
        options = [f"{word[4]} {word[5]}", word[6], f"the {word[3]}{' of' * (number % 3)}"]
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
