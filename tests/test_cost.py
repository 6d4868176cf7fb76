"""The cost formulas against PyTorch's own counter, eager attention and eager experts, and against real caches."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedModel

import dynadepth
from dynadepth import MindSkipConfig, Site, StaticConfig, cost
from dynadepth.architectures import decoder_layers, spec_for
from dynadepth.errors import ConfigError
from dynadepth.lora import LoraSettings
from dynadepth.model import add_lora
from parity.models import FAMILIES, VOCABULARY, WIDTH, tiny

WORK = [(0, 5), (0, 9), (3, 4), (9, 1), (12, 5)]  # (past, tokens), below and beyond the window of 5


def ids(batch: int, length: int) -> torch.Tensor:
    """Token ids `[batch, length]`, none of them padding."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0))


def countable(name: str) -> PreTrainedModel:
    model = tiny(name)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    return model


def counted(model: PreTrainedModel, past: int, tokens: int) -> tuple[dict[str, int], list]:
    """FLOPs by module name ("" for all) of `tokens` after `past`, and the cache's layers afterwards."""
    row = ids(1, past + tokens)
    with torch.no_grad():
        cache = model(row[:, :past], use_cache=True).past_key_values if past else None
        with FlopCounterMode(display=False) as counter:
            out = model(row[:, past:], past_key_values=cache, use_cache=True)
    by_class = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    prefix = type(model).__name__
    return {name.removeprefix(prefix).lstrip("."): n for name, n in by_class.items()}, out.past_key_values.layers


def assert_costs_match(model: PreTrainedModel, past: int, tokens: int) -> None:
    counts, cache = counted(model, past, tokens)
    names, spec = {module: name for name, module in model.named_modules()}, spec_for(model)
    total = cost.head_flops(model, tokens)
    for index, layer in enumerate(decoder_layers(model)):
        parts = {"attention": getattr(layer, spec.attention), "mlp": getattr(layer, spec.mlp)}
        for target, module in parts.items():
            assert cost.flops(model, target, index, tokens, past) == counts[names[module]], (index, target)
        total += cost.flops(model, "block", index, tokens, past)
        held = sum(t.numel() * t.element_size() for t in (cache[index].keys, cache[index].values))
        assert cost.kv_bytes(model, index, past + tokens) == held, index
    assert total == counts["Global"]


@pytest.mark.parametrize("name", FAMILIES)
def test_formulas_equal_the_counter_and_the_cache(name):
    """Exactly, for each sublayer and for the whole model: nothing is counted twice or left out."""
    model = countable(name)
    for past, tokens in WORK:
        assert_costs_match(model, past, tokens)


