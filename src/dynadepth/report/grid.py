"""A grid of latency cells on disk: written after every point, and gone on with where it was interrupted.

The document has `cells` and `provenance`; what the run was asked for stands in `provenance["bench"]`. Cells are only
added to those of the same model, routers, settings, versions and machine: other times cannot be compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dynadepth.errors import DataError
from dynadepth.provenance import PACKAGES, finite
from dynadepth.recipe_files import difference

Cell = dict[str, Any]
SAME = ("bench", "model", "routers", "dtype", "dynadepth", "commit", *PACKAGES, "hardware")
"""What two runs must have in common for their cells to stand in one table."""


def resumed(path: Path, provenance: Mapping[str, Any]) -> list[Cell]:
    """The cells that `path` holds of the same run; none where there is no such file.

    Raises `DataError` for a file that is no such document or that another run wrote.
    """
    if not path.exists():
        return []
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        cells, before = list(document["cells"]), document["provenance"]
        points(cells)
        wanted = json.loads(json.dumps(finite({name: provenance[name] for name in SAME})))
        differs = difference({name: before.get(name) for name in SAME}, wanted)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} holds no cells of a benchmark ({error!r}): give another --json, or no --resume."
        ) from error
    if differs:
        raise DataError(
            f"{path} is of another run ({differs}): give another --json, or no --resume to measure all of it anew."
        )
    return cells


def points(cells: Iterable[Cell]) -> set[tuple[int, int]]:
    """(batch, context) of every point that is finished."""
    return {(int(cell["batch"]), int(cell["context"])) for cell in cells}


def in_order(cells: Iterable[Cell]) -> list[Cell]:
    """By batch and context, whatever was measured first; else as they come."""
    return sorted(cells, key=lambda cell: (cell["batch"], cell["context"]))
