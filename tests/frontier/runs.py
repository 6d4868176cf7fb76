"""A frontier of a tiny model in memory: what its tests run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dynadepth.frontier.settings import Settings

METHODS, BUDGETS = ("static", "random"), (0.75, 0.5)
CELLS = ["dense@1", "random@0.5", "random@0.75", "static@0.5", "static@0.75"]


def write_data(folder: Path) -> dict[str, Any]:
    """A text, a task and tuning data in `folder`, as settings."""
    (folder / "text.txt").write_text("why is the sky blue and what is a class " * 700, encoding="utf-8")
    words = [(w, v) for w in ("sky", "class", "object", "function") for v in ("the", "a", "of")]
    rows: list[dict[str, Any]] = [
        {"prompt": f"why is the {w} {v}", "completion": " the sky is blue"} for w, v in words * 3
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "tasks").mkdir()
    rows = [{"query": f"what is {n}", "choices": ["blue", "sky", "the", "a"], "gold": n % 4} for n in range(4)]
    (folder / "tasks" / "alpha.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return {
        "perplexity": (str(folder / "text.txt"),),
        "max_windows": 2,
        "tasks": ("alpha",),
        "task_data": str(folder / "tasks"),
        "data": str(folder / "data.jsonl"),
    }


def settings_for(model: object, data: dict[str, Any], **changes: Any) -> Settings:
    """Two methods, two budgets, no timing."""
    values: dict[str, Any] = {
        "model": str(model), "methods": METHODS, "budgets": BUDGETS, "bench": False, "context": 16, "new_tokens": 2,
        "repeats": 1, "answer_tokens": 3, "max_samples": 30, **data,
    }  # fmt: skip
    return Settings(**(values | changes))


def forget_cells(out: Path) -> None:
    """What was measured besides stays."""
    for path in (out / "cells").iterdir():
        path.unlink()
