"""Attaching routers to an ordinary pretrained model, taking them off, saving and loading them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from dynadepth import adapter
from dynadepth.architectures import ArchitectureSpec, decoder_layers, decoder_of, spec_for, text_config
from dynadepth.architectures import probe as probing
from dynadepth.compiled import is_compiled, uncompile
from dynadepth.errors import AdapterError, ConfigError, UnsupportedModelError
from dynadepth.lora import Lora, LoraSettings, inject, read_config, remove
from dynadepth.methods import DepthConfig, config_from_dict
from dynadepth.routed import Routing, is_attached, routing_of, unwrapped
from dynadepth.routing.calibration import Calibration
from dynadepth.routing.context import Injection, carrying_context, choosing, disabling, injecting
from dynadepth.routing.decision import Site
from dynadepth.routing.experts import ExpertTarget, GateState, WatchedGate, gate_of, inspect_gate
from dynadepth.routing.forward import RoutedModel
from dynadepth.routing.granularity import granularity_named
from dynadepth.routing.repeat import check_repeats
from dynadepth.routing.skip_path import skip_path_named
from dynadepth.routing.sublayer import (
    PATH,
    ROUTER,
    EntryNorm,
    RoutedNorm,
    RoutedSublayer,
    SublayerState,
    own_forward,
    restore_class,
    swap_class,
)
from dynadepth.routing.target import Target, target_named

M = TypeVar("M", bound=nn.Module)


def attach(model: M, config: DepthConfig) -> M:
    """Routes a pretrained model in place and returns it.

    The backbone is frozen (a PeftModel keeps its own choice of trainable parameters, and a method that trains the base
    leaves it as it is); the new routers are trainable, float32. PEFT freezes whatever it wraps, routers too: to train
    both, attach to the PeftModel. Parameter names do not change. Raises UnsupportedModelError where the probe finds
    that the model cannot be routed as asked (it is left as it was), ConfigError for a layer that does not exist or a
    model that is already routed.
    """
    base = unwrapped(model)
    if not isinstance(config, DepthConfig):
        raise ConfigError(f"attach takes a configuration such as dynadepth.MindSkipConfig(), not {config!r}.")
    if is_attached(base):
        raise ConfigError(f"{type(base).__name__} is already routed: dynadepth.detach(model) first.")
    _check_not_compiled(base)
    spec = spec_for(base)
    layers = decoder_layers(base, spec)
    routing = _plan(base, config, spec, len(layers))
    modules = [routing.target.module(layers[site.layer], spec) for site in routing.sites]
    _check_own_forwards(base, routing, modules)
    indices = [site.layer for site in routing.sites]
    if config.watches_experts:
        mlps = {index: getattr(layer, spec.mlp, None) for index, layer in enumerate(layers)}
        routing.gates = {index: gate for index, mlp in mlps.items() if mlp is not None and (gate := gate_of(mlp))}
        if not routing.gates:
            raise UnsupportedModelError(
                f"{type(base).__name__} has no mixture of experts, for which method {config.name!r} is: use 'mod'."
            )
    with probing.quietly(base):
        attentions = [getattr(layers[i], spec.attention) for i in indices]
        watched = dict.fromkeys([*modules, *attentions, *routing.gates.values()])
        bare = probing.observe(base, list(watched))
        probing.check_zero_is_identity(base, spec, indices)
        device_dtype = next(base.parameters())
        for site, module, attention in zip(routing.sites, modules, attentions, strict=True):
            output = bare.outputs[module]
            state = SublayerState(
                owner=routing,
                site=site,
                router=config.build_router(site, text_config(base).hidden_size).to(_device_of(module, device_dtype)),
                granularity=routing.granularity,
                target=routing.target,
                kv_policy=config.kv_policy,
                config=text_config(base),
                extras=len(output) - 1 if isinstance(output, tuple) else None,
            )
            norm, unit_input = _norms(routing.target, spec, layers[site.layer])
            path = skip_path_named(config.skip_path).build(text_config(base).hidden_size, config.skip_rank, unit_input)
            state.skip_path = path.to(_device_of(module, device_dtype))
            state.post_norm = norm is not None
            if not routing.granularity.sticky and routing.target.keeps_kv and config.kv_policy == "project":
                is_block = module is not attention
                state.project = probing.kv_projector(base, spec, bare, site.layer, attention, is_block)
            routing.states[site] = state
        normalised = {index: inspect_gate(gate, bare.outputs[gate]) for index, gate in routing.gates.items()}
        entries = {site: norm for site in routing.sites if (norm := _entry(routing, layers[site.layer])) is not None}
        if entries and not probing.alone_read(base, list(entries.values()), modules):
            entries = {}
    _watch(routing, normalised)
    _install(base, routing, modules, entries, freeze=base is model and not config.trains_base)
    try:
        with probing.quietly(base), injecting(routing, {}):
            probing.check_same(base, bare, probing.ask_routed(base))
    except BaseException:
        detach(model)
        raise
    return model


def _check_own_forwards(base: PreTrainedModel, routing: Routing, modules: list[nn.Module]) -> None:
    """Raises UnsupportedModelError where a forward that was set on an instance would go round the routing."""
    layers = decoder_layers(base, routing.spec)
    norms = [_norms(routing.target, routing.spec, layers[site.layer])[0] for site in routing.sites]
    entries = [_entry(routing, layers[site.layer]) for site in routing.sites]
    changed = {*_entrances(base), *modules, *norms, *entries, *routing.gates.values()}
    for name, module in base.named_modules():
        if module in changed and own_forward(module):
            raise UnsupportedModelError(
                f"{name or type(base).__name__} has a forward of its own (as accelerate's mixed precision, "
                "`model.forward = torch.compile(...)` and kernel libraries set), which would go round the routers: "
                "attach first, or take it off with accelerator.unwrap_model(model, keep_fp32_wrapper=False) or "
                "`del module.forward`."
            )


def _watch(routing: Routing, normalised: Mapping[int, bool]) -> None:
    experts = {site.layer for site in routing.sites if site.target == ExpertTarget.name}
    for layer, gate in routing.gates.items():
        state = GateState(routing, layer, layer in experts, normalised[layer])
        gate.depth_state = state  # type: ignore[assignment]  # a module takes any attribute
        swap_class(gate, WatchedGate)


def _check_not_compiled(base: PreTrainedModel) -> None:
    """Raises ConfigError for a model whose compiled forms would not see the modules that are to be added."""
    if is_compiled(base):
        raise ConfigError(
            f"{type(base).__name__} is compiled as it is: dynadepth.uncompile(model) first, and compile it again with "
            "what is added."
        )


def _device_of(module: nn.Module, default: torch.Tensor) -> torch.device:
    parameter = next(module.parameters(), default)
    return parameter.device


def _norms(target: Target, spec: ArchitectureSpec, layer: nn.Module) -> tuple[nn.Module | None, bool]:
    """The norm between a target's module and the residual stream, and whether the module reads the stream itself."""
    before, after = _norm_names(target, spec)
    return getattr(layer, after) if after else None, before is None


