"""The command line in this process: what the fixtures `run` and `refused` hand out."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from dynadepth.cli import app


def invoke(*words: object) -> Result:
    """Exit code, stdout and stderr apart; unexpected exceptions are raised."""
    result = CliRunner().invoke(app, [str(word) for word in words], prog_name="dynadepth", env={"COLUMNS": "120"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refusal(*words: object) -> str:
    """Runs a command that must end as one sentence and exit code 2; returns the sentence."""
    result = invoke(*words)
    assert result.exit_code == 2, (result.exit_code, result.output)
    assert "Traceback" not in result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert result.stderr.rstrip().endswith(lines[0])
    return lines[0].removeprefix("error: ")
