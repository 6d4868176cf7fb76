"""A finished frontier, made once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from runs import settings_for, write_data

from dynadepth import hub
from dynadepth.frontier.run import run_frontier
from saved_model import save_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def opened(model_folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer."""
    return hub.load_model(model_folder), hub.load_tokenizer(model_folder)


@pytest.fixture(scope="session")
def finished(model_folder: Path, data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run; to be copied, not changed."""
    out = tmp_path_factory.mktemp("frontier")
    model, tokenizer = hub.load_model(model_folder), hub.load_tokenizer(model_folder)
    run_frontier(model, tokenizer, settings_for(model_folder, data), out)
    return out


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "frontier"))


@pytest.fixture
def settings(model_folder, data):
    """Settings of these methods, without tasks."""

    def made(*methods, **changes):
        return settings_for(model_folder, data, methods=methods, **{"tasks": (), **changes})

    return made