def test_latent_attention_and_shared_experts():
    """DeepSeek caches compressed states and expands all of them again in every forward."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "moe_intermediate_size": 16}
    depth = {"num_hidden_layers": 2, "first_k_dense_replace": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}
    ranks = {"kv_lora_rank": 8, "q_lora_rank": 12, "v_head_dim": 6}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
    config = DeepseekV3Config(**sizes, **depth, **heads, **ranks, **experts)
    config._attn_implementation = "eager"
    model = DeepseekV3ForCausalLM(config).eval()
    model.set_experts_implementation("eager")
    for past, tokens in WORK:
        assert_costs_match(model, past, tokens)


def test_batches_cost_their_sequences():
    model = countable("llama")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids(3, 7))
    one = sum(cost.flops(model, "block", i, 7) for i in range(4)) + cost.head_flops(model, 7)
    assert counter.get_total_flops() == 3 * one
    assert cost.kv_bytes(model, 0, 7, batch=3) == 3 * cost.kv_bytes(model, 0, 7)


def test_unmerged_adapters_are_work_too():
    peft = pytest.importorskip("peft")
    model = countable("llama")
    plain = cost.flops(model, "attention", 1, 5)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), model)
    assert cost.flops(model, "attention", 1, 5) == plain + 2 * 5 * (2 * WIDTH + 2 * WIDTH)
    assert_costs_match(model.eval(), 3, 5)


def test_unknown_target_and_layer():
    model = tiny("llama")
    with pytest.raises(ConfigError, match="'attention'"):
        cost.flops(model, "attentoin", 0, 5)
    with pytest.raises(ConfigError, match="layer 4"):
        cost.flops(model, "mlp", 4, 5)


# ---- shares of a routed model: what the formulas say is what runs


def routed(name: str, **config) -> PreTrainedModel:
    return dynadepth.attach(countable(name), MindSkipConfig(layers=(0, 1, 2, 3), **config))


def dense_flops(model: PreTrainedModel, tokens: int, past: int = 0) -> int:
    return sum(cost.flops(model, "block", i, tokens, past) for i in range(4)) + cost.head_flops(model, tokens)


@pytest.mark.parametrize("target", ["attention", "mlp", "block"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral"])
def test_share_at_sequence_granularity(name, target):
    """Injected routes run no router, so that the counter sees the sublayers alone."""
    model = routed(name, target=target)
    route = {Site(i, target): i % 2 == 0 for i in range(4)}
    with dynadepth.fixed_routes(model, route):
        counts, _ = counted(model, 0, 9)
    share = cost.flops_share(model, {site: float(on) for site, on in route.items()}, 9, scored=9)
    assert round(share.model * dense_flops(model, 9)) == counts["Global"] + cost.router_flops(model, 9)
    of_target = sum(cost.flops(model, target, i, 9) for i in range(4))
    kept = sum(cost.flops(model, target, i, 9) for i in (0, 2)) + cost.router_flops(model, 9)
    assert share.target == pytest.approx(kept / of_target)
    everything = cost.flops_share(model, {}, 9, scored=9)
    assert everything.target == pytest.approx(1 + cost.router_flops(model, 9) / of_target)


def test_what_repeats_is_counted_twice():
    model = tiny("llama")
    n = len(decoder_layers(model))
    passes = dict(enumerate([2, 0, *[1] * (n - 2)]))
    one = cost.flops(model, "block", 0, 9)
    assert all(cost.flops(model, "block", layer, 9) == one for layer in range(n))
    dynadepth.attach(model, StaticConfig(target="block", layers="all", repeat=(0,)))
    for layer, extra in ((0, 1), (1, 2)):
        keep = {Site(i, "block"): float(1 + (i == layer) * extra) for i in range(n)}
        assert cost.flops_share(model, keep, 9).target == pytest.approx((n + extra) / n)
    mixed = {Site(layer, "block"): float(count) for layer, count in passes.items()}
    assert cost.flops_share(model, mixed, 9).target == pytest.approx(1.0)


def test_routers_are_counted():
    """By hand: PyTorch's counter has no formula for a matrix times a vector, which is what a linear router is."""
    by_token, by_sequence = routed("llama", granularity="token"), routed("llama")
    assert cost.router_flops(by_token, 9) == cost.router_flops(by_token, 9, past=3) == 4 * 9 * 2 * WIDTH
    assert cost.router_flops(by_sequence, 9) == 4 * 2 * WIDTH
    assert cost.router_flops(by_sequence, 1, past=9) == 0  # the route is kept
    with dynadepth.fixed_routes(by_sequence, {}):
        counts, _ = counted(by_sequence, 0, 9)
    assert counts["Global"] == dense_flops(by_sequence, 9)


