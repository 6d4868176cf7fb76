"""Pruned twins: the same model with sublayers physically absent, and nothing of the routing machinery in it.

A twin is the yardstick of speed: what a hand-written model without those sublayers would cost. It shares every weight's
storage with the given model and has a module tree and a configuration of its own. Decoder layers that keep both
sublayers keep their class and code. Of a layer that lost one, the other remains with its norms and its residual add;
a layer that lost both is gone.

The cache of a twin holds nothing for absent attentions. Layers without attention are merged into a neighbour, so that
each entry of the layer list has exactly one attention and the list, `num_hidden_layers`, `layer_types` and the cache
all agree: transformers then derives lengths, positions and masks from attentions that exist (also where layer 0 lost
its own), without special cases. If no attention is left, the cache stays empty.

Shape suffixes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from itertools import chain
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from dynadepth.architectures import ArchitectureSpec, decoder_layers, spec_for
from dynadepth.compiled import uncompile
from dynadepth.cost import PARTS
from dynadepth.errors import ConfigError
from dynadepth.model import detach
from dynadepth.routed import is_attached, unwrapped
from dynadepth.routing.call import names_of
from dynadepth.routing.decision import Site

M = TypeVar("M", bound=nn.Module)


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with modules and configuration of its own on the same weights: parameters and buffers share storage.

    Tied weights stay tied. Parameters are objects of their own that want gradients where the given ones do: without,
    PyTorch multiplies sliced states by a slower kernel, and a dense model is to be timed as it was loaded.
    """
    return _shared(model)


def _shared(module: M) -> M:
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in module.parameters()}
    memo.update({id(b): b.detach() for b in module.buffers()})
    return copy.deepcopy(module, memo)


def bare_twin(model: PreTrainedModel) -> PreTrainedModel:
    """The dense model as transformers built it, in eval mode, on the weights of `model` (attached or not)."""
    twin = uncompile(shared_copy(unwrapped(model)))
    return (detach(twin) if is_attached(twin) else twin).eval()


def pruned_twin(model: PreTrainedModel, skipped: Collection[Site], repeated: Collection[Site] = ()) -> PreTrainedModel:
    """`model` without the sublayers of `skipped` and with the blocks of `repeated` twice, one behind the other, in eval
    mode; weights shared, no copy of any tensor.

    Its logits are those of the routed model under a fixed route that skips and repeats the same sites with identity
    skip paths. Raises `ConfigError` for a layer that does not exist, an unknown target, or a repeat of anything but a
    block.
    """
    twin = bare_twin(model)
    layers, spec = decoder_layers(twin), spec_for(twin)
    absent = _sublayers_of(skipped, len(layers))
    twice = _sublayers_of(repeated, len(layers))
    if any(site.target != "block" for site in repeated) or absent & twice:
        names = ", ".join(sorted(map(str, repeated)))
        raise ConfigError(f"only whole blocks that are not skipped can be twice in a model, not all of {names}")
    types = getattr(twin.config.get_text_config(decoder=True), "layer_types", None)

    entries: list[list[nn.Module]] = []  # modules run one after the other; from the first attention on, one of it each
    kept: list[int] = []  # original index of the layer whose attention each entry has
    for index, layer in enumerate(layers):
        has_attention, has_mlp = (index, "attention") not in absent, (index, "mlp") not in absent
        modules = _what_remains(layer, spec, has_attention, has_mlp)
        # The MLPs before the first attention join its entry; those after an attention end the entry of that one.
        if not entries or (has_attention and kept):
            entries.append([])
        entries[-1].extend(modules)
        if has_attention:
            _set_layer_index(layer, spec, len(kept))
            kept.append(index)
        if (index, "attention") in twice:
            again = _shared(layer)
            _set_layer_index(again, spec, len(kept))
            entries.append([again])
            kept.append(index)

    places = names_of(layers[0].forward)
    merged = [modules[0] if len(modules) == 1 else _Sequence(modules, places) for modules in entries]
    del layers[:]
    layers.extend(merged)
    # Without any attention one entry is left: it needs some type, and its place in the cache is never filled.
    _resize_configs(twin, len(merged), None if types is None else [types[index] for index in kept or [0]])
    return twin.eval()  # what merged layers are in was made just now


