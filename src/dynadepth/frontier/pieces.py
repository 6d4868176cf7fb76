"""What is measured of a cell before it is whole: one file a text or task, and one each for kinds of prompt and sample
answers, in `DIR/pieces/NAME@BUDGET`, so that a killed run loses no more than one of them. They go when the cell is
written."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dynadepth.errors import DataError
from dynadepth.provenance import finite
from dynadepth.recipe_files import difference
from dynadepth.report.cells import FORMAT, PIECES, plain, read_json, write_json
from dynadepth.routed import is_attached, routing_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Pieces:
    """Those of one model as it stands: a cell's, or the part of a cell that stands for a share of the inputs."""

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        """`folder`: the cell's; `name`: the part's; `settings`: what the pieces depend on. Those made with others are
        made again."""
        self.folder, self.name, self.settings = folder, name, plain(settings)
        self.before = 0.0
        """Seconds that the pieces found took when they were measured."""

    def __call__(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = self.folder / f"{self.name} {name}.json"
        with suppress(DataError, KeyError, TypeError):  # missing or damaged
            found = read_json(path)
            if found["format"] == FORMAT and difference(found["settings"], self.settings) is None:
                piece, seconds = dict(found["piece"]), float(found["seconds"])
                self.before += seconds
                return piece
        started = time.monotonic()
        piece = measure()
        seconds = time.monotonic() - started
        if finite(piece) == piece:  # else it would be read back as something else
            write_json(path, {"format": FORMAT, "settings": self.settings, "seconds": seconds, "piece": piece})
        return piece


def state_of(model: PreTrainedModel) -> str:
    """Digest of what routes a model as it stands, of the numbers that were learnt, too."""
    if not is_attached(model):
        return "bare"
    routing = routing_of(model)
    digest = hashlib.sha256(json.dumps(plain({"config": routing.config.to_dict(), "budget": routing.budget})).encode())
    for name, tensor in sorted(routing.tensors().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def pieces_folder(out: Path, cell: str) -> Path:
    """Where the pieces of a cell are."""
    return out / PIECES / cell


def remove(folder: Path) -> None:
    """A cell's pieces, and the folder of all of them with the last."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # not there, or not empty
        folder.parent.rmdir()
