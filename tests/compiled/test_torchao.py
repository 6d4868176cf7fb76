"""Routing and compiled decode over weights that torchao quantised."""

from __future__ import annotations

import pytest
import torch

import dynadepth
from dynadepth import fixed_routes, routing_of
from dynadepth.compiled.linear import SmallInt8Linear
from small import bare, mixed, ragged, routed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Int8Tensor does not implement _stable_hash_for_caching:UserWarning"),
]
quantization = pytest.importorskip("torchao.quantization", exc_type=ImportError)


def quantized(config: object) -> torch.nn.Module:
    model = bare("llama")
    quantization.quantize_(model, config, lambda module, _: type(module) is torch.nn.Linear)
    return model


def test_routes_over_int8_weights_and_small_products() -> None:
    config, batch = quantization.Int8WeightOnlyConfig(), ragged((3, 7, 5))
    model = routed(base=quantized(config), skip_path="linear", skip_rank=4)
    with fixed_routes(model, mixed(3)):
        expected = model.generate(**batch, max_new_tokens=8, do_sample=False)
    dynadepth.compile(model)
    assert isinstance(model.model.layers[0].mlp.up_proj, SmallInt8Linear)
    with fixed_routes(model, mixed(3)):
        assert torch.equal(model.generate(**batch, max_new_tokens=8, do_sample=False), expected)
    dynadepth.detach(model)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert not hasattr(model.model.layers[0].mlp.up_proj, "int8_parts")


def test_routes_over_int4_weights() -> None:
    """What routes a model with torchao's int4 weights says what the same weights say as plain ones; compiled, too."""
    config, batch = quantization.IntxWeightOnlyConfig(torch.int4, quantization.PerGroup(8)), ragged((3, 7, 5))
    base, plain = quantized(config), bare("llama")
    layers = {name: module for name, module in base.named_modules() if type(module) is torch.nn.Linear}
    for name, module in layers.items():
        plain.get_submodule(name).weight.data = module.weight.dequantize()
    coarse = sum(not torch.allclose(w, v) for w, v in zip(bare("llama").parameters(), plain.parameters(), strict=True))
    assert coarse == len(layers)
    model, plain = (routed(base=one, skip_path="linear", skip_rank=4) for one in (base, plain))
    with fixed_routes(model, mixed(3)), fixed_routes(plain, mixed(3)):
        expected = plain(**batch).logits
        torch.testing.assert_close(model(**batch).logits, expected)
        tokens = plain.generate(**batch, max_new_tokens=8, do_sample=False)
        dynadepth.compile(model)
        assert torch.equal(model.generate(**batch, max_new_tokens=8, do_sample=False), tokens)


def test_skipped_attentions_contribute_nothing_to_a_quantised_model() -> None:
    batch = ragged((3, 7, 5))
    model = dynadepth.attach(quantized(quantization.Int8WeightOnlyConfig()), dynadepth.StaticConfig(skip=(1, 3)))
    cache = model(**batch).past_key_values
    assert [layer.is_initialized for layer in cache.layers] == [True, False, True, False]
    assert len(routing_of(model).sites) == 2
