"""Reading what is scored: JSON Lines tables and plain text, gzipped or not, with errors that name the line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dynadepth.errors import DataError, did_you_mean

TABLE_SUFFIXES = (".jsonl", ".jsonl.gz")
"""How the name of a file with one JSON object a line ends."""

Row = dict[str, Any]


def is_table(path: str | Path) -> bool:
    """Whether the file's name says JSON Lines."""
    return str(path).endswith(TABLE_SUFFIXES)


def stem(path: str | Path) -> str:
    """The file's name without `.jsonl` or `.jsonl.gz`: the name of the task in it."""
    name = Path(path).name
    for suffix in sorted(TABLE_SUFFIXES, key=len, reverse=True):
        if name.endswith(suffix):
            return name[: -len(suffix)]
    return name


def read_rows(path: str | Path) -> list[Row]:
    """The objects of a `.jsonl` or `.jsonl.gz` file in their order; blank lines are skipped.

    Raises `DataError` where the file is missing, unreadable, empty, or holds something else than an object at a line.
    """
    rows: list[Row] = []
    for number, line in enumerate(_lines(Path(path)), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} is not JSON at line {number}: {error.msg}.") from error
        if not isinstance(row, dict):
            raise DataError(f"{path} holds no JSON object at line {number} but {line.strip()[:40]!r}.")
        rows.append(row)
    if not rows:
        raise DataError(f"{path} is empty: it needs one JSON object a line.")
    return rows


def with_window(name: str | Path) -> tuple[Path, int | None]:
    """`book.txt@4096` as the file and the length of its windows in tokens; None where the name gives none.

    A file that is called so itself is that file.
    """
    path, at, number = str(name).rpartition("@")
    if not at or not (number.isascii() and number.isdigit()) or Path(name).is_file():
        return Path(name), None
    return Path(path), int(number)


def read_text(name: str | Path) -> str:
    """The text of a file, for perplexity; what `with_window` takes off the name is not looked at.

    A JSON Lines file gives its rows' `text` fields, joined without a separator in the order of their `id`s (in the
    file's order where a row has none): a corpus cut into articles is put together again. Anything else is plain
    UTF-8, gzipped where the name ends in `.gz`. Raises `DataError` as `read_rows` does, and where no text is found.
    """
    path, _ = with_window(name)
    if not is_table(path):
        text = "".join(_lines(Path(path)))
    else:
        rows = read_rows(path)
        for number, row in enumerate(rows, start=1):
            if not isinstance(row.get("text"), str):
                raise DataError(f"Row {number} of {path} has no text field 'text' but {', '.join(map(repr, row))}.")
        if all(isinstance(row.get("id"), (str, int)) for row in rows) and len({type(row["id"]) for row in rows}) == 1:
            rows.sort(key=lambda row: row["id"])
        text = "".join(row["text"] for row in rows)
    if not text.strip():
        raise DataError(f"{path} is empty: there is no text to score.")
    return text


def _lines(path: Path) -> Iterator[str]:
    if not path.is_file():
        near = did_you_mean(path.name, (p.name for p in path.parent.iterdir()) if path.parent.is_dir() else ())
        raise DataError(f"There is no file {path}.{near}")
    try:
        if path.name.endswith(".gz"):
            with gzip.open(path, "rt", encoding="utf-8", newline="") as packed:
                yield from packed
        else:
            with path.open(encoding="utf-8", newline="") as plain:
                yield from plain
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text ({error.reason} at byte {error.start}).") from error
    except (OSError, EOFError, zlib.error) as error:  # gzip raises all three: bad header, cut short, damaged inside
        raise DataError(f"{path} could not be read: {error}.") from error