@pytest.mark.parametrize("policy", ["project", "drop"])
@pytest.mark.parametrize("kept_tokens", [0, 4, 8])
def test_share_at_token_granularity(policy, kept_tokens):
    """8 tokens, some of which execute: fewer queries, under `drop` fewer keys, under `project` all of them."""
    model = routed("llama", granularity="token", kv_policy=policy)
    execute = torch.arange(8).unsqueeze(0) < kept_tokens
    with dynadepth.fixed_routes(model, {Site(i, "attention"): execute for i in range(4)}):
        counts, cache = counted(model, 0, 8)
    keep = {Site(i, "attention"): kept_tokens / 8 for i in range(4)}
    share = cost.flops_share(model, keep, 8, scored=8)
    assert round(share.model * dense_flops(model, 8)) == counts["Global"] + cost.router_flops(model, 8)
    held = sum(t.numel() for layer in cache for t in (layer.keys, layer.values) if t is not None)
    dense_kv = sum(cost.kv_bytes(model, i, 8) for i in range(4))
    assert cost.kv_share(model, keep, 8) == pytest.approx(held * 4 / dense_kv)


@pytest.mark.parametrize(("granularity", "taken"), [("sequence", 0.75), ("token", 1.0)])
def test_skip_paths_are_counted_for_what_takes_them(granularity, taken):
    """Sequences that skip; at token granularity all tokens, since each may be followed by one that skips."""
    site, shares = Site(1, "attention"), {}
    for path in ("identity", "linear"):
        model = routed("llama", granularity=granularity, skip_path=path, skip_rank=5)
        shares[path] = cost.flops_share(model, {site: 0.25}, 9, scored=9).model
    work = (shares["linear"] - shares["identity"]) * dense_flops(model, 9)
    assert work == pytest.approx(taken * 2 * 9 * 4 * 5 * WIDTH)
    path = dynadepth.routing_of(model).states[site].skip_path
    with FlopCounterMode(display=False) as counter:
        path(torch.zeros(1, 9, WIDTH))
    assert counter.get_total_flops() == 2 * 9 * 4 * 5 * WIDTH


@pytest.mark.parametrize("target", ["attention", "mlp", "block"])
@pytest.mark.parametrize(("granularity", "policy"), [("sequence", "project"), ("token", "project"), ("token", "drop")])
def test_a_lora_beside_the_routers_is_work_of_the_routed_model_alone(target, granularity, policy):
    if (target, policy) == ("mlp", "drop"):
        pytest.skip("an MLP keeps no keys and values to drop")
    model = routed("llama", target=target, granularity=granularity, kv_policy=policy)
    dense = dense_flops(model, 8)
    add_lora(model, LoraSettings(2))
    assert dense_flops(model.eval(), 8) == dense
    execute = torch.arange(8).unsqueeze(0) < 5
    layers = {Site(i, target): (execute if granularity == "token" else i % 2 == 0) for i in range(4)}
    with dynadepth.fixed_routes(model, layers):
        counts, _ = counted(model, 0, 8)
    keep = {site: 5 / 8 if granularity == "token" else float(on) for site, on in layers.items()}
    share = cost.flops_share(model, keep, 8, scored=8)
    assert round(share.model * dense) == counts["Global"] + cost.router_flops(model, 8)
    with dynadepth.disabled(model):
        assert counted(model, 0, 8)[0]["Global"] == dense
    part = sum(cost.flops(model, target, i, 8) for i in range(4))
    own = sum(costs[p].flops(8, 0) for costs in cost.sublayer_costs(model, adapted=True) for p in cost.PARTS[target])
    assert cost.flops_share(model, {}, 8).target == pytest.approx((own + cost.router_flops(model, 8)) / part)


def test_kv_share_weights_layers_by_what_they_store():
    """Beyond the window a sliding layer stores less, so that skipping it saves less."""
    model = routed("gemma3")
    stored = [cost.kv_bytes(model, i, 20) for i in range(4)]
    assert stored[0] == stored[2] < stored[1] == stored[3]
    assert cost.kv_share(model, {Site(0, "attention"): 0.0}, 20) == pytest.approx(1 - stored[0] / sum(stored))
    assert cost.kv_share(routed("gemma3", target="mlp"), {Site(0, "mlp"): 0.0}, 20) == 1.0