class _Residual(nn.Module):
    """One sublayer with its norms and its residual add: `x + scale * post(sublayer(pre(x)))`."""

    def __init__(
        self,
        sublayer: nn.Module,
        norms: tuple[nn.Module | None, nn.Module | None],
        scale: float | None,
        in_context: bool,
        places: list[str],
    ) -> None:
        super().__init__()
        self.places = places
        self.pre, self.post = norms
        self.sublayer, self.scale, self.in_context = sublayer, scale, in_context

    def forward(self, hidden_BTD: Tensor, *given: Any, **context: Any) -> Tensor:
        """`context` (masks, positions, cache) is the decoder layer's; an attention gets it, an MLP does not. `given`:
        what of it comes by place, whose names are `places`."""
        context |= dict(zip(self.places, given, strict=False))
        output = hidden_BTD if self.pre is None else self.pre(hidden_BTD)
        output = self.sublayer(output, **context) if self.in_context else self.sublayer(output)
        if isinstance(output, tuple):  # attention weights, or the scores of a mixture of experts
            output = output[0]
        if self.post is not None:
            output = self.post(output)
        if self.scale is not None:
            output = output * self.scale
        return hidden_BTD + output


class _Sequence(nn.Module):
    """Modules with a decoder layer's signature, run one after the other; none at all is the identity."""

    def __init__(self, modules: Sequence[nn.Module], places: list[str]) -> None:
        super().__init__()
        self.parts, self.places = nn.ModuleList(modules), places

    def forward(self, hidden_BTD: Tensor, *given: Any, **context: Any) -> Tensor:
        context |= dict(zip(self.places, given, strict=False))
        for part in self.parts:
            hidden_BTD = part(hidden_BTD, **context)
        return hidden_BTD


def _sublayers_of(sites: Collection[Site], n_layers: int) -> set[tuple[int, str]]:
    for site in sites:
        if site.target not in PARTS:
            raise ConfigError(f"unknown target {site.target!r} in {site}: one of {', '.join(PARTS)}")
        if not 0 <= site.layer < n_layers:
            raise ConfigError(f"{site} does not exist: the model's layers are 0 to {n_layers - 1}")
    named = set(chain.from_iterable(((s.layer, part) for part in PARTS[s.target]) for s in sites))
    # Where no expert runs, nothing of the mixture is needed.
    return {(layer, "mlp" if part == "experts" else part) for layer, part in named}


def _what_remains(layer: nn.Module, spec: ArchitectureSpec, has_attention: bool, has_mlp: bool) -> list[nn.Module]:
    if has_attention and has_mlp:
        return [layer]
    scale = getattr(layer, spec.residual_scale) if spec.residual_scale else None
    places = names_of(layer.forward)

    def norms(names: tuple[str | None, str | None]) -> tuple[nn.Module | None, nn.Module | None]:
        pre, post = (None if name is None else getattr(layer, name) for name in names)
        return pre, post

    if has_attention:
        attention = getattr(layer, spec.attention)
        return [_Residual(attention, norms(spec.attention_norms), scale, in_context=True, places=places)]
    if has_mlp:
        return [_Residual(getattr(layer, spec.mlp), norms(spec.mlp_norms), scale, in_context=False, places=places)]
    return []


def _set_layer_index(layer: nn.Module, spec: ArchitectureSpec, index: int) -> None:
    """Points an attention (or what stands in its place) at its place in the cache: `layer_idx` wherever the layer or
    its attention keeps it."""
    for module in (layer, *getattr(layer, spec.attention, layer).modules()):
        if isinstance(getattr(module, "layer_idx", None), int):
            module.layer_idx = index


def _resize_configs(twin: PreTrainedModel, n_layers: int, layer_types: list[str] | None) -> None:
    """Sets the number and types of layers in every configuration object of the twin; `generate` reads the outer one."""
    configs = [config for module in twin.modules() if (config := getattr(module, "config", None)) is not None]
    for config in {id(c): c for c in configs if hasattr(c, "get_text_config")}.values():
        text_config = config.get_text_config(decoder=True)
        text_config.num_hidden_layers = n_layers
        if layer_types is not None:
            text_config.layer_types = list(layer_types)
