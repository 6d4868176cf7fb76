"""The command line in this process, and saved models for it to work on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dynadepth.cli import app
from saved_model import save_model, save_routers


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="session")
def routers_folder(model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_routers(tmp_path_factory.mktemp("routers") / "routers", Path(model_folder)))


@pytest.fixture
def run() -> Callable[..., Result]:
    """`run("eval", folder, "--limit", 3)`: exit code, stdout and stderr apart; unexpected exceptions are raised."""

    def invoke(*words: object) -> Result:
        result = CliRunner().invoke(app, [str(word) for word in words], prog_name="dynadepth", env={"COLUMNS": "120"})
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


@pytest.fixture
def refused(run: Callable[..., Result]) -> Callable[..., str]:
    """Runs a command that must end as one sentence and exit code 2; returns the sentence."""

    def invoke(*words: object) -> str:
        result = run(*words)
        assert result.exit_code == 2, (result.exit_code, result.output)
        assert "Traceback" not in result.output
        assert result.stdout == ""
        lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, result.stderr
        assert result.stderr.rstrip().endswith(lines[0])
        return lines[0].removeprefix("error: ")

    return invoke


@pytest.fixture
def answered(run: Callable[..., Result], tmp_path: Path) -> Callable[..., tuple[dict[str, Any], Result]]:
    """Runs a command that must succeed with `--json`; returns the document and the result."""

    def invoke(*words: object) -> tuple[dict[str, Any], Result]:
        file = tmp_path / "out.json"
        result = run(*words, "--json", file)
        assert result.exit_code == 0, result.output
        assert not re.search(r"NaN|Infinity", file.read_text(encoding="utf-8"))
        return json.loads(file.read_text(encoding="utf-8")), result

    return invoke
