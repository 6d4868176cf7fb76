"""Pruned twins against a hand-made reference (the dense model with outputs zeroed) and against the routed model."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

import dynadepth
from dynadepth import MindSkipConfig, Site, cost
from dynadepth.architectures import decoder_layers, spec_for
from dynadepth.benchmark import bare_twin, pruned_twin
from dynadepth.benchmark.memory import cache_bytes
from dynadepth.errors import ConfigError
from dynadepth.lora import LoraSettings
from dynadepth.model import add_lora
from dynadepth.routing.forward import RoutedModel
from dynadepth.routing.router import AbstractRouter
from dynadepth.routing.sublayer import RoutedSublayer
from parity.models import FAMILIES, VOCABULARY, tiny

ROUTES = {
    "the first attention": "0.attention",
    "all attentions but one": "0.attention 1.attention 3.attention",
    "all attentions": "0.attention 1.attention 2.attention 3.attention",
    "an MLP and an attention": "1.mlp 2.attention",
    "the first block and an attention": "0.block 2.attention",
    "the last block": "3.block",
    "all blocks": "0.block 1.block 2.block 3.block",
}


def ids(batch: int, length: int) -> torch.Tensor:
    """Token ids `[batch, length]`, none of them padding."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0))


def sites(text: str) -> list[Site]:
    return [Site.parse(part) for part in text.split()]


