"""Compiling a model's decode in place, dense or routed, and undoing it."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from dynadepth.architectures import decoder_layers, spec_for
from dynadepth.architectures.probe import LENGTH, question, quietly
from dynadepth.compiled import kernel, linear
from dynadepth.compiled.layers import CompiledLayer, Plan, Steps, step
from dynadepth.compiled.twins import obstacle
from dynadepth.errors import ConfigError, UnsupportedModelError
from dynadepth.routed import is_attached, routing_of, unwrapped
from dynadepth.routing.context import disabling, injecting
from dynadepth.routing.sublayer import restore_class, swap_class

M = TypeVar("M", bound=nn.Module)


def compile_model(model: M) -> M:
    """Makes the decode of a model fast, in place, and returns it: dense or routed, through its own `generate()`.

    A step of one token runs each layer in a compiled form: executed by every row, by none, or by some; which of them is
    the route's to say, so that no route compiles anything anew. New keys and values are written into room kept for
    them. On a CPU linear layers in bfloat16 read their weight once for up to eight rows. Prefill, training and whatever
    cannot be compiled take the ordinary way. Results are the same up to rounding, also where layers are changed later.

    The first steps compile (some tens of seconds, kept by PyTorch for the next process). Raises ConfigError for a model
    that is compiled already, UnsupportedModelError where the layers do not answer as they should; it is then as it was.
    """
    base: Any = unwrapped(model)
    if is_compiled(base):
        raise ConfigError(f"{type(base).__name__} is already compiled: dynadepth.uncompile(model) first.")
    spec, layers = spec_for(base), decoder_layers(base)
    found = next((why for why in map(obstacle, layers) if why is not None), None)
    if found is not None:
        raise UnsupportedModelError(f"{type(base).__name__} cannot be compiled: {found}. Take it off first.")
    for index, layer in enumerate(layers):
        place = getattr(getattr(layer, spec.attention, None), "layer_idx", index)
        if place != index:
            raise UnsupportedModelError(
                f"{type(base).__name__} cannot be compiled: layer {index} keeps its keys in place {place} of the cache "
                "(layers were taken out or moved?); set its attention's layer_idx and the config's num_hidden_layers."
            )
    routing: Any = routing_of(base) if is_attached(base) else None
    states = {} if routing is None else {site.layer: state for site, state in routing.states.items()}
    norms = {"attention": spec.attention_norms[1], "mlp": spec.mlp_norms[1]}
    base.compiled_linears = []
    try:
        if any(linear.mixin_for(module) for module in base.modules()):
            reason = kernel.load()
            if reason is None:
                base.compiled_linears = linear.make_small(base)  # before twins are made of them
            else:
                warnings.warn(
                    f"Linear layers and skip paths stay PyTorch's own, which take longer for a few rows: {reason}.",
                    UserWarning,
                    stacklevel=2,
                )
        steps = Steps(routing)
        for index, layer in enumerate(layers):
            state = states.get(index)
            name = None if state is None else norms.get(state.target.name)
            plan: Any = Plan(index, layer, steps, state, name)
            layer.compiled_plan = plan
            swap_class(layer, CompiledLayer)
        _check(base, steps)
    except BaseException:
        uncompile(model)
        raise
    if routing is not None and not routing.granularity.sticky:
        warnings.warn(
            f"Routers that decide for every token choose anew at every step: their {len(states)} of {len(layers)} "
            "layers decode the ordinary way, the others compiled; all are compiled at granularity='sequence'.",
            UserWarning,
            stacklevel=2,
        )
    return model


def uncompile(model: M) -> M:
    """Takes a model back to what it was before `compile_model`; one that is not compiled stays as it is. Returns it."""
    base = unwrapped(model)
    if is_compiled(base):
        linear.make_plain(vars(base).pop("compiled_linears"))
        for layer in decoder_layers(base):
            if isinstance(layer, CompiledLayer):  # one put in later is not
                restore_class(layer, CompiledLayer)
                del layer.compiled_plan
    return model


def is_compiled(model: nn.Module) -> bool:
    """Is the model's decode compiled?"""
    return "compiled_linears" in vars(unwrapped(model))


def _check(base: Any, steps: Steps) -> None:
    """Runs the forms uncompiled, on two short sequences of made-up ids, against the ordinary way.

    They may differ by rounding, and by as much as the ordinary way differs from itself where it reads all at once: what
    rounding grows to in a model that has lost half of its attentions.
    """
    ids, ran = question(base), []

    def apart(*inputs: Any) -> Any:
        ran.append(True)
        return step(*inputs)

    def answer(**inputs: Any) -> Any:
        cache = DynamicCache(config=base.config.get_text_config(decoder=True))
        for part in (ids[:, : LENGTH - 2], ids[:, LENGTH - 2 : LENGTH - 1], ids[:, LENGTH - 1 :]):
            output = base(input_ids=part, past_key_values=cache, use_cache=True)
        return output[0]

    adapted = steps.routing is not None and steps.routing.lora is not None  # and so in routed forwards alone
    with quietly(base), injecting(steps.routing, {}) if adapted else disabling(steps.routing):
        steps.failed = True
        expected = answer()
        whole = base(input_ids=ids, use_cache=False)[0][:, -1:]
        make, steps.make, steps.failed = steps.make, lambda: apart, False
        try:
            found = answer()
        except (AttributeError, AssertionError, KeyError, TypeError, RuntimeError, ValueError) as error:
            raise UnsupportedModelError(
                f"{type(base).__name__} cannot be compiled: its layers want more of a cache than a place for one "
                f"token ({error!r})."
            ) from error
        finally:
            steps.reset(make)
    if not ran:
        raise UnsupportedModelError(
            f"{type(base).__name__} cannot be compiled: its layers keep no keys and values in a DynamicCache."
        )
    worst, own = ((expected.float() - other.float()).abs().max().item() for other in (found, whole))
    if not worst <= max(max(1e-3, 4 * torch.finfo(expected.dtype).eps) * expected.float().abs().max().item(), own):
        raise UnsupportedModelError(
            f"{type(base).__name__} cannot be compiled: a step of its layers apart differs by up to {worst:.3g}."
        )
