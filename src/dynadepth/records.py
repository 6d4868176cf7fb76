"""Records on disk: JSON documents written whole or not at all, JSON Lines tables and plain text, gzipped or not."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dynadepth.adapter import atomically
from dynadepth.errors import ConfigError, DataError, check_file
from dynadepth.provenance import finite

TABLE_SUFFIXES = (".jsonl", ".jsonl.gz")
"""How the name of a file with one JSON object a line ends."""

GZIP_MAGIC = b"\x1f\x8b"

Row = dict[str, Any]


def is_table(path: str | Path) -> bool:
    """Whether the file's name says JSON Lines."""
    return str(path).endswith(TABLE_SUFFIXES)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Writes a whole file or none. Numbers that JSON does not have become null."""
    write_text(path, json.dumps(finite(document), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or none, in UTF-8. Raises `ConfigError` where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}.") from error


def read_json(path: Path) -> dict[str, Any]:
    """A file's object. Raises `DataError` for one that is missing or damaged."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} is missing.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged: {error}.") from error
    if not isinstance(document, dict):
        raise DataError(f"{path} is damaged: it holds no object.")
    return document


def plain(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document as it is read back: tuples become lists, keys texts."""
    result: dict[str, Any] = json.loads(json.dumps(finite(document)))
    return result


def read_rows(path: str | Path) -> list[Row]:
    """The objects of a JSON Lines file in their order, as `numbered_rows` reads them."""
    return [row for _, row in numbered_rows(path)]


def numbered_rows(path: str | Path) -> list[tuple[int, Row]]:
    """The objects of a JSON Lines file, gzipped or not, and the numbers of their lines from 1; blank lines are skipped.

    Raises `DataError` where the file is missing, unreadable, empty, or holds something else than an object at a line.
    """
    rows: list[tuple[int, Row]] = []
    for number, line in enumerate(read_lines(Path(path)), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # not JSON, an endless number, nested too deeply
            raise DataError(
                f"{path} is not JSON at line {number} ({error}): a JSON Lines file has one whole object on each line."
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"{path} has no JSON object at line {number} but {line.strip()[:40]!r}: a JSON Lines file has one "
                "whole object on each line."
            )
        if "\\u" in line:
            _check_text(path, number, row)
        rows.append((number, row))
    if not rows:
        raise DataError(f"{path} is empty: it needs one JSON object on each line.")
    return rows


def _check_text(path: str | Path, number: int, row: Row) -> None:
    """Raises `DataError` for half of a character, which JSON can write and no tokenizer can read."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{path} holds half of a character (a surrogate without its other half) at line {number}: write the whole "
            "character."
        ) from error


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a text file, gzipped where its name or its content says so; a byte order mark is dropped. Raises
    `DataError` as `numbered_rows` does."""
    check_file(path)
    number = 0
    try:
        with path.open("rb") as probe:
            packed = path.name.endswith(".gz") or probe.read(2) == GZIP_MAGIC
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(f"{path} is not UTF-8 at line {number} (byte {byte:#04x}): save it as UTF-8.") from error
    except (OSError, EOFError, zlib.error) as error:  # gzip raises all three: no gzip file, cut short, damaged inside
        raise DataError(f"{path} cannot be read beyond line {number}: {error}.") from error
