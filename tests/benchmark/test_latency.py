"""The benchmark's cells and its bookkeeping on tiny models. Times themselves are not tested."""

import math
from itertools import pairwise

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

import dynadepth
from dynadepth import MindSkipConfig, Site, StaticConfig, cost
from dynadepth.benchmark import cut_prompts, pruned_twin, run
from dynadepth.benchmark.latency import execute_all_copy
from dynadepth.benchmark.memory import cache_bytes, peak_watch
from dynadepth.benchmark.timing import FEWEST, Work, _rotated, check_length, measure, spread
from dynadepth.benchmark.variants import Variant
from dynadepth.errors import ConfigError, DataError, UnsupportedModelError
from parity.models import VOCABULARY, tiny

CONTRACT = {
    "variant", "granularity", "dtype", "batch", "context", "phase", "unit", "dense_s", "routed_s", "pruned_s", "spread",
    "speedup", "skip_efficiency", "kv_bytes_dense", "kv_bytes_routed",
}  # fmt: skip


def ids(batch: int, length: int) -> torch.Tensor:
    """Token ids `[batch, length]`, none of them padding."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0))


def routed(name: str = "llama", skip: dict[int, bool] | None = None, **config) -> PreTrainedModel:
    """A routed tiny model; `skip` sets routers to skip always or never, the others decide by their input."""
    model = dynadepth.attach(tiny(name), MindSkipConfig(layers=(0, 1, 2, 3), **config))
    for site, router in dynadepth.routing_of(model).routers().items():
        torch.manual_seed(site.layer)
        torch.nn.init.normal_(router.weight)
        if skip is not None:
            router.threshold.fill_(float("inf") if skip.get(site.layer, False) else float("-inf"))
    return model


def cells_of(model: PreTrainedModel, batch: int = 1, context: int = 9, **options) -> dict[tuple[str, str], dict]:
    """Cells by variant and phase."""
    cells = run(model, ids(batch, context + 3), batches=[batch], contexts=[context], new_tokens=3, repeats=2, **options)
    return {(cell["variant"], cell["phase"]): cell for cell in cells}


def kv(model: PreTrainedModel, layers: list[int], length: int, batch: int = 1) -> int:
    return sum(cost.kv_bytes(model, i, length, batch) for i in layers)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox"])
def test_cells_of_a_route_that_all_rows_share(name):
    model = routed(name, skip={0: True, 2: True})
    cells = cells_of(model, batch=2)
    assert list(cells) == [
        ("routed", "prefill"), ("routed", "decode"),
        ("execute_all", "prefill"), ("execute_all", "decode"), ("execute_all", "generate"),
    ]  # fmt: skip
    for (variant, phase), cell in cells.items():
        assert set(cell) >= CONTRACT
        length = 9 if phase == "prefill" else 12
        assert cell["kv_bytes_dense"] == kv(model, [0, 1, 2, 3], length, batch=2)
        assert cell["speedup"] == cell["dense_s"] / cell["routed_s"]
        assert cell["spread"] == max(cell["spreads"].values())
        assert (cell["batch"], cell["context"], cell["dtype"]) == (2, 9, "float32")
        assert cell["granularity"] == "sequence"
        if variant == "routed":
            assert cell["kv_bytes_routed"] == kv(model, [1, 3], length, batch=2)
            assert cell["keep_ratio"] == 0.5
            ideal = cell["dense_s"] - cell["pruned_s"]
            efficiency = (cell["dense_s"] - cell["routed_s"]) / ideal
            assert cell["skip_efficiency"] == (pytest.approx(efficiency) if ideal > 0 else None)
        else:
            assert cell["kv_bytes_routed"] == cell["kv_bytes_dense"]
            assert cell["pruned_s"] is cell["skip_efficiency"] is None
    assert {cell["unit"] for cell in cells.values()} == {"s/prefill", "s/token", "s/call"}


def test_what_skip_paths_remember_is_counted_beside_the_keys():
    """Two sites skip for two rows: the latest state and the sum of all, 5 float32 each, and the count."""
    model = routed(skip={0: True, 2: True}, skip_path="linear", skip_rank=5)
    cells = cells_of(model, batch=2)
    for phase, length in (("prefill", 9), ("decode", 12)):
        cell = cells["routed", phase]
        assert cell["state_bytes_routed"] == 2 * 2 * (5 + 5 + 1) * 4
        assert cell["kv_bytes_routed"] == kv(model, [1, 3], length, batch=2)
        assert cells["execute_all", phase]["state_bytes_routed"] == 0
    assert cells["routed", "prefill"]["reserved_bytes_routed"] is None
    assert cells["routed", "decode"]["reserved_bytes_routed"] >= kv(model, [1, 3], 12, batch=2)


def test_mixed_routes_have_no_pruned_twin_but_a_nominal_time():
    """Rows that decide differently: no one model is the ideal, so it is interpolated by FLOPs."""
    model = routed()
    with torch.no_grad():
        routes = model(ids(3, 12)[:, :9], use_cache=True).past_key_values.routes
    assert any(len(set(rows)) == 2 for rows in routes.values()), "this test needs rows that disagree"
    cell = cells_of(model, batch=3)["routed", "decode"]
    assert cell["pruned_s"] is cell["skip_efficiency"] is None
    assert cell["keep_ratio"] == pytest.approx(sum(map(sum, routes.values())) / 12)
    assert math.isfinite(cell["nominal_s"])
    executed = sum(kv(model, [site.layer], 12) * sum(rows) for site, rows in routes.items())
    assert cell["kv_bytes_routed"] == executed < cell["kv_bytes_dense"]


@pytest.mark.parametrize("policy", ["project", "drop"])
def test_token_granularity(policy):
    model = routed(granularity="token", kv_policy=policy)
    cells = cells_of(model, context=20)
    cell = cells["routed", "prefill"]
    assert cell["granularity"] == "token"
    assert 0 < cell["keep_ratio"] < 1
    assert cell["pruned_s"] is None
    same = cell["kv_bytes_routed"] == cell["kv_bytes_dense"]
    assert same == (policy == "project")


def test_execute_all_runs_every_site_and_leaves_the_model_alone():
    model = routed(skip={0: True, 1: True})
    before = [router.threshold.item() for router in dynadepth.routing_of(model).routers().values()]
    copy = execute_all_copy(model)
    with torch.no_grad(), dynadepth.recording() as record, dynadepth.disabled(model):
        assert torch.equal(copy(ids(1, 9)).logits, model(ids(1, 9)).logits)
    assert record.keep_ratio().routed == 1.0
    assert [router.threshold.item() for router in dynadepth.routing_of(model).routers().values()] == before
    static = execute_all_copy(dynadepth.attach(tiny("llama"), StaticConfig(skip=(1,))))
    with torch.no_grad(), dynadepth.recording() as record:
        static(ids(1, 9))
    assert record.keep_ratio().routed == 1.0


def test_execute_all_asks_the_routers_at_a_budget_of_one_too():
    model, asked = routed(skip={0: True}), []
    dynadepth.set_budget(model, attention=1.0)
    copy = execute_all_copy(model)
    routers = dynadepth.routing_of(copy).routers().values()
    for router in routers:
        router.register_forward_pre_hook(lambda router, _: asked.append(router))
    with torch.no_grad():
        copy(ids(1, 9))
    assert len(asked) == len(routers)


def test_compiled_models_stand_beside_the_plain_one(monkeypatch):
    made = []

    def compiling(one: PreTrainedModel) -> PreTrainedModel:
        made.append(one)
        if len(made) == 5:  # a pruned twin
            raise UnsupportedModelError("no cache to step on.")
        return one

    monkeypatch.setattr("dynadepth.benchmark.latency.compile_model", compiling)
    model = routed(skip={0: True})
    with pytest.warns(UserWarning, match="no cache to step on. It is timed uncompiled"):
        cells = cells_of(model, compare=[Variant.parse("static@0.5")], compiled=True)
    assert len(made) == len({id(one) for one in made}) == 6  # dense, routed, execute_all, static; two pruned twins
    assert model not in made
    assert all(cell["plain_s"] > 0 for cell in cells.values())
    for (variant, _), cell in cells.items():
        assert {"plain", "dense", variant} <= set(cell["tokens_per_s"])
    assert all(cell["plain_s"] is None for cell in cells_of(model).values())


def test_static_routes_and_models_without_routers():
    static = dynadepth.attach(tiny("llama"), StaticConfig(skip=(1, 2)))
    cells = cells_of(static, variants=["routed"])
    assert cells["routed", "decode"]["kv_bytes_routed"] == kv(static, [0, 3], 12)
    cells = cells_of(tiny("llama"))
    assert list(cells) == [("dense", "prefill"), ("dense", "decode")]
    assert cells["dense", "decode"]["routed_s"] is cells["dense", "decode"]["speedup"] is None


def test_nothing_is_skipped():
    """Pruned is dense then: no saving to compare with."""
    cell = cells_of(routed(skip={}))["routed", "prefill"]
    assert cell["keep_ratio"] == 1.0
    assert cell["pruned_s"] is not None


def test_progress_names_the_cell():
    seen: list[str] = []
    cells_of(routed(skip={0: True}), progress=seen.append)
    assert "batch 1, context 9: round 2 of 2" in seen


def test_samples_are_of_filled_caches():
    """Each model is timed once a round and once a token, on caches that hold what they should."""
    work, model = Work(ids(1, 12), 9), tiny("llama")
    samples = measure({"a": model, "b": model}, work, repeats=3, generate=["b"])
    assert [len(samples["a"].prefill), len(samples["a"].decode), len(samples["a"].generate)] == [3, 9, 0]
    assert len(samples["b"].generate) == 3
    assert samples["a"].kv_bytes == {"prefill": kv(model, [0, 1, 2, 3], 9), "decode": kv(model, [0, 1, 2, 3], 12)}


def test_steps_may_start_ahead_of_the_context():
    """What lies between is read untimed, and `generate()` writes it, too."""
    work, model = Work(ids(1, 14), 9, ahead=3), tiny("llama")
    assert (work.filled, work.new_tokens) == (12, 2)
    one = measure({"a": model}, work, repeats=2, generate=["a"])["a"]
    assert [len(one.prefill), len(one.decode), len(one.generate)] == [2, 4, 2]
    assert one.kv_bytes == {"prefill": kv(model, [0, 1, 2, 3], 9), "decode": kv(model, [0, 1, 2, 3], 14)}


@pytest.mark.parametrize("n", range(8))
def test_places_are_spread_over_the_rounds(n):
    names = [str(i) for i in range(n)]
    rounds = [_rotated(names, round_) for round_ in range(FEWEST * max(n, 1))]
    for name in names:
        places = [order.index(name) for order in rounds]
        assert sorted(places) == sorted(FEWEST * list(range(n))), "each place equally often"
        for start in range(0, len(places), FEWEST):
            first = sorted(places[start : start + FEWEST])
            assert all(later - sooner >= n // FEWEST for sooner, later in pairwise(first))
    assert sorted(_rotated(names, -1)) == names, "the one that warms up"


def test_tokens_keys_that_are_missing_are_noticed():
    """Layers that keep those of every token, routed or not, must hold them."""
    model = dynadepth.attach(tiny("llama"), MindSkipConfig(layers=(1, 2), granularity="token"))
    for layer in range(4):
        with torch.no_grad():
            cache = model(ids(2, 9), use_cache=True).past_key_values
        check_length(model, cache, 9)
        cache.layers[layer].keys = cache.layers[layer].keys[:, :, :5]
        with pytest.raises(AssertionError, match="5 keys for 9 tokens"):
            check_length(model, cache, 9)
        cache.layers[layer].keys = None
        with pytest.raises(AssertionError, match=f"layer {layer} was left empty"):
            check_length(model, cache, 9)


def test_an_empty_or_short_cache_is_noticed():
    model = tiny("gemma3")
    with torch.no_grad():
        cache = model(ids(1, 9), use_cache=True).past_key_values
    check_length(model, cache, 9)
    with pytest.raises(AssertionError, match="9 tokens, not 10"):
        check_length(model, cache, 10)
    cache.layers[1].keys = cache.layers[1].keys[:, :, :5]
    with pytest.raises(AssertionError, match="answers 5"):
        check_length(model, cache, 9)
    cache.layers[1].reset()
    with pytest.raises(AssertionError, match="left empty"):
        check_length(model, cache, 9)
    bare = pruned_twin(model, [Site(i, "attention") for i in range(4)])
    check_length(bare, DynamicCache(config=bare.config), 9)  # no attention, nothing to hold


def test_memory():
    size = 64 * 2**20
    watch = peak_watch(torch.device("cpu"))
    torch.ones(size // 4)
    peak = watch()
    assert peak is None or 0.9 * size < peak < 2 * size
    cache = DynamicCache()
    cache.update(torch.zeros(2, 3, 5, 7), torch.zeros(2, 3, 5, 7), 0)
    assert cache_bytes(cache) == 2 * 4 * 2 * 3 * 5 * 7


def test_spread():
    assert spread([1.0]) is None
    assert spread([1.0, 2.0, 3.0]) == pytest.approx(0.5)


@pytest.mark.parametrize("bad", [{"batches": []}, {"contexts": [0]}, {"repeats": 0}, {"new_tokens": 0}])
def test_values_that_make_no_cell(bad):
    options = {"batches": [1], "contexts": [4], "new_tokens": 2, "repeats": 1, **bad}
    with pytest.raises(ConfigError, match="nothing to time"):
        run(tiny("llama"), ids(1, 9), **options)


def test_prompts_that_do_not_suffice():
    with pytest.raises(DataError, match="2 rows of 12 tokens"):
        run(tiny("llama"), ids(1, 9), batches=[2], contexts=[9], new_tokens=3)
    with pytest.raises(ConfigError, match="'static'"):
        run(tiny("llama"), ids(1, 9), batches=[1], contexts=[4], new_tokens=3, variants=["static"])


class Letters:
    """A tokenizer of one token a character, with a first token of its own, as Gemma's has."""

    def __call__(self, text: str, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [2, *map(ord, text)]}


def test_prompts_are_cut_from_real_text():
    prompts = cut_prompts(Letters(), count=4, length=50)
    assert prompts.shape == (4, 50)
    assert prompts[:, 0].tolist() == [2] * 4
    assert len({tuple(row) for row in prompts.tolist()}) == 4
    assert not any(chr(row[1]).isspace() for row in prompts[:, :2].tolist())  # at the start of a paragraph
    text = "".join(f"paragraph {i} says so\n\n" for i in range(20))
    rows = cut_prompts(Letters(), count=2, length=12, text=text)
    assert "".join(map(chr, rows[1, 1:].tolist())) == "paragraph 1"
    with pytest.raises(DataError, match="too short for 2 prompts of 900 tokens"):
        cut_prompts(Letters(), count=2, length=900, text=text)
