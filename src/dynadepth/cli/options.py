"""Arguments and options that several verbs share, and what their texts mean."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
    typer.Option(
        "--budget",
        metavar="B|Sx",
        help="Share of all sublayers of the target that may execute, such as 0.75; or a speed-up over the dense model "
        "on this machine, such as 1.3x (of 1,024 + 64 tokens) or 1.3x@2048+64.",
    ),
]
Control = Annotated[
    float | None,
    typer.Option(
        "--control",
        metavar="P",
        help="Shift the routers' choice: from -1 (skip nothing) over 0 (their own) to 1 (skip everything).",
    ),
]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the results to this file as JSON.")]
Dtype = Annotated[
    str, typer.Option("--dtype", metavar="NAME", help="auto (the checkpoint's), float32, bfloat16 or float16.")
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Compile the decode (`dynadepth.compile`): the first tokens take a minute or so more, the others half "
        "the time. `bench` compiles every model but one, the dense one as transformers runs it.",
    ),
]


SPEED = re.compile(r"(?P<times>[^@]*)[x×](@(?P<context>[1-9]\d*)\+(?P<new_tokens>[1-9]\d*))?", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Speed:
    """A budget asked for as a speed-up, `times` as fast as dense, still to be solved; `str()` is what was written."""

    text: str
    times: float
    workload: dict[str, int] = field(default_factory=dict)
    """`context` and `new_tokens`, where they were written."""

    def __str__(self) -> str:
        return self.text


def parse_budget(text: str | None) -> float | Speed | None:
    """A budget in (0, 1], or a speed-up of at least 1; None stays None. Raises `BudgetError` for anything else."""
    if text is None:
        return None
    speed = SPEED.fullmatch(text.strip())
    try:
        value = float(text if speed is None else speed["times"])
    except ValueError:
        raise BudgetError(
            "--budget must be a number above 0 and at most 1, such as 0.75, or a speed-up, such as 1.3x or "
            f"1.3x@2048+64 (prompt + new tokens), not {text!r}."
        ) from None
    if speed is None:
        if not 0 < value <= 1:
            raise BudgetError(f"--budget must be above 0 and at most 1, not {text}; a speed-up is written 1.3x.")
        return value
    if not 1 <= value < math.inf:
        raise BudgetError(f"--budget must be a speed-up of at least 1x, such as 1.3x, not {text}.")
    workload = {name: int(speed[name]) for name in ("context", "new_tokens") if speed[name]}
    return Speed(text.strip(), value, workload)


def parse_counts(text: str, option: str) -> list[int]:
    """`"1,8"` as whole numbers from 1, each once. Raises `ConfigError`."""
    counts = []
    for part in text.split(","):
        if not part.strip().isascii() or not part.strip().isdigit() or int(part) < 1:
            raise ConfigError(f"{option} takes whole numbers from 1, separated by commas, such as 1,8; not {text!r}.")
        counts.append(int(part))
    return list(dict.fromkeys(counts))


def parse_names(texts: list[str] | None, option: str) -> list[str]:
    """The names in `["a,b", "c"]`, each once; none where the option was not given. Raises `ConfigError` where it names
    nothing."""
    names = list(dict.fromkeys(name.strip() for text in texts or [] for name in text.split(",") if name.strip()))
    if texts and not names:
        raise ConfigError(f"{option} {','.join(texts)!r} names nothing: give one name or more, or leave it out.")
    return names


def check_at_least(value: int | None, option: str, least: int = 1) -> None:
    """Raises `ConfigError` below `least`."""
    if value is not None and value < least:
        raise ConfigError(f"{option} must be at least {least}, not {value}.")


def check_seed(seed: int) -> None:
    """Raises `ConfigError` for what random number generators do not take."""
    if not 0 <= seed < 2**32:
        raise ConfigError(f"--seed must be a whole number from 0 to {2**32 - 1}, not {seed}.")


def check_output_file(
    path: Path | None, others: Mapping[str, Sequence[Path]] | None = None, option: str = "--json"
) -> None:
    """Raises `ConfigError` where a result could not be written later: better now than after an hour.

    `others`: files of the other options, which `path` must not replace; `option`: the one that names `path`.
    """
    if path is None:
        return
    for other, files in (others or {}).items():
        if any(_same_file(path, file) for file in files):
            raise ConfigError(f"{option} {path} would replace a file of {other}: give another name.")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: give the name of a file.")
    if path.exists() and not path.is_file():
        raise ConfigError(
            f"{path} is no file but a device or a pipe: give the name of a file, which is made or replaced."
        )
    folder = path.resolve().parent  # of a link: where the file is
    if not folder.is_dir():
        raise ConfigError(
            f"{path} cannot be written: there is no folder {folder if path.is_symlink() else path.parent}."
        )
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise ConfigError(f"{path} cannot be written: permission denied.")


def _same_file(one: Path, two: Path) -> bool:
    """By whatever name, links included; of a file that is not there yet, by its place."""
    if one.exists() and two.exists():
        return one.samefile(two)
    return one.resolve() == two.resolve()


ROUTER_FILES = ("routing_config.json", "routers.safetensors", "adapter_config.json", "adapter_model.safetensors")
"""Names of the files of saved routers, and of a LoRA beside them."""


def saved_routers(folder: Path | None) -> list[Path]:
    """The files that make a folder one of saved routers, there or not."""
    return [] if folder is None else [folder / name for name in ROUTER_FILES]


def check_output_folder(path: Path) -> None:
    """Makes the folder if need be; raises `ConfigError` where nothing could be written into it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"The folder {path} cannot be made: {error.strerror or error}.") from error
    if not os.access(path, os.W_OK):
        raise ConfigError(f"Nothing can be written into {path}: permission denied.")
