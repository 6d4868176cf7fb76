"""A saved tiny model, and a data file for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from search_data import choices, write_rows

from saved_model import save_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def arc(tmp_path: Path) -> Callable[..., Path]:
    """A multiple-choice file of n questions, whose name asks for the format of ARC."""
    return lambda n=6, name="arc_tiny.jsonl": write_rows(tmp_path / name, choices(n))
