"""A saved adapter of a tiny model, ways to damage it, and the refusal that must leave the model as it was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as deserialise
from safetensors.torch import save as serialise
from transformers import PreTrainedModel

from dynadepth import is_attached, load, save
from dynadepth.adapter import CONFIG, WEIGHTS
from dynadepth.errors import AdapterError
from small import routed


def save_tiny(directory: Path) -> Path:
    """Routers of the tiny Llama, which calls itself `tiny/llama`."""
    model = routed(bias=True)
    model.config._name_or_path = "tiny/llama"
    return save(model, directory / "routers")


def edit(directory: Path, **changes: Any) -> None:
    """Overwrites entries of the JSON file; None removes one."""
    data = json.loads((directory / CONFIG).read_text())
    for key, value in changes.items():
        data[key] = value
        if value is None:
            del data[key]
    (directory / CONFIG).write_text(json.dumps(data))


def replace_tensors(directory: Path, change: Any) -> None:
    """Writes other tensors with a checksum that fits."""
    blob = serialise(change(deserialise((directory / WEIGHTS).read_bytes())))
    (directory / WEIGHTS).write_bytes(blob)
    edit(directory, sha256=hashlib.sha256(blob).hexdigest())


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def refused(model: PreTrainedModel, directory: Path, **options: Any) -> str:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(AdapterError) as caught:
        load(model, directory, **options)
    assert not is_attached(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    return str(caught.value)
