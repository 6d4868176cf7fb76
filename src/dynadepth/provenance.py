"""Where a result comes from: versions, commit, machine, command line. It stands beside every number that is written.

Nothing heavy is imported: versions are read from the packages' metadata, and only a torch that is loaded already is
asked about devices and threads.
"""

from __future__ import annotations

import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers")


def provenance(
    *,
    seed: int | None = None,
    dtype: object = None,
    model: Mapping[str, Any] | None = None,
    command: Sequence[str] | None = None,
) -> dict[str, Any]:
    """A JSON-ready record of this run; what cannot be known is None.

    `model`: its name and fingerprint, given by the caller. `dtype`: a torch dtype or its name. `command`: the words of
    the command line, by default those of this process, its program by name alone.
    """
    return {
        "dynadepth": dynadepth_version(),
        "commit": git_commit(Path(__file__).resolve().parents[2]),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "platform": platform.platform(terse=True),
        "hardware": hardware(),
        "seed": seed,
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "model": None if model is None else dict(model),
        "command": shlex.join(_command_line() if command is None else command),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def dynadepth_version() -> str | None:
    """The installed version; None where the package is used from a folder without being installed."""
    return _version("dynadepth")


def git_commit(checkout: Path) -> str | None:
    """The commit of a checkout of dynadepth, followed by `+changes` where tracked files differ from it.

    None where `checkout` is none (an installed package) or git does not answer.
    """
    if not (checkout / ".git").exists() or not (checkout / "pyproject.toml").is_file():
        return None
    commit = _git(checkout, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(checkout, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if changes else commit


def hardware() -> dict[str, Any]:
    """`cpu`, `cores` that this process may use, `threads` and `gpu` of a loaded torch, `memory_gb` of the machine."""
    torch = sys.modules.get("torch")
    gpu = None
    if torch is not None and torch.cuda.is_available():
        gpu = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": None if torch is None else torch.get_num_threads(),
        "memory_gb": _memory_gb(),
        "gpu": gpu,
    }


def _command_line() -> list[str]:
    program = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
    return ["dynadepth" if program == "__main__.py" else program, *sys.argv[1:]]


def _version(package: str) -> str | None:
    if (loaded := getattr(sys.modules.get(package), "__version__", None)) is not None:
        return str(loaded)  # names the build, too, where the metadata may not
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(checkout: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(checkout), *words], capture_output=True, text=True, check=False, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.partition(":")[0].strip() in ("model name", "Model"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or None


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, ValueError, OSError):
        return None


def finite(value: Any) -> Any:
    """`value` for JSON: every infinity and not-a-number replaced by None, in mappings and lists at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
