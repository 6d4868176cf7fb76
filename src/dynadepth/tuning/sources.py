"""Where tuning rows come from: JSON Lines files, gzipped or not, and `datasets` names. Knows nothing of columns."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynadepth.errors import DataError, did_you_mean

Row = dict[str, Any]

_FILE_SUFFIXES = (".jsonl", ".json", ".gz", ".csv", ".tsv", ".txt", ".parquet")
_GZIP_MAGIC = b"\x1f\x8b"


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

    A text that names no file and does not look like one is taken for a data set. Blank lines are skipped, and gzip is
    known by its content too. Raises `DataError` where the source is missing, damaged, empty, not UTF-8 or not one JSON
    object on each line.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        return _load_dataset(str(path))
    if isinstance(source, Path) or path.suffix in _FILE_SUFFIXES or source.startswith((".", "/", "~")):
        lost = "" if path.parent.is_dir() else f" The folder {path.parent} does not exist."
        raise DataError(f"There is no file {path}.{lost}{_near(path)}")
    return _load_dataset(str(source))


def _read_file(path: Path) -> Table:
    rows: list[Row] = []
    lines: list[int] = []
    number = 0
    try:
        with path.open("rb") as probe:
            packed = path.suffix == ".gz" or probe.read(2) == _GZIP_MAGIC
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if raw.strip():
                    rows.append(_parse(raw, number, path))
                    lines.append(number)
    except (OSError, EOFError, zlib.error) as error:  # gzip raises all three: no gzip file, cut short, damaged inside
        raise DataError(f"{path} cannot be read beyond line {number}: {error}.") from error
    if not rows:
        raise DataError(f"{path} is empty: it needs one JSON object on each line.")
    return Table(str(path), rows, lines)


def _parse(raw: bytes, number: int, path: Path) -> Row:
    try:
        row = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(f"{path} is not UTF-8 at line {number} (byte {byte:#04x}): save it as UTF-8.") from error
    except (ValueError, RecursionError) as error:  # not JSON, an endless number, nested too deeply
        raise DataError(
            f"{path} is not JSON at line {number} ({error}): a JSON Lines file has one whole object on each line."
        ) from error
    if not isinstance(row, dict):
        raise DataError(
            f"{path} has no JSON object at line {number} but a {type(row).__name__}: "
            "a JSON Lines file has one whole object on each line."
        )
    return row


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
