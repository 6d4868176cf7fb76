"""Routers on disk: one JSON file that says what they are and for which model, one safetensors file with their
tensors; a LoRA beside them in PEFT's own two files, whose digests the JSON file has."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dynadepth import lora
from dynadepth.errors import AdapterError, NewerFormatError
from dynadepth.routing.sublayer import is_attached_name

CONFIG, WEIGHTS = "routing_config.json", "routers.safetensors"
FORMAT = 3
WITHOUT_LORA = 2
"""The format of routers without a LoRA, which older versions read, too."""
SAMPLE = 512
"""Weights a layer whose signs go into the fingerprint."""


def identity(model: PreTrainedModel, layers: nn.ModuleList) -> dict[str, Any]:
    """What tells one model from another: its shape, and a fingerprint of its weights that no change of dtype alters.

    The fingerprint is the SHA-256 of the signs of `SAMPLE` weights of each layer's largest matrix.
    """
    config = model.config.get_text_config(decoder=True)
    digest = hashlib.sha256()
    for layer in layers:
        parameters = [p for name, p in layer.named_parameters() if not is_attached_name(name) and "lora_" not in name]
        flat = max(parameters, key=lambda p: p.numel()).detach().flatten()
        if flat.device.type == "meta":
            raise AdapterError(
                f"{type(model).__name__} has offloaded weights, whose fingerprint cannot be read: save and load "
                "routers where the whole model is loaded."
            )
        sample = flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE]
        digest.update(bytes((sample > 0).to(torch.uint8).tolist()))
    shape = {
        name: getattr(config, name, None) for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    }
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    name = Path(name).name if Path(name).is_dir() else name  # a folder's place on this machine tells nobody anything
    return {"name": name, **shape, "fingerprint": digest.hexdigest()[:16]}


def check_identity(
    directory: Path, made_for: dict[str, Any], model: dict[str, Any], strict: bool, trains_base: bool
) -> None:
    """Raises AdapterError naming both models where they differ in shape, or (`strict`) in weights. `trains_base`: the
    routers' method changed the weights, too."""
    names = f"The routers in {directory} were made for {made_for.get('name')!r}, not for {model['name']!r}"
    for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        if made_for.get(key) != model[key]:
            raise AdapterError(f"{names}: {key} is {made_for.get(key)!r} there and {model[key]!r} here.")
    if strict and made_for.get("fingerprint") != model["fingerprint"]:
        together = "This method is trained together with its base: load the one that save_pretrained wrote then. "
        raise AdapterError(
            f"{names}: the fingerprint of the weights is {made_for.get('fingerprint')} there and "
            f"{model['fingerprint']} here. {together if trains_base else ''}load(..., strict=False) accepts other "
            "weights of the same shape."
        )


def write(
    directory: Path,
    data: dict[str, Any],
    tensors: dict[str, Tensor],
    beside: tuple[str, dict[str, Tensor]] | None = None,
) -> Path:
    """Writes all files; a crash or a full disk leaves what was there before.

    `beside`: a LoRA, as PEFT's configuration and tensors. Without one, that of earlier routers in the folder goes.
    """
    if beside is not None:
        check_not_a_model(directory)
    blobs = {WEIGHTS: _serialised(tensors)}
    document = {"format": WITHOUT_LORA, **data, "sha256": _sha256(blobs[WEIGHTS])}
    if beside is not None:
        added = {lora.CONFIG: beside[0].encode(), lora.WEIGHTS: _serialised(beside[1], {"format": "pt"})}
        document |= {"format": FORMAT, "lora": {name: _sha256(blob) for name, blob in added.items()}}
        blobs |= added
    text = json.dumps(document, indent=2) + "\n"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        left = [directory / name for name in _listed(directory) if name not in blobs]
        together(
            {
                **{directory / name: _bytes_writer(blob) for name, blob in blobs.items()},
                directory / CONFIG: lambda path: path.write_text(text, encoding="utf-8"),
            }
        )
        for path in left:
            path.unlink(missing_ok=True)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise AdapterError(
                f"No space left to save the routers in {directory}: free some, or choose another folder."
            ) from error
        raise AdapterError(f"The routers cannot be saved in {directory}: {error.strerror or error}.") from error
    return directory


