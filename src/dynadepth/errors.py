"""Errors a user can meet. Each message is one clear sentence: the offending value, and the way out.

The command line turns every `DynadepthError` into that sentence and exit code 2; anything else is a bug and
keeps its traceback. All are `ValueError`s, so library users need no import to catch them.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path


class DynadepthError(ValueError):
    """Base of every error raised for something the user can change."""


class ConfigError(DynadepthError):
    """A configuration value is out of range, unknown, or contradicts another."""


class UnsupportedModelError(DynadepthError):
    """The model's architecture cannot be routed as asked; the message says what was tried and why it failed."""


class UnsupportedCacheError(DynadepthError):
    """This generation mode or cache cannot hold routed state; the message names one that can."""


class AdapterError(DynadepthError):
    """Saved routers are missing, damaged, from a newer format, or made for another model."""


class NewerFormatError(AdapterError):
    """Saved routers are of a format that only newer versions read: they are whole, and not to be overwritten."""


class DataError(DynadepthError):
    """A data file is missing, empty, malformed at a line, or has no known columns."""


class BudgetError(DynadepthError):
    """A budget is outside (0, 1] or beyond what the routed sites can reach."""


class TuningError(DynadepthError):
    """Tuning cannot go on (the loss turned NaN, no sample fits, ...); the last good state is kept."""


class SearchError(DynadepthError):
    """A search for routes cannot go on; the prompts that were finished are in its file."""


class ModelNotFoundError(DynadepthError):
    """A model name, folder or hub id cannot be resolved, or a download does not match its checksum."""


def did_you_mean(value: str, known: Iterable[str], n: int = 3) -> str:
    """`" Did you mean 'x' or 'y'?"` for the known names nearest to `value`, or `""` where none is near."""
    near = difflib.get_close_matches(str(value), list(known), n=n, cutoff=0.5)
    if not near:
        return ""
    return " Did you mean " + " or ".join(repr(name) for name in near) + "?"


def user_path(name: str | Path) -> Path:
    """The path with its `~` expanded. Raises `ConfigError` where there is no such user's home."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{str(name)!r} names no home folder ({str(error).rstrip('.')}): write the path out."
        ) from error


def check_file(path: Path, what: str = "file") -> None:
    """Raises `DataError` for a folder, and where there is nothing, naming files that are called nearly so."""
    if path.is_dir():
        raise DataError(f"{path} is a folder: give a file.")
    if not path.is_file():
        near = did_you_mean(path.name, (p.name for p in path.parent.iterdir()) if path.parent.is_dir() else ())
        raise DataError(f"There is no {what} {path}.{near}")
