"""The forms a routed model takes: half precision, copies, and the base on disk."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from dynadepth import detach, disabled, fixed_routes, routing_of
from small import FAMILIES, KINDS, bare, ids, ragged, routed

FAMILY = pytest.mark.parametrize("family", FAMILIES)
KIND = pytest.mark.parametrize(("granularity", "kv_policy"), KINDS)
BATCH = ragged([6, 3])


# ---- dtypes


@FAMILY
@KIND
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ["attach, then cast", "cast, then attach"])
def test_half_precision_models_keep_float32_routers(
    family: str, granularity: str, kv_policy: str, dtype: torch.dtype, order: str
) -> None:
    config = {"granularity": granularity, "kv_policy": kv_policy, "target": "block"}
    if order == "attach, then cast":
        model = routed(family, **config).to(dtype)
    else:
        model = routed(base=bare(family).to(dtype), **config)
    for router in routing_of(model).routers().values():
        assert {t.dtype for t in router.state_dict().values()} == {torch.float32}
    out = model(**BATCH)
    assert out.logits.dtype == dtype
    assert {logits.dtype for logits in out.depth_logits.values()} == {torch.float32}
    base = bare(family).to(dtype)
    with fixed_routes(model, {}):
        assert torch.equal(model(**BATCH).logits, base(**BATCH).logits)
    assert model.generate(**BATCH, max_new_tokens=3).shape == (2, 9)
    masked = model.train()(**BATCH, labels=BATCH["input_ids"].masked_fill(torch.arange(6) < 4, -100))
    masked.loss.backward()
    assert all(p.grad.dtype == torch.float32 for r in routing_of(model).routers().values() for p in r.parameters())


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_other_ways_to_cast(cast: str) -> None:
    model = getattr(routed(), cast)()
    wanted = {site: router.weight for site, router in routing_of(routed()).routers().items()}
    for site, router in routing_of(model).routers().items():
        assert torch.equal(router.weight, wanted[site])
    assert model.model.layers[0].self_attn.q_proj.weight.dtype != torch.float32
    assert torch.isfinite(model(**BATCH).logits).all()


@pytest.mark.parametrize("granularity", ["sequence", "route", "token"])  # by token the router is a matrix product
def test_autocast_leaves_routers_in_float32(granularity: str) -> None:
    model = routed(granularity=granularity)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**BATCH)
    assert {logits.dtype for logits in out.depth_logits.values()} == {torch.float32}
    first = next(iter(out.depth_logits))
    torch.testing.assert_close(out.depth_logits[first], model(**BATCH).depth_logits[first], atol=0.05, rtol=0.05)


# ---- copies


@FAMILY
@KIND
def test_a_deepcopy_is_a_model_of_its_own(family: str, granularity: str, kv_policy: str) -> None:
    model = routed(family, granularity=granularity, kv_policy=kv_policy)
    wanted = model.generate(**BATCH, max_new_tokens=5, do_sample=False)
    logits = model(**BATCH).logits
    twin = copy.deepcopy(model)
    assert routing_of(twin) is not routing_of(model)
    own = {id(module) for module in twin.modules()}
    for site, state in routing_of(twin).states.items():
        assert state.owner is routing_of(twin)
        assert state.router is not routing_of(model).states[site].router
        assert id(state.router) in own
        if state.project is not None:
            assert id(state.project.attention) in own
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with disabled(model), fixed_routes(model, {}):  # of the original alone
        assert torch.equal(twin(**BATCH).logits, logits)
    detach(model)
    assert torch.equal(twin.generate(**BATCH, max_new_tokens=5, do_sample=False), wanted)
    assert torch.equal(detach(twin)(**BATCH).logits, bare(family)(**BATCH).logits)


# ---- the base on disk


@pytest.mark.parametrize("tied", [False, True])
@FAMILY
def test_save_pretrained_saves_the_base_as_if_unrouted(tmp_path: Path, family: str, tied: bool) -> None:
    base = bare(family, tie_word_embeddings=tied)
    base.save_pretrained(tmp_path / "bare")
    routed(base=base).save_pretrained(tmp_path / "routed")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "routed" / name).read_bytes() == (tmp_path / "bare" / name).read_bytes()
    saved, wanted = (load_file(tmp_path / folder / "model.safetensors") for folder in ("routed", "bare"))
    assert saved.keys() == wanted.keys()
    assert all(torch.equal(saved[name], wanted[name]) for name in wanted)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "routed").eval()
    with disabled(base):
        assert torch.equal(again(input_ids=ids(1, 4)).logits, base(input_ids=ids(1, 4)).logits)
