"""What an interrupted run goes on from: its start, measured and fitted once, and its last checkpoint.

Both are in the run's `checkpoints` folder, and are used where they were made for the same model with the same settings
and data; others, and what a kill left half written, are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from dynadepth import adapter
from dynadepth.architectures import decoder_layers
from dynadepth.errors import AdapterError, DataError
from dynadepth.model import save
from dynadepth.records import plain, read_json, write_json
from dynadepth.routed import routing_of, unwrapped
from dynadepth.routing.decision import Site

CHECKPOINTS = "checkpoints"
"""In a run's folder."""
START, MEASURED = "start", "measured.json"
"""In that one: the folder of a run's start, and the file in it that holds what routers' files do not."""


@dataclass(frozen=True)
class Measured:
    """What a start rests on, beside the tensors."""

    scores: dict[Site, float]
    """Importance."""
    explained: dict[str, float] | None
    """Share of the variance of each site's contribution that its skip path explains; None without paths."""


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all that is learnt, by the names on disk."""
    routing = routing_of(model)
    beside = {} if routing.lora is None else routing.lora.tensors()
    return {name: tensor.clone() for name, tensor in {**routing.tensors(), **beside}.items()}


def restore(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """The inverse of `snapshot`."""
    routing = routing_of(model)
    beside = {name: tensor for name, tensor in tensors.items() if ".lora_" in name}
    routing.load_tensors({name: tensor for name, tensor in tensors.items() if name not in beside})
    if routing.lora is not None:
        routing.lora.load_tensors(beside)


def restore_from(model: nn.Module, folder: Path) -> None:
    """All that is learnt becomes what a checkpoint holds. Raises `AdapterError` for a damaged one."""
    restore(model, _read(folder)[1])


def keep_start(model: nn.Module, out: Path, measured: Measured, seconds: float) -> None:
    """Writes the start of the run in `out`: the model's routers and skip paths as they are, what they rest on, and how
    long that took."""
    folder = out / CHECKPOINTS / START
    document = {
        "scores": {str(site): score for site, score in measured.scores.items()},
        "explained": measured.explained,
        "seconds": seconds,
    }
    (folder / MEASURED).unlink(missing_ok=True)  # written last: it says that the rest is of the same start
    save(model, folder)
    write_json(folder / MEASURED, document)


def kept_start(model: nn.Module, out: Path) -> tuple[Measured, dict[str, Tensor], float] | None:
    """What `keep_start` wrote for this run: what it rests on, the tensors for `restore`, and the seconds that it took.
    None where nothing fits."""
    folder = out / CHECKPOINTS / START
    with suppress(AdapterError, DataError, KeyError, TypeError, ValueError, AttributeError):
        document, tensors = _read(folder)
        if _is_of_this_run(document, model):
            found = read_json(folder / MEASURED)
            scores = {Site.parse(site): float(score) for site, score in found["scores"].items()}
            return Measured(scores, found["explained"]), tensors, float(found["seconds"])
    return None


def resumable(model: nn.Module, out: Path) -> tuple[Path, TrainerState] | None:
    """The last whole checkpoint in `out` that this run can go on from, and where the trainer stood."""
    found = [path for path in (out / CHECKPOINTS).glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    for folder in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        with suppress(AdapterError, OSError, TypeError, ValueError):
            state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))  # which the trainer writes last
            if _is_of_this_run(_read(folder)[0], model):
                return folder, state
    return None


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Routers on disk with their LoRA: the document, and all tensors. Raises `AdapterError`."""
    document, tensors = adapter.read(folder)
    lora = adapter.read_lora(folder, document)
    return document, tensors if lora is None else {**tensors, **lora[1]}


def _is_of_this_run(document: Mapping[str, Any], model: nn.Module) -> bool:
    """Was it saved of this model, with the provenance that its routing has now?"""
    base, routing = unwrapped(model), routing_of(model)
    made_for = document.get("base_model") or {}
    here = adapter.identity(base, decoder_layers(base, routing.spec))
    same = all(made_for.get(key) == here[key] for key in here if key != "name")
    return same and document.get("provenance") == plain(routing.provenance)
