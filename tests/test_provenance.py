"""Where a result comes from: everything is there, nothing heavy is imported, and only a checkout has a commit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dynadepth import provenance as module
from dynadepth.provenance import git_commit, provenance


def test_record_is_json_and_complete():
    record = json.loads(json.dumps(provenance(seed=3, dtype="torch.bfloat16", model={"name": "m", "fingerprint": "f"})))
    assert set(record) == {
        "dynadepth", "commit", "python", "torch", "transformers", "platform", "hardware", "seed", "dtype", "model",
        "command", "date",
    }  # fmt: skip
    assert record["seed"] == 3
    assert record["dtype"] == "bfloat16"
    assert record["model"] == {"name": "m", "fingerprint": "f"}
    assert record["torch"]
    assert record["transformers"]
    assert record["python"]
    assert set(record["hardware"]) == {"cpu", "cores", "threads", "memory_gb", "gpu"}
    assert record["hardware"]["cores"] >= 1
    assert record["date"].endswith("+00:00")


@pytest.mark.parametrize("program", ["/somewhere/bin/dynadepth", "/somewhere/dynadepth/__main__.py"])
def test_command_names_the_program_alone(monkeypatch, program):
    monkeypatch.setattr(sys, "argv", [program, "generate", "m", "--prompt", "two words"])
    assert provenance()["command"] == "dynadepth generate m --prompt 'two words'"
    assert provenance(command=["make", "x"])["command"] == "make x"


def test_importing_and_calling_it_loads_no_torch():
    code = "import sys; from dynadepth.provenance import provenance; provenance(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _git(folder: Path, *words: str) -> None:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True)


def test_commit_of_a_checkout_alone(tmp_path):
    assert git_commit(tmp_path) is None
    _git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("a")
    assert git_commit(tmp_path) is None  # some repository, but none of a Python project
    (tmp_path / "pyproject.toml").write_text("")
    assert git_commit(tmp_path) is None  # nothing committed yet
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-qm", "first")
    clean = git_commit(tmp_path)
    assert clean is not None
    assert len(clean) == 40
    (tmp_path / "untracked").write_text("")
    assert git_commit(tmp_path) == clean
    (tmp_path / "file").write_text("b")
    assert git_commit(tmp_path) == f"{clean}+changes"


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    (tmp_path / "pyproject.toml").write_text("")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit(tmp_path) is None


def test_without_proc_the_processor_is_still_named(monkeypatch):
    monkeypatch.setattr(module.Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(OSError()))
    monkeypatch.setattr(module.platform, "processor", lambda: "arm")
    assert module.hardware()["cpu"] == "arm"
