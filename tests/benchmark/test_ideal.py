"""The ideal saving: bytes read by a decode step, counted by hand, and FLOPs of a prefill."""

import pytest
import torch

import dynadepth
from dynadepth import MindSkipConfig, Site, StaticConfig, cost
from dynadepth.benchmark.ideal import bytes_moved, ideal_saving
from dynadepth.lora import LoraSettings
from dynadepth.model import add_lora
from dynadepth.routed import routing_of
from small import ALL, LAYERS, WIDTH, bare, routed

SITES = [Site(layer, "attention") for layer in ALL]
LENGTH, BATCH = 20, 3


def parameters(*modules: torch.nn.Module) -> int:
    """Elements of weight matrices."""
    return sum(p.numel() for module in modules for p in module.parameters() if p.dim() > 1)


def dense_bytes(model, batch: int) -> int:
    """Every matrix but the embedding once, and all keys and values."""
    read = parameters(model.lm_head, *model.model.layers) * 4
    return read + sum(cost.kv_bytes(model, layer, LENGTH, batch) for layer in ALL)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_dense_reads_every_matrix_and_every_key(family):
    model = dynadepth.attach(bare(family), StaticConfig(skip=(1,)))
    executed = {site: [1.0] * BATCH for site in routing_of(model).sites}
    moved = bytes_moved(model, executed, BATCH, LENGTH)
    assert moved.dense == moved.routed
    dynadepth.detach(model)
    assert moved.dense == dense_bytes(model, BATCH)


def test_a_skipped_attention_reads_neither_weights_nor_keys():
    model = dynadepth.attach(bare(), StaticConfig(skip=(1,)))
    moved = bytes_moved(model, {Site(1, "attention"): [0.0] * BATCH}, BATCH, LENGTH)
    attention = parameters(model.model.layers[1].self_attn) * 4
    assert moved.dense - moved.routed == attention + cost.kv_bytes(model, 1, LENGTH, BATCH)


def test_weights_are_read_once_if_any_row_executes():
    model = dynadepth.attach(bare(), MindSkipConfig(layers=ALL))
    moved = bytes_moved(model, {Site(1, "attention"): [0.0, 1.0, 0.0]}, BATCH, LENGTH)
    assert moved.dense - moved.routed == cost.kv_bytes(model, 1, LENGTH, 2)


def test_by_token():
    """Half of the tokens skip: dropped keys are neither there nor looked at by those that skip."""
    for policy in ("project", "drop"):
        model = dynadepth.attach(bare(), MindSkipConfig(layers=(1,), granularity="token", kv_policy=policy))
        moved = bytes_moved(model, {Site(1, "attention"): [0.5]}, BATCH, LENGTH)
        attention, keys = parameters(model.model.layers[1].self_attn) * 4, cost.kv_bytes(model, 1, LENGTH, BATCH)
        made = cost.sublayer_costs(model)[1]["attention"].key_value_weights * 4 if policy == "project" else 0
        seen = 0.5 if policy == "project" else 0.25
        router = WIDTH * 4
        assert moved.dense - moved.routed == 0.5**BATCH * (attention - made) + (1 - seen) * keys - router


def test_a_skip_path_is_read_where_a_row_skips():
    model = routed(skip_path="linear", skip_rank=4)
    path = cost.path_weights(model, SITES[1])
    assert path > 0
    skipped = bytes_moved(model, {SITES[1]: [0.0]}, 1, LENGTH)
    plain = bytes_moved(routed(), {SITES[1]: [0.0]}, 1, LENGTH)
    assert skipped.routed - plain.routed == path * 4
    executed = bytes_moved(model, {SITES[1]: [1.0]}, 1, LENGTH)
    assert executed.routed == executed.dense


def test_a_lora_of_the_routers_is_read_where_its_layer_executes():
    plain, model = routed(), routed()
    add_lora(model, LoraSettings(2))
    sizes = {name: p.numel() * 4 for name, p in routing_of(model).lora.named_parameters()}
    executed = {site: [1.0] for site in SITES}
    before, after = (bytes_moved(one, executed, 1, LENGTH) for one in (plain, model))
    assert before.dense == after.dense
    assert after.routed - before.routed == sum(sizes.values())
    assert ideal_saving(model, executed, "decode", 1, 64, 8) < 0
    skipped = {**executed, SITES[1]: [0.0]}
    saved, saved_before = (
        bytes_moved(one, executed, 1, LENGTH).routed - bytes_moved(one, skipped, 1, LENGTH).routed
        for one in (model, plain)
    )
    assert saved - saved_before == sum(size for name, size in sizes.items() if ".layers.1.self_attn." in name)


def test_saving_by_phase():
    model = dynadepth.attach(bare(), MindSkipConfig(layers=ALL))
    kept = {site: [float(site.layer > 1)] for site in SITES}
    prefill = ideal_saving(model, kept, "prefill", 1, 64, 8)
    assert prefill == 1 - cost.flops_share(model, {site: shares[0] for site, shares in kept.items()}, 64).model
    decode = ideal_saving(model, kept, "decode", 1, 64, 8)
    moved = bytes_moved(model, kept, 1, 68)
    assert decode == 1 - moved.routed / moved.dense
    assert 0 < decode < 2 / LAYERS