def check_not_a_model(directory: Path) -> None:
    """Raises AdapterError for the folder of a model: transformers would put a LoRA that lies there on that model."""
    if (directory / "config.json").exists():
        raise AdapterError(
            f"{directory} is a model's folder, and a LoRA in it would be part of that model from then on: save routers "
            "with a LoRA in a folder of their own."
        )


def _serialised(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    from safetensors.torch import save as serialise

    return serialise({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)


def _bytes_writer(blob: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(blob)


def _sha256(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


def _listed(directory: Path) -> list[str]:
    """The LoRA files of the routers in a folder, if there are any."""
    try:
        found = json.loads((directory / CONFIG).read_text(encoding="utf-8")).get("lora") or {}
        return [name for name in found if name in (lora.CONFIG, lora.WEIGHTS)]
    except (OSError, ValueError, AttributeError, TypeError):
        return []


def atomically(path: Path, write_to: Callable[[Path], Any]) -> None:
    """Writes beside `path` and then moves into place; on failure nothing of the new content stays."""
    together({path: write_to})


def together(files: Mapping[Path, Callable[[Path], Any]]) -> None:
    """`atomically` for files that belong together: all are complete on the disk before the first takes its place.

    A link stays one: what it points to is written.
    """
    files = {Path(os.path.realpath(path)): write_to for path, write_to in files.items()}
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in files}
    try:
        for path, write_to in files.items():
            write_to(temporary[path])
        for path in files:
            os.replace(temporary[path], path)
    except BaseException:
        for path in temporary.values():
            path.unlink(missing_ok=True)
        raise


def read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The document and the tensors, or AdapterError saying what is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load as deserialise

    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise AdapterError(f"{directory} holds no routers: {name} is missing.")
    try:
        document = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        found = document["format"]
        if type(found) is not int or found < 1:
            raise ValueError(f"format {found!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{directory / CONFIG} is damaged ({error!r}): save the routers again.") from error
    if found > FORMAT:
        raise NewerFormatError(
            f"{directory} has format {found}, this version reads up to {FORMAT}: upgrade with pip install -U dynadepth."
        )
    blob = _checked(directory, WEIGHTS, document.get("sha256"))
    beside = document.get("lora")
    if beside is not None:
        if not isinstance(beside, dict) or set(beside) != {lora.CONFIG, lora.WEIGHTS}:
            raise AdapterError(f"{directory / CONFIG} is damaged (its 'lora'): save the routers again.")
        for name, digest in beside.items():
            _checked(directory, name, digest)
    for key in ("config", "base_model"):
        if not isinstance(document.get(key), dict):
            raise AdapterError(f"{directory / CONFIG} is damaged (no {key!r}): save the routers again.")
    try:
        return document, deserialise(blob)
    except SafetensorError as error:
        raise AdapterError(f"{directory / WEIGHTS} is damaged ({error}): save the routers again.") from error


def read_lora(directory: Path, document: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """PEFT's configuration and tensors beside routers whose `document` was read; None where there is no LoRA."""
    from safetensors import SafetensorError
    from safetensors.torch import load as deserialise

    if document.get("lora") is None:
        return None
    try:
        config = json.loads((directory / lora.CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("no object")
        return config, deserialise((directory / lora.WEIGHTS).read_bytes())
    except (SafetensorError, ValueError) as error:
        raise AdapterError(f"The LoRA in {directory} is damaged ({error}): save the routers again.") from error


def _checked(directory: Path, name: str, digest: Any) -> bytes:
    """A file's content, whose SHA-256 is the one given."""
    if not (directory / name).is_file():
        raise AdapterError(f"{directory} lacks {name}, which its {CONFIG} names: save the routers again.")
    blob = (directory / name).read_bytes()
    if _sha256(blob) != digest:
        raise AdapterError(
            f"{directory / name} is truncated or was changed (its SHA-256 is not the one in {CONFIG}): "
            "save the routers again."
        )
    return blob
