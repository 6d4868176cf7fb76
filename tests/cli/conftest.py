"""The command line in this process, and saved models for it to work on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from saved_model import save_model, save_routers


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="session")
def routers_folder(model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_routers(tmp_path_factory.mktemp("routers") / "routers", Path(model_folder)))


@pytest.fixture
def answered(run: Callable[..., Result], tmp_path: Path) -> Callable[..., tuple[dict[str, Any], Result]]:
    """Runs a command that must succeed with `--json`; returns the document and the result."""

    def answer(*words: object) -> tuple[dict[str, Any], Result]:
        file = tmp_path / "out.json"
        result = run(*words, "--json", file)
        assert result.exit_code == 0, result.output
        assert not re.search(r"NaN|Infinity", file.read_text(encoding="utf-8"))
        return json.loads(file.read_text(encoding="utf-8")), result

    return answer