def _entry(routing: Routing, layer: nn.Module) -> nn.Module | None:
    """The norm before a target's module, where a skip can be known before it and leaves nothing to read there."""
    before, _ = _norm_names(routing.target, routing.spec)
    if before is None or not routing.rests:
        return None
    return getattr(layer, before, None)


def _norm_names(target: Target, spec: ArchitectureSpec) -> tuple[str | None, str | None]:
    """The norms before and behind a target's module; None for none, and for a whole block."""
    return {"attention": spec.attention_norms, "mlp": spec.mlp_norms}.get(target.name, (None, None))


def _plan(base: PreTrainedModel, config: DepthConfig, spec: ArchitectureSpec, n_layers: int) -> Routing:
    target, granularity = target_named(config.target), granularity_named(config.granularity)
    chosen = config.routed_layers(n_layers)
    outside = [i for i in chosen if not 0 <= i < n_layers]
    if outside:
        raise ConfigError(
            f"layers {outside} do not exist: {type(base).__name__} has {n_layers} layers, 0 to {n_layers - 1}."
        )
    if config.kv_policy == "drop" and (granularity.sticky or not target.keeps_kv):
        reason = (
            f"{target.name} keeps no keys and values" if not target.keeps_kv else "skipped sequences store none anyway"
        )
        warnings.warn(
            f"kv_policy='drop' has no effect at {granularity.name} granularity for target {target.name!r}: {reason}.",
            UserWarning,
            stacklevel=3,
        )
    stack = decoder_layers(base, spec)
    for index in chosen:
        for part in (spec.attention, spec.mlp):
            if not isinstance(getattr(stack[index], part, None), nn.Module):
                children = ", ".join(name for name, _ in stack[index].named_children())
                raise UnsupportedModelError(
                    f"{type(base).__name__} cannot be routed at layer {index}: its {type(stack[index]).__name__} has "
                    f"no {part!r} (it has {children}). Only layers with attention and MLP can be routed: name such "
                    "layers in `layers`, or "
                    "declare parts of other names in a new file of dynadepth/architectures."
                )
    sites = tuple(Site(index, target.name) for index in chosen)
    return Routing(config, spec, target, granularity, n_layers, sites)


