"""Proves at `attach`, on the very model, that routing it is right; refuses, saying why, where it is not.

Three proofs on two short sequences of made-up ids: a layer whose sublayers contribute zero is the identity; with
everything executing, the routed model equals the bare one bit for bit; and declared key/value projections equal what
the module stores.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from dynadepth.architectures.spec import ArchitectureSpec, decoder_layers, decoder_of, text_config
from dynadepth.errors import DynadepthError, UnsupportedModelError
from dynadepth.routing.call import SublayerCall

LENGTH = 8


@dataclass
class Bare:
    """The bare model's answer to the probe's question: last hidden state, and per layer what its sublayers returned."""

    last: Tensor
    outputs: dict[nn.Module, Any]
    inputs: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]
    cache: DynamicCache


@contextmanager
def quietly(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; the training flags are put back."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in flags.items():
            module.training = training


def question(model: PreTrainedModel) -> Tensor:
    """Ids `[2, LENGTH]`, all different where the vocabulary allows."""
    vocabulary = text_config(model).vocab_size
    device = next(decoder_of(model).parameters()).device
    away = next((name for name, parameter in model.named_parameters() if parameter.device.type == "meta"), None)
    if away is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no weights yet, or offloaded ones ({away} is on the meta device): "
            "load them before attaching routers, all of them, on one device or over several."
        )
    return (torch.arange(2 * LENGTH, device=device).view(2, LENGTH) * 7 + 3) % vocabulary


def ask(model: PreTrainedModel) -> tuple[Tensor, DynamicCache]:
    """Last hidden state and filled cache for the probe's question."""
    cache = DynamicCache(config=text_config(model))
    outputs = decoder_of(model)(input_ids=question(model), past_key_values=cache, use_cache=True, return_dict=True)
    return outputs.last_hidden_state, cache


def ask_routed(model: PreTrainedModel) -> Tensor:
    """The last hidden state of a model that has just been routed."""
    try:
        return ask(model)[0]
    except DynadepthError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be routed as asked: its routed forward raised {error!r}."
        ) from error


def observe(model: PreTrainedModel, watched: list[nn.Module]) -> Bare:
    """Runs the bare model, keeping what the watched modules were given and returned."""
    outputs: dict[nn.Module, Any] = {}
    inputs: dict[nn.Module, Any] = {}

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        inputs[module], outputs[module] = (args, kwargs), output

    hooks = [module.register_forward_hook(keep, with_kwargs=True) for module in watched]
    try:
        last, cache = ask(model)
    except DynadepthError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be probed: its forward raised {error!r}."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return Bare(last, outputs, inputs, cache)


def check_zero_is_identity(model: PreTrainedModel, spec: ArchitectureSpec, layers: list[int]) -> None:
    """A layer whose attention and MLP contribute zero must pass the residual stream unchanged."""
    stack = decoder_layers(model, spec)
    changed: list[int] = []

    def compare(index: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            if not torch.equal(before, after):
                changed.append(index)

        return hook

    hooks = []
    for index in layers:
        hooks.append(getattr(stack[index], spec.attention).register_forward_hook(_zero))
        hooks.append(getattr(stack[index], spec.mlp).register_forward_hook(_zero))
        hooks.append(stack[index].register_forward_hook(compare(index), with_kwargs=True))
    try:
        ask(model)
    finally:
        for hook in hooks:
            hook.remove()
    if changed:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be routed at layers {changed}: with attention and MLP contributing zero, "
            "the layer is not the identity, so a skip would change the residual stream."
        )


def alone_read(model: PreTrainedModel, norms: list[nn.Module], readers: list[nn.Module]) -> bool:
    """Does nothing but the `readers` see what the `norms` give? With those contributing zero it must not matter."""

    def answer(silent: list[nn.Module]) -> Tensor:
        hooks = [module.register_forward_hook(_zero) for module in silent]
        try:
            return ask(model)[0]
        finally:
            for hook in hooks:
                hook.remove()

    return torch.equal(answer(readers), answer([*readers, *norms]))


def _zero(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)


def check_same(model: PreTrainedModel, bare: Bare, last: Tensor) -> None:
    """With every site executing, the routed model must answer bit for bit as the bare one."""
    if not bare.last.isfinite().all():
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be routed: the bare model's own hidden states overflow in "
            f"{str(bare.last.dtype).removeprefix('torch.')}; load it in another dtype, such as bfloat16."
        )
    if not torch.equal(bare.last, last):
        worst = (bare.last.float() - last.float()).abs().max().item()
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be routed: with everything executing its hidden states differ from the "
            f"bare model's by up to {worst:.3g}."
        )


@dataclass
class KVProjector:
    """Keys and values of given inputs of a site, through `spec.projector`; `norm` comes before it where blocks are
    routed."""

    projector: Any
    attention: nn.Module
    norm: nn.Module | None

    def __call__(self, hidden: Tensor, position_embeddings: Any) -> tuple[Tensor, Tensor]:
        hidden = hidden if self.norm is None else self.norm(hidden)
        return self.projector(self.attention, hidden, position_embeddings)


def kv_projector(
    model: PreTrainedModel, spec: ArchitectureSpec, bare: Bare, layer_index: int, attention: nn.Module, is_block: bool
) -> KVProjector:
    """The projector of one site, proved equal to what its attention stored in the bare run; refused otherwise."""
    refusal = (
        f"{type(model).__name__} cannot keep keys and values of skipped tokens at layer {layer_index} "
        "(kv_policy='project')"
    )
    way_out = "use kv_policy='drop', or granularity='sequence'"
    if spec.projector is None:
        raise UnsupportedModelError(f"{refusal}: {spec.note}; {way_out}.")
    layer = decoder_layers(model, spec)[layer_index]
    norm_name = spec.attention_norms[0] if is_block else None
    try:
        projector = KVProjector(spec.projector, attention, getattr(layer, norm_name) if norm_name else None)
        same = _projects(projector, *bare.inputs[layer if is_block else attention], bare.cache.layers[layer_index])
    except (AttributeError, IndexError, RuntimeError, TypeError, KeyError, ValueError) as error:
        raise UnsupportedModelError(f"{refusal}: {error!r}; {way_out}.") from error
    if not same:
        raise UnsupportedModelError(
            f"{refusal}: the declared projection differs from what the module stores; {way_out}."
        )
    return projector


def _projects(projector: KVProjector, args: tuple[Any, ...], kwargs: dict[str, Any], stored: Any) -> bool:
    """Does the projector, given every other token alone, return what was stored for them among all tokens?"""
    rows = torch.arange(2, device=stored.keys.device)
    # [2, LENGTH / 2]: even tokens of one row, odd ones of the other
    index = torch.arange(LENGTH, device=rows.device).view(-1, 2).T
    part = SublayerCall(_unused, args, kwargs).tokens(rows, index, None)
    found = projector(part.hidden, part.kwargs.get("position_embeddings"))
    place = index - (LENGTH - stored.keys.shape[2])  # a sliding layer keeps its last positions
    for new, old in zip(found, (stored.keys, stored.values), strict=True):
        old = old.transpose(1, 2)[rows[:, None], place.clamp(min=0)]  # [2, LENGTH / 2, heads, d]
        worst = (new.transpose(1, 2) - old)[place >= 0].abs().max()
        if not worst <= max(1e-3, 4 * torch.finfo(old.dtype).eps) * old.abs().max():
            return False
    return True


def _unused(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("only the arguments of this call are of interest")
