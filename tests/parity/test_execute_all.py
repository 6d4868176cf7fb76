"""Semantic 1: with every site executing the routed model is the bare one bit for bit, and `detach` restores it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dynadepth
from dynadepth import DepthConfig
from dynadepth.errors import ConfigError
from dynadepth.routing.registry import import_modules, subclasses
from dynadepth.routing.target import target_named

from .matrix import CELLS, MATRIX, SHORT, Cell, inputs, over
from .models import tiny

import_modules("dynadepth.methods")


def accepts(method: type[DepthConfig], cell: Cell) -> bool:
    """Is this way of routing one of the method's?"""
    try:
        method(**cell.settings)
    except ConfigError:
        return False
    return True


METHODS = [(method, cell) for method in subclasses(DepthConfig) for cell in CELLS if accepts(method, cell)]


def generated(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens `[B, T + n]` and logits `[B, n, V]` of a greedy generation."""
    out = model.generate(**batch, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True)
    return out.sequences, torch.stack(out.logits, 1)


def form(model: Any) -> list[tuple[Any, ...]]:
    """Everything that `attach` may touch: each module's type, attributes and hooks, each parameter's
    `requires_grad`."""
    return [
        (
            name,
            type(module),
            sorted(set(vars(module)) - {"_output_capturing_hooks_installed"}),
            (len(module._forward_hooks), len(module._forward_pre_hooks)),
            {key: (id(p), p.requires_grad) for key, p in module.named_parameters(recurse=False)},
        )
        for name, module in model.named_modules()
    ]


@torch.no_grad()
@over(MATRIX)
def test_execute_all_is_the_bare_model(name: str, cell: Cell) -> None:
    model, batch = tiny(name), inputs()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() > 1)  # frozen norms: `detach` must put back which ones were trainable
    before, wanted, steps = form(model), model(**batch).logits, generated(model, batch)
    unpadded = model(input_ids=batch["input_ids"]).logits

    cell.attach(model)
    assert torch.equal(model(**batch).logits, wanted)
    assert torch.equal(model(input_ids=batch["input_ids"]).logits, unpadded)
    assert torch.equal(model(**batch, use_cache=False).logits, wanted)
    for found, want in zip(generated(model, batch), steps, strict=True):
        assert torch.equal(found, want)
    model.train()
    assert torch.equal(model(**batch).logits, wanted), "the masked path"
    model.eval()

    assert dynadepth.detach(model) is model
    assert form(model) == before
    assert torch.equal(model(**batch).logits, wanted)
    for found, want in zip(generated(model, batch), steps, strict=True):
        assert torch.equal(found, want)


def test_every_method_has_a_cell() -> None:
    general = {method for method in subclasses(DepthConfig) if target_named(method.target).general}
    assert {method for method, _ in METHODS} >= general


@pytest.mark.parametrize(("method", "cell"), METHODS, ids=[f"{method.name}-{cell}" for method, cell in METHODS])
def test_every_method_can_execute_all(method: type[DepthConfig], cell: Cell) -> None:
    model, batch = tiny("mixtral" if method.watches_experts else "llama"), inputs()
    wanted, steps = model(**batch).logits, generated(model, batch)
    dynadepth.attach(model, method(**cell.settings))
    with dynadepth.fixed_routes(model, {}):
        assert torch.equal(model(**batch).logits, wanted)
        for found, want in zip(generated(model, batch), steps, strict=True):
            assert torch.equal(found, want)


@torch.no_grad()
@over(SHORT)
def test_disabled_is_the_bare_model_whatever_the_routers_say(name: str, cell: Cell) -> None:
    model, batch = tiny(name), inputs()
    wanted = model(**batch).logits
    cell.attach(model)
    with torch.no_grad():
        for router in dynadepth.routing_of(model).routers().values():
            router.threshold.fill_(float("inf"))
    assert not torch.equal(model(**batch).logits, wanted)
    with dynadepth.disabled(model):
        assert torch.equal(model(**batch).logits, wanted)