@contextmanager
def zeroed(model: PreTrainedModel, skipped: list[Site]) -> Iterator[None]:
    """The reference: every sublayer runs, those skipped return zeros (a norm behind them maps zeros to zeros)."""
    spec, layers = spec_for(model), decoder_layers(model)

    def zero(module, args, output):
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    modules = [getattr(layers[site.layer], getattr(spec, part)) for site in skipped for part in cost.PARTS[site.target]]
    handles = [module.register_forward_hook(zero) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def padded_batch() -> dict[str, torch.Tensor]:
    batch, mask = ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    batch[0, :5], mask[0, :5] = 0, 0
    return {"input_ids": batch, "attention_mask": mask}


def generated(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and scores of a greedy generation from a left-padded batch, past the tiny models' sliding window."""
    out = model.generate(
        **padded_batch(), max_new_tokens=9, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize("name", FAMILIES)
def test_twin_equals_the_zeroed_model(name, route):
    model, skipped = tiny(name), sites(route)
    twin = pruned_twin(model, skipped)
    real = padded_batch()["attention_mask"].bool()
    with torch.no_grad(), zeroed(model, skipped):
        expected = model(**padded_batch()).logits
        expected_tokens, expected_scores = generated(model)
    with torch.no_grad():
        assert torch.equal(twin(**padded_batch()).logits[real], expected[real])
    tokens, scores = generated(twin)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(scores, expected_scores)
    assert scores.std() > 0.1  # a reference of constants would prove nothing


@pytest.mark.parametrize("name", FAMILIES)
def test_cache_of_a_twin_holds_nothing_for_what_is_absent(name):
    """Lengths, positions and windows are those of the attentions that are left, though layer 0 has none."""
    model = tiny(name)
    twin = pruned_twin(model, sites("0.attention 1.mlp 2.attention"))
    with torch.no_grad():
        cache = twin(ids(2, 20), use_cache=True).past_key_values
    assert cache.get_seq_length() == 20
    assert cache_bytes(cache) == sum(cost.kv_bytes(model, i, 20, batch=2) for i in (1, 3))
    assert len(cache.layers) == 2


@pytest.mark.parametrize("target", ["attention", "mlp", "block"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "olmo2", "gpt_neox", "granite", "mixtral"])
def test_twin_equals_the_routed_model_under_the_same_route(name, target):
    model = dynadepth.attach(tiny(name), MindSkipConfig(target=target, layers=(0, 1, 2, 3)))
    skipped = [Site(0, target), Site(3, target)]
    twin = pruned_twin(model, skipped)
    with torch.no_grad(), dynadepth.fixed_routes(model, dict.fromkeys(skipped, False)):
        expected = model(ids(2, 12)).logits
        expected_tokens, expected_scores = generated(model)
    with torch.no_grad():
        torch.testing.assert_close(twin(ids(2, 12)).logits, expected)
    tokens, scores = generated(twin)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(scores, expected_scores)


def test_twins_share_weights_and_leave_the_model_alone():
    base = tiny("gemma3")
    base.lm_head.weight = base.model.embed_tokens.weight
    model = dynadepth.attach(base, MindSkipConfig(layers=(0, 2)))
    config, keys = model.config.to_dict(), set(model.state_dict())
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    storages = {p.data_ptr() for p in (*model.parameters(), *model.buffers())}
    with torch.no_grad():
        before = model(ids(1, 8)).logits
    twin = pruned_twin(model, sites("0.attention 1.block"))
    assert {p.data_ptr() for p in (*twin.parameters(), *twin.buffers())} <= storages
    assert not {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}
    assert twin.lm_head.weight is twin.model.embed_tokens.weight  # tied as before
    assert model.config.to_dict() == config
    assert set(model.state_dict()) == keys
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    with torch.no_grad():
        assert torch.equal(model(ids(1, 8)).logits, before)


def test_nothing_of_the_routing_is_left_in_a_twin():
    model = dynadepth.attach(tiny("llama"), MindSkipConfig(layers=(0, 1)))
    machinery = (RoutedModel, RoutedSublayer, AbstractRouter)
    assert any(isinstance(m, machinery) for m in model.modules())
    for twin in (bare_twin(model), pruned_twin(model, sites("0.attention"))):
        assert not any(isinstance(m, machinery) or hasattr(m, "depth_state") for m in twin.modules())
        assert not any(m.training for m in twin.modules())
    assert all(type(m).__module__.split(".")[0] != "dynadepth" for m in bare_twin(model).modules())


def test_absent_sublayers_cost_nothing():
    model = tiny("llama")
    model.set_attn_implementation("eager")
    twin = pruned_twin(model, sites("0.attention 1.mlp 2.block"))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        twin(ids(1, 7))
    kept = [("mlp", 0), ("attention", 1), ("block", 3)]
    assert counter.get_total_flops() == sum(cost.flops(model, *k, 7) for k in kept) + cost.head_flops(model, 7)


def test_twin_of_a_model_with_adapters():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny("llama"), config)
    with torch.no_grad():
        adapted, plain = bare_twin(model)(ids(1, 8)).logits, bare_twin(tiny("llama"))(ids(1, 8)).logits
        assert torch.equal(adapted, model.eval()(input_ids=ids(1, 8)).logits)
        assert not torch.allclose(adapted, plain)
        pruned_twin(model, sites("0.attention 2.block"))(ids(1, 8))


def test_twins_have_no_lora_of_the_routers():
    model = dynadepth.attach(tiny("llama"), MindSkipConfig(layers=(0, 2)))
    add_lora(model, LoraSettings(2))
    with torch.no_grad():
        for _, parameter in dynadepth.routing_of(model).lora.named_parameters():
            parameter.fill_(0.3)
        twin = bare_twin(model)
        assert list(twin.state_dict()) == list(tiny("llama").state_dict())
        assert torch.equal(twin(ids(1, 8)).logits, tiny("llama").eval()(ids(1, 8)).logits)
        pruned_twin(model, sites("0.attention"))(ids(1, 8))
        with dynadepth.fixed_routes(model, {}):  # the given one stays
            assert not torch.allclose(model.eval()(ids(1, 8)).logits, twin(ids(1, 8)).logits)


def test_bad_sites_are_refused():
    with pytest.raises(ConfigError, match=r"7\.attention does not exist.*0 to 3"):
        pruned_twin(tiny("llama"), sites("7.attention"))
    with pytest.raises(ConfigError, match="'head'"):
        pruned_twin(tiny("llama"), [Site(0, "head")])
