"""Reading what is scored: JSON Lines tables and plain text, gzipped or not, with errors that name the line."""

from __future__ import annotations

from pathlib import Path

from dynadepth.errors import DataError
from dynadepth.records import TABLE_SUFFIXES, Row, is_table, read_lines, read_rows

__all__ = ["TABLE_SUFFIXES", "Row", "is_table", "read_rows", "read_text", "stem", "with_window"]


def stem(path: str | Path) -> str:
    """The file's name without `.jsonl` or `.jsonl.gz`: the name of the task in it."""
    name = Path(path).name
    for suffix in sorted(TABLE_SUFFIXES, key=len, reverse=True):
        if name.endswith(suffix):
            return name[: -len(suffix)]
    return name


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
        text = "".join(read_lines(Path(path)))
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
