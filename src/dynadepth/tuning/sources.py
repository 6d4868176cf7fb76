"""Where tuning rows come from: JSON Lines files, gzipped or not, and `datasets` names. Knows nothing of columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dynadepth.errors import DataError, did_you_mean, user_path
from dynadepth.records import Row, numbered_rows

_FILE_SUFFIXES = (".jsonl", ".json", ".gz", ".csv", ".tsv", ".txt", ".parquet")


@dataclass(frozen=True)
class Table:
    """At least one row, and how to name each in a message."""

    name: str
    rows: Sequence[Row]
    lines: Sequence[int] | None = None
    """Line numbers of a file's rows, from 1. None: a data set, all of whose rows have the same columns."""

    def where(self, index: int) -> str:
        """`"Line 7 of train.jsonl"`."""
        return f"Row {index + 1} of {self.name}" if self.lines is None else f"Line {self.lines[index]} of {self.name}"


def open_table(source: str | Path) -> Table:
    """The rows of a JSON Lines file, or of the split `train` of a `datasets` name (`NAME`, `NAME:CONFIG`) or folder.

    A text that names no file and does not look like one is taken for a data set. Raises `DataError` where the source is
    missing, and as `numbered_rows` does.
    """
    path = user_path(source)
    if path.is_file():
        lines, rows = zip(*numbered_rows(path), strict=True)
        return Table(str(path), rows, lines)
    if path.is_dir():
        return _load_dataset(str(path))
    if isinstance(source, Path) or path.suffix in _FILE_SUFFIXES or source.startswith((".", "/", "~")):
        lost = "" if path.parent.is_dir() else f" The folder {path.parent} does not exist."
        raise DataError(f"There is no file {path}.{lost}{_near(path)}")
    return _load_dataset(str(source))


def _load_dataset(name: str) -> Table:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"There is no file {name!r}.{_near(Path(name))} To load it as a data set: pip install 'dynadepth[train]'."
        ) from error
    repository, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(repository, config or None, split="train")
    except Exception as error:  # the network and every builder have their own
        reason = " ".join(str(error).split()).rstrip(".")
        raise DataError(
            f"There is no file {name!r}.{_near(Path(name))} As a data set it could not be loaded either ({reason}): "
            "check the name and the network, or give a .jsonl file, or 'self', which needs no data."
        ) from error
    if not len(rows):
        raise DataError(f"The data set {name!r} is empty.")
    return Table(name, rows)


def _near(path: Path) -> str:
    folder = path.parent
    return did_you_mean(path.name, (entry.name for entry in folder.iterdir())) if folder.is_dir() else ""