def _install(
    base: PreTrainedModel, routing: Routing, modules: list[nn.Module], entries: Mapping[Site, nn.Module], freeze: bool
) -> None:
    routing.predicts = base.get_output_embeddings() is not None
    routing.trainable_before = tuple(name for name, p in base.named_parameters() if p.requires_grad)
    if freeze:
        base.requires_grad_(False)
    for site, module in zip(routing.sites, modules, strict=True):
        state = routing.states[site]
        module.add_module(ROUTER, state.router)
        if state.skip_path.streams:
            module.add_module(PATH, state.skip_path)
        module.depth_state = state  # type: ignore[assignment]  # a module takes any attribute
        swap_class(module, RoutedSublayer)
        norm = _norms(routing.target, routing.spec, decoder_layers(base, routing.spec)[site.layer])[0]
        if state.post_norm and norm is not None:
            norm.depth_state = state  # type: ignore[assignment]  # a module takes any attribute
            swap_class(norm, RoutedNorm)
    for site, norm in entries.items():
        norm.depth_entry = routing.states[site]  # type: ignore[assignment]  # a module takes any attribute
        swap_class(norm, EntryNorm)
    for part in _entrances(base):
        part.depth_routing = routing  # type: ignore[assignment]  # a module takes any attribute
        swap_class(part, RoutedModel)
    head = base.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(folded_input)
    if routing.trainable and vars(base).get("_require_grads_hooks"):
        base.disable_input_require_grads()
        base.enable_input_require_grads()  # the routed model's own: see there
    for module in base.modules():
        function: Any = vars(module).get("_gradient_checkpointing_func")
        if function is not None:
            wrapped: Any = carrying_context(function)
            module._gradient_checkpointing_func = wrapped


