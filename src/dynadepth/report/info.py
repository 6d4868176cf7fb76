"""What there is to know about a model, or about saved routers: plain dicts, for `dynadepth info`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynadepth import adapter
from dynadepth.architectures import decoder_layers
from dynadepth.errors import ConfigError, UnsupportedModelError
from dynadepth.lora import lora_facts
from dynadepth.methods import MindSkipConfig
from dynadepth.methods.config import method_named
from dynadepth.model import attach, detach
from dynadepth.report.stamp import model_facts
from dynadepth.routing.decision import Site
from dynadepth.routing.sublayer import PATH
from dynadepth.routing.target import target_named

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TARGETS = ("attention", "mlp", "block")
WAYS = {
    "sequence": ("sequence", "project"),
    "route": ("route", "project"),
    "token": ("token", "project"),
    "token, drop": ("token", "drop"),
}
"""Granularity and KV policy of each column; `drop` says nothing of a target without keys and values."""


def describe_model(name: str | Path, model: PreTrainedModel) -> dict[str, Any]:
    """Facts of a model, and for each target and granularity whether the probe allows it: True, or why not."""
    facts = {
        **model_facts(name, model),
        "architecture": type(model).__name__,
        "layers": len(decoder_layers(model)),
        "hidden_size": model.config.get_text_config(decoder=True).hidden_size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    routable: dict[str, dict[str, bool | str]] = {}
    for target in TARGETS:
        routable[target] = {}
        for label, (granularity, policy) in WAYS.items():
            if policy == "drop" and not target_named(target).keeps_kv:
                continue
            config = MindSkipConfig(target=target, granularity=granularity, kv_policy=policy)
            try:
                detach(attach(model, config))
                routable[target][label] = True
            except UnsupportedModelError as error:
                routable[target][label] = str(error)
    return {**facts, "routable": routable}


def describe_routers(directory: str | Path) -> dict[str, Any]:
    """Facts of saved routers: for which model, sites, parameters, the calibrated range of budgets, provenance.

    `parameters`, `path_parameters`: numbers in routers, and in skip paths. `lora`: see `lora.lora_facts`, or None.
    `budgets`: lowest and highest share of all sublayers of the target at which thresholds were measured, or None.
    `adjustable`: do thresholds say what executes?
    """
    document, tensors = adapter.read(Path(directory))
    lora = adapter.read_lora(Path(directory), document)
    sites = [Site.parse(text) for text in document.get("sites", [])]
    n_layers = document["base_model"].get("num_hidden_layers")
    points = (document.get("calibration") or {}).get("points") or []
    budgets = None
    if points and n_layers and sites:
        always = n_layers - len(sites)
        keeps = [point["keep"] for point in points]
        budgets = [(keep * len(sites) + always) / n_layers for keep in (min(keeps), max(keeps))]
    return {
        "base_model": document["base_model"],
        "config": document["config"],
        "sites": [str(site) for site in sites],
        "layers": n_layers,
        "parameters": sum(t.numel() for name, t in tensors.items() if not _is_path(name) | name.endswith("threshold")),
        "path_parameters": sum(t.numel() for name, t in tensors.items() if _is_path(name)),
        "lora": None if lora is None else lora_facts(*lora),
        "budget": document.get("budget"),
        "budgets": budgets,
        "adjustable": _has_thresholds(document["config"]),
        "calibrated_on": (document.get("calibration") or {}).get("n_sequences"),
        "provenance": document.get("provenance") or {},
    }


def _has_thresholds(config: dict[str, Any]) -> bool:
    try:
        return method_named(str(config.get("method"))).has_thresholds
    except ConfigError:  # a method that this version does not know may be described all the same
        return True


def _is_path(name: str) -> bool:
    return PATH in name.split(".")


def layer_ranges(layers: list[int]) -> str:
    """`[1, 2, 3, 7]` as `1-3, 7`."""
    ranges: list[list[int]] = []
    for layer in sorted(layers):
        if ranges and layer == ranges[-1][1] + 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)
