"""What is measured of a cell before it is whole: one file a text or task, in `DIR/pieces/NAME@BUDGET`, so that a killed
run loses no more than one of them. They go when the cell is written."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dynadepth.errors import DataError
from dynadepth.recipe_files import difference
from dynadepth.report.cells import FORMAT, PIECES, plain, read_json, write_json


class Pieces:
    """Those of one model as it stands: a cell's, or the part of a cell that stands for a share of the inputs."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], part: int) -> None:
        """`folder`: the cell's; `settings`: what the pieces depend on. Those made with others are made again."""
        self.folder, self.settings, self.part = folder, plain({**settings, "part": part}), part
        self.before = 0.0
        """Seconds that the pieces found took when they were measured."""

    def __call__(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = self.folder / f"{self.part} {name}.json"
        with suppress(DataError):  # missing or damaged
            found = read_json(path)
            if found.get("format") == FORMAT and difference(found.get("settings") or {}, self.settings) is None:
                self.before += found["seconds"]
                return dict(found["piece"])
        started = time.monotonic()
        piece = measure()
        seconds = time.monotonic() - started
        write_json(path, {"format": FORMAT, "settings": self.settings, "seconds": seconds, "piece": piece})
        return piece


def pieces_folder(out: Path, cell: str) -> Path:
    """Where the pieces of a cell are."""
    return out / PIECES / cell


def remove(folder: Path) -> None:
    """A cell's pieces, and the folder of all of them with the last."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # not there, or not empty
        folder.parent.rmdir()