def folded_input(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Keeps the vocabulary head fast though it is frozen.

    The last tokens' states `[B, t, D]` are a slice whose first two dimensions do not fold into one. Where the weight
    requires no gradient, torch then multiplies with an expanded copy of it (B times the head), which takes longer than
    a prefill.
    """
    hidden = args[0]
    if hidden.dim() == 3 and hidden.stride(0) != hidden.shape[1] * hidden.stride(1):
        return (hidden.clone(memory_format=torch.contiguous_format), *args[1:])
    return None


def _entrances(base: PreTrainedModel) -> list[nn.Module]:
    """The modules whose forward opens a routed forward: the model and its decoder."""
    decoder = decoder_of(base)
    return [base] if decoder is base else [base, decoder]


def detach(model: M) -> M:
    """Takes the routers off: the model is again what it was, trainable parameters included, and not compiled. Returns
    it."""
    base = unwrapped(model)
    uncompile(base)
    routing = routing_of(base)
    layers = decoder_layers(base, routing.spec)
    if routing.lora is not None:
        remove(base, routing.lora)
        routing.lora = None
    for part in _entrances(base):
        restore_class(part, RoutedModel)
        del part.depth_routing
    for site in routing.sites:
        module = routing.target.module(layers[site.layer], routing.spec)
        restore_class(module, RoutedSublayer)
        delattr(module, ROUTER)
        state = routing.states[site]
        if state.skip_path.streams:
            delattr(module, PATH)
        norm = _norms(routing.target, routing.spec, layers[site.layer])[0]
        if state.post_norm and norm is not None:
            restore_class(norm, RoutedNorm)
            del norm.depth_state
        del module.depth_state
        entry = _entry(routing, layers[site.layer])
        if isinstance(entry, EntryNorm):
            restore_class(entry, EntryNorm)
            del entry.depth_entry
    for gate in routing.gates.values():
        restore_class(gate, WatchedGate)
        del gate.depth_state
    head = base.get_output_embeddings()
    if head is not None:
        for key in [key for key, hook in head._forward_pre_hooks.items() if hook is folded_input]:
            del head._forward_pre_hooks[key]
    trainable = set(routing.trainable_before)
    for name, parameter in base.named_parameters():
        if name in trainable:
            parameter.requires_grad_(True)
    for module in base.modules():
        function = vars(module).get("_gradient_checkpointing_func")
        if function is not None:
            module._gradient_checkpointing_func = getattr(function, "__wrapped__", function)
    if routing.input_grads:
        base.enable_input_require_grads()
    return model


def add_lora(model: nn.Module, settings: LoraSettings) -> None:
    """Puts a LoRA beside the routers of an attached model: trainable, float32, without effect until it is tuned.

    It adapts routed forwards alone: `disabled` and `detach` give the base's own. Raises ConfigError for settings that
    do not fit the model, a model that PEFT adapts already, or without the package `peft`.
    """
    base, routing = unwrapped(model), routing_of(model)
    _check_not_compiled(base)
    routing.lora = inject(base, routing, settings.config(base))


def adopt_lora(model: nn.Module, lora: Lora) -> None:
    """Puts a copy of another routing's LoRA beside the routers of an attached model, in its dtype, trainable."""
    base, routing = unwrapped(model), routing_of(model)
    _check_not_compiled(base)
    routing.lora = inject(base, routing, copy.deepcopy(lora.config))
    routing.lora.load_tensors(lora.tensors())
    routing.lora.to(next(iter(lora.tensors().values())).dtype)


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Runs the model dense inside the block, in this thread; a model without routers is dense anyway."""
    if not is_attached(model):
        yield model
        return
    with disabling(routing_of(model)):
        yield model


@contextmanager
def expert_choice(model: nn.Module) -> Iterator[nn.Module]:
    """Decides inside the block as training does, in evaluation mode, too, in this thread: the tokens of a sequence
    compete. Not causal, so without a cache: for comparing losses, not for generating. The method's own loss is left
    out. ConfigError where no router compares tokens."""
    routing = routing_of(model)
    if not routing.chooses:
        raise ConfigError(
            f"Routers of method {routing.config.name!r} decide about each unit alone: expert_choice is for "
            "Mixture-of-Depths."
        )
    with choosing(routing):
        yield model


@contextmanager
def fixed_routes(model: nn.Module, decisions: Mapping[Site, Injection]) -> Iterator[nn.Module]:
    """Replaces the routers' decisions inside the block, in this thread.

    `decisions`: per site one bool, or bools of the granularity's shape (`[B]` or `[B, T]`); sites not named execute. At
    sequence granularity they decide at prefill and then stick, as a router's would; of target `block` they may say how
    often a layer executes: 0, 1, or 2 to repeat it. ConfigError for repeats elsewhere.
    """
    routing = routing_of(model)
    unknown = [str(site) for site in decisions if site not in routing.states]
    if unknown:
        raise ConfigError(f"sites {unknown} are not routed; routed: {', '.join(map(str, routing.sites))}.")
    for site, value in decisions.items():
        check_repeats(routing.states[site], value)
    with injecting(routing, decisions):
        yield model


def save(model: nn.Module, directory: str | Path) -> Path:
    """Writes `routing_config.json` and `routers.safetensors`, atomically; returns the directory.

    A LoRA beside the routers goes into the same folder in PEFT's own files.
    Of a method that trains the base, too, this is the smaller part: `model.save_pretrained(folder)` writes the base,
    and `load` wants a model that was read from there.
    """
    routing = routing_of(model)
    data = {
        "config": routing.config.to_dict(),
        "sites": [str(site) for site in routing.sites],
        "base_model": adapter.identity(unwrapped(model), decoder_layers(unwrapped(model), routing.spec)),
        "budget": routing.budget,
        "speedup": routing.speedup,
        "control": routing.control,
        "calibration": None if routing.calibration is None else routing.calibration.to_dict(),
        "provenance": routing.provenance,
    }
    lora = None if routing.lora is None else (routing.lora.config_text(), routing.lora.tensors())
    return adapter.write(Path(directory), data, routing.tensors(), lora)


def load(model: M, directory: str | Path, strict: bool = True) -> M:
    """Attaches saved routers to the model they were made for, in place, and returns it.

    Raises AdapterError for files that are missing, damaged, of a newer format, or made for another model (with
    `strict=False`, a model of the same shape whose weights differ is accepted).
    """
    directory = Path(directory)
    data, tensors = adapter.read(directory)
    lora = adapter.read_lora(directory, data)
    base = unwrapped(model)
    config = config_from_dict(data["config"])
    found = adapter.identity(base, decoder_layers(base))
    adapter.check_identity(directory, data["base_model"], found, strict, config.trains_base)
    attach(model, config)
    routing = routing_of(model)
    try:
        routing.load_tensors(tensors)
        for path in routing.paths().values():
            path.to(base.dtype)
        if data.get("calibration") is not None:
            routing.calibration = Calibration.from_dict(data["calibration"])
        for name in ("budget", "control"):
            if data.get(name) is not None:
                data[name] = float(data[name])
        if not isinstance(data.get("provenance") or {}, dict):
            raise TypeError("a provenance that is no object")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        detach(model)
        raise AdapterError(
            f"{directory} does not fit its own configuration ({error}): save the routers again."
        ) from error
    if lora is not None:
        try:
            _load_lora(model, directory, *lora)
        except BaseException:
            detach(model)
            raise
    for router in routing.routers().values():
        router.asked = bool(router.threshold > float("-inf"))
    routing.budget, routing.speedup = data.get("budget"), data.get("speedup")
    routing.control = data.get("control")
    routing.provenance = dict(data.get("provenance") or {})
    return model


def _load_lora(model: nn.Module, directory: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Puts a saved LoRA beside the routers, in the base's dtype."""
    base, routing = unwrapped(model), routing_of(model)
    misfit = f"The LoRA in {directory} does not fit its own configuration or this model"
    try:
        made = read_config(config)
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"{misfit} ({error}): save the routers again.") from error
    routing.lora = inject(base, routing, made)
    try:
        routing.lora.load_tensors(tensors)
    except (ValueError, RuntimeError) as error:
        raise AdapterError(f"{misfit} ({error}): save the routers again.") from error
    routing.lora.to(base.dtype)
