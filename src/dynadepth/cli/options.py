"""Arguments and options that several verbs share, and what their texts mean."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from dynadepth.errors import BudgetError, ConfigError

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="smollm2-135m, gemma3-270m, a model folder, or a Hugging Face hub id."),
]
Routers = Annotated[
    Path | None, typer.Option("--routers", metavar="DIR", help="Routers that `dynadepth tune` saved. Without: dense.")
]
Budget = Annotated[
    str | None,
    typer.Option("--budget", metavar="B", help="Share of all sublayers of the target that may execute, such as 0.75."),
]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the results to this file as JSON.")]
Dtype = Annotated[
    str, typer.Option("--dtype", metavar="NAME", help="auto (the checkpoint's), float32, bfloat16 or float16.")
]


def parse_budget(text: str | None) -> float | None:
    """A budget in (0, 1]; None stays None. Raises `BudgetError` for anything else, speed-ups included."""
    if text is None:
        return None
    if text.strip().lower().endswith(("x", "×")):
        raise BudgetError(
            f"A speed-up such as {text!r} is not supported as --budget yet: give the share of all sublayers of the "
            "target that may execute, such as 0.75."
        )
    try:
        budget = float(text)
    except ValueError:
        raise BudgetError(f"--budget must be a number above 0 and at most 1, such as 0.75, not {text!r}.") from None
    if not 0 < budget <= 1:
        raise BudgetError(f"--budget must be above 0 and at most 1, not {text}.")
    return budget


def parse_counts(text: str, option: str) -> list[int]:
    """`"1,8"` as whole numbers from 1, each once. Raises `ConfigError`."""
    counts = []
    for part in text.split(","):
        if not part.strip().isascii() or not part.strip().isdigit() or int(part) < 1:
            raise ConfigError(f"{option} takes whole numbers from 1, separated by commas, such as 1,8; not {text!r}.")
        counts.append(int(part))
    return list(dict.fromkeys(counts))


def parse_names(texts: list[str] | None) -> list[str]:
    """The names in `["a,b", "c"]`, each once."""
    return list(dict.fromkeys(name.strip() for text in texts or [] for name in text.split(",") if name.strip()))


def check_at_least_one(value: int | None, option: str) -> None:
    """Raises `ConfigError` below 1."""
    if value is not None and value < 1:
        raise ConfigError(f"{option} must be at least 1, not {value}.")


def check_output_file(path: Path | None) -> None:
    """Raises `ConfigError` where a result could not be written later: better now than after an hour."""
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: give the name of a file.")
    if not path.parent.is_dir():
        raise ConfigError(f"{path} cannot be written: there is no folder {path.parent}.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{path} cannot be written: permission denied.")


def check_output_folder(path: Path) -> None:
    """Makes the folder if need be; raises `ConfigError` where nothing could be written into it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"The folder {path} cannot be made: {error.strerror or error}.") from error
    if not os.access(path, os.W_OK):
        raise ConfigError(f"Nothing can be written into {path}: permission denied.")
