"""Provenance of a run with a model in hand: which model, with which fingerprint, and which routers were on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynadepth import adapter, hub
from dynadepth.architectures import decoder_layers
from dynadepth.model import save
from dynadepth.provenance import provenance
from dynadepth.routed import is_attached, routing_of, unwrapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def model_facts(name: str | Path, model: PreTrainedModel) -> dict[str, Any]:
    """`name`, `source`, `sha256`, `licence` of a model, and the `fingerprint` that saved routers are checked with."""
    base = unwrapped(model)
    return {**hub.provenance_of(name), "fingerprint": adapter.identity(base, decoder_layers(base))["fingerprint"]}


def stamp(
    name: str | Path, model: PreTrainedModel, *, routers: str | Path | None = None, seed: int | None = None
) -> dict[str, Any]:
    """The `provenance` of every JSON file: this run's, the model's, and its routers' (folder, settings, LoRA, budget,
    and how it was solved where a speed-up was asked for)."""
    out = provenance(seed=seed, dtype=model.dtype, model=model_facts(name, model))
    out["routers"] = None
    if is_attached(model):
        routing = routing_of(model)
        folder = None if routers is None else str(routers)
        out["routers"] = {
            "folder": folder,
            "config": routing.config.to_dict(),
            "budget": routing.budget,
            "speedup": routing.speedup,
            "control": routing.control,
            "lora": None if routing.lora is None else routing.lora.facts(),
        }
    return out


def sign(model: PreTrainedModel, directory: str | Path, name: str | Path, seed: int | None) -> None:
    """Saves tuned routers once more, with this run's provenance beside the recipe's."""
    routing_of(model).provenance["run"] = provenance(seed=seed, dtype=model.dtype, model=model_facts(name, model))
    save(model, directory)
