"""Importance on the residual stream, static routes, and thresholds that meet their keep ratio on other prompts."""

from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from dynadepth import MindSkipConfig, Site, attach, fixed_routes, load, recording, routing_of, save, set_budget
from dynadepth.budget import (
    QUANTILES,
    calibrate,
    forward,
    importance,
    joined,
    mixture,
    prompts_to_batches,
    quantile_threshold,
    static_skip,
    up_to,
)
from dynadepth.errors import BudgetError
from dynadepth.methods.static import skip_count
from dynadepth.routing.calibration import SLACK, TOLERANCE, Calibration, CalibrationPoint

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}


def tiny(config=LlamaConfig, kind=LlamaForCausalLM, **extra):
    torch.manual_seed(0)
    model = kind(config(**SIZES, **extra)).eval()
    with torch.no_grad():  # untrained sublayers add next to nothing: make them matter
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    return model


def prompts(n, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 20, (n,), generator=generator).tolist()
    return [torch.randint(1, 101, (length,), generator=generator).tolist() for length in lengths]


def test_batches_hold_every_prompt_once_and_pad_on_the_right():
    given_prompts = [*prompts(11, 0), []]
    batches = prompts_to_batches(given_prompts, pad=0, batch_size=4)
    rows = [
        ids[mask.bool()].tolist()
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert sorted(rows) == sorted(ids for ids in given_prompts if ids)
    assert all((batch["attention_mask"].diff(dim=1) <= 0).all() for batch in batches)


@pytest.mark.parametrize(
    ("config", "kind", "extra"),
    [
        (LlamaConfig, LlamaForCausalLM, {}),
        (Gemma3TextConfig, Gemma3ForCausalLM, {"sliding_window": 8}),
        (GraniteConfig, GraniteForCausalLM, {"residual_multiplier": 0.3}),
    ],
)
@pytest.mark.parametrize("target", ["attention", "mlp", "block"])
def test_importance_is_one_minus_cosine_of_the_stream_with_and_without(config, kind, extra, target):
    """The reference skips the sublayer itself, so post-norms and residual scales are in it by construction."""
    model = tiny(config, kind, **extra)
    batch = prompts_to_batches(prompts(3, 1), pad=0)[0]
    scores = importance(model, [batch], target)
    assert list(scores) == [Site(layer, target) for layer in range(4)]

    attach(model, MindSkipConfig(target=target, layers="all"))
    mask = batch["attention_mask"].bool()
    # the last layer's sublayers alone differ between these two runs, up to the final norm, which keeps no cosine: look
    # at the stream in front of it
    seen = {}
    model.model.norm.register_forward_pre_hook(lambda module, args: seen.update(stream=args[0]))
    forward(model, batch)
    with_it = seen["stream"]
    with fixed_routes(model, {Site(3, target): False}), torch.no_grad():
        forward(model, batch)
    without = seen["stream"]
    if target == "attention":  # what follows it in the layer is not part of its score
        assert scores[Site(3, target)] > 0
        return
    cosine = torch.nn.functional.cosine_similarity(without.float(), with_it.float(), dim=-1)
    assert scores[Site(3, target)] == pytest.approx(float((1 - cosine)[mask].mean()), abs=1e-5)


@given(st.lists(st.lists(st.integers(0, 9), max_size=30), max_size=8), st.integers(1, 20), st.integers(1, 4))
def test_joined_texts_are_windows_of_one_length_in_their_order(texts, length, count):
    windows, flat = joined(texts, length, count), list(chain.from_iterable(texts))
    assert list(chain.from_iterable(windows)) == flat[: max(len(windows) * length, min(len(flat), length))]
    if len(flat) >= length:
        assert {len(window) for window in windows} == {length}
        assert len(windows) == min(count, len(flat) // length)
    else:
        assert windows == [flat]


@given(st.lists(st.lists(st.integers(0, 9), max_size=30), max_size=8), st.integers(1, 60))
def test_whole_texts_up_to_so_many_tokens(texts, tokens):
    chosen = up_to(iter(texts), tokens)
    assert chosen == texts[: len(chosen)]
    assert sum(map(len, chosen[:-1])) < tokens, "the last one was wanted"
    assert len(chosen) == len(texts) or sum(map(len, chosen)) >= tokens


def test_importance_ignores_padding():
    model = tiny()
    ids = prompts(1, 2)[0]
    alone = importance(model, prompts_to_batches([ids], pad=0), "attention")
    padded = {
        "input_ids": torch.tensor([ids + [5] * 7]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * 7]),
    }
    for site, score in importance(model, [padded], "attention").items():
        assert score == pytest.approx(alone[site], abs=1e-6)


def test_mixtures_have_exactly_the_keep_ratio_asked_for():
    assert mixture(0.75, 4, 4) == [(1, 1.0)]
    assert mixture(0.1, 4, 2) == [(2, 1.0)], "at most two can be skipped"
    assert mixture(1.0, 4, 4) == [(0, 1.0)]
    for keep in (0.6, 0.76, 0.99, 0.01):
        (low, a), (high, b) = mixture(keep, 30 if keep == 0.76 else 4, 30)
        assert high == low + 1
        assert a + b == pytest.approx(1)
        assert a * low + b * high == pytest.approx((1 - keep) * (30 if keep == 0.76 else 4))
    assert mixture(0.76, 30, 30, tolerance=0.02) == [(7, 1.0)], "0.767 is near enough"
    assert len(mixture(0.6, 4, 4, tolerance=0.02)) == 2
    assert skip_count(0.76, 30) == 7


def test_static_skip_takes_the_least_important():
    scores = {Site(0, "mlp"): 0.9, Site(1, "mlp"): 0.1, Site(2, "mlp"): 0.5, Site(3, "mlp"): 0.2}
    assert static_skip(scores, 0.5, 4) == (1, 3)
    assert static_skip(scores, 1.0, 4) == ()
    with pytest.raises(BudgetError, match="only 4 are scored"):
        static_skip(scores, 0.5, 20)


@given(st.lists(st.floats(-5, 5), min_size=40, max_size=200, unique=True), st.floats(0.05, 0.95))
def test_quantile_threshold_keeps_its_share(values, keep):
    logits = torch.tensor(values, dtype=torch.float64)
    kept = (logits >= quantile_threshold(logits, keep)).double().mean()
    assert abs(float(kept) - keep) <= 1.5 / len(values) + 1 / 256


def quantiles(logits):
    return tuple(torch.quantile(logits, torch.linspace(0, 1, QUANTILES, dtype=torch.float64)).tolist())


@given(
    st.integers(8, 40),
    st.floats(0.1, 0.9),
    st.lists(st.floats(-1, 1), min_size=60, max_size=60),
    st.lists(st.floats(-1, 1), min_size=60, max_size=60),
)
def test_routers_that_answer_alike_keep_the_same_share_of_other_inputs(n_sites, keep, jitter, other):
    """Each site's logits differ by a millionth from input to input: wherever a whole count of sites is near, that count
    executes, on inputs of which nothing is known, too; and with thirty sites the tolerance holds at any budget."""
    biases = torch.linspace(-1, 1, n_sites, dtype=torch.float64)[:, None]
    seen, new = (biases + 1e-6 * torch.tensor(values, dtype=torch.float64) for values in (jitter, other))
    calibration = Calibration((CalibrationPoint(keep, quantiles(seen.flatten())),), 60)
    kept = float((new >= calibration.threshold(keep)).double().mean())
    nearest = round(keep * n_sites) / n_sites
    step = 1 / (QUANTILES - 1)
    if abs(nearest - keep) <= SLACK - step:
        assert kept * n_sites == pytest.approx(round(kept * n_sites)), "a site cut in two"
    assert abs(kept - keep) <= (1 / n_sites if n_sites < 30 else TOLERANCE) + step


@given(st.lists(st.sampled_from([0.0, 1e-6, 0.1, 5.0]), min_size=60, max_size=60), st.floats(0, 1), st.floats(0, 1))
def test_higher_keep_never_means_a_higher_threshold_with_gaps_either(spacings, a, b):
    curve = tuple(torch.tensor(spacings, dtype=torch.float64).cumsum(0).tolist())
    calibration = Calibration((CalibrationPoint(0.5, curve),), 8)
    low, high = sorted((a, b))
    assert calibration.threshold(high) <= calibration.threshold(low)


@given(st.floats(0, 1), st.floats(0, 1))
def test_higher_keep_never_means_a_higher_threshold(a, b):
    curve = tuple(x / 10 for x in range(-20, 21))
    shifted = tuple(x + 0.3 for x in curve)
    calibration = Calibration((CalibrationPoint(0.25, curve), CalibrationPoint(0.75, shifted)), 8)
    low, high = sorted((a, b))
    if high < 0.25 or low > 0.75:  # between points the curves themselves move
        assert calibration.threshold(high) <= calibration.threshold(low)
    assert calibration.threshold(1.0) == -torch.inf
    assert calibration.threshold(0.0) == torch.inf
    assert Calibration.from_dict(calibration.to_dict()) == calibration


def randomised(granularity):
    model = attach(tiny(), MindSkipConfig(granularity=granularity, layers="all", bias=True))
    generator = torch.Generator().manual_seed(3)
    for router in routing_of(model).routers().values():
        with torch.no_grad():
            router.weight.normal_(0, 0.5, generator=generator)
            router.bias.normal_(0, 0.5, generator=generator)
    return model


@pytest.mark.parametrize("granularity", ["sequence", "route", "token"])
def test_budgets_are_met_on_other_prompts(granularity):
    """Semantic 9: requested budget and measured keep ratio differ by at most 0.02 on prompts that were not calibrated
    on."""
    model = randomised(granularity)
    before = [float(r.threshold) for r in routing_of(model).routers().values()]
    calibrate(model, prompts_to_batches(prompts(3000, 4), pad=0, batch_size=256))
    assert [float(r.threshold) for r in routing_of(model).routers().values()] == before
    others = prompts_to_batches(prompts(3000, 5), pad=0, batch_size=256)
    for budget in (0.3, 0.5, 0.62, 0.75, 0.9, 1.0):
        set_budget(model, attention=budget)
        with recording() as record, torch.no_grad():
            for batch in others:
                forward(model, batch)
        assert record.keep_ratio("prefill").all == pytest.approx(budget, abs=0.02)


def test_budget_counts_unrouted_sublayers():
    model = attach(tiny(), MindSkipConfig(layers=(1, 2)))
    routing = routing_of(model)
    assert routing.lowest_budget() == 0.5
    assert routing.keep_of(0.75) == 0.5
    with pytest.raises(BudgetError, match=r"budget 0\.4 cannot be reached"):
        set_budget(model, attention=0.4)
    for wrong in (0, -1, 1.5, float("nan"), "0.5", None):
        with pytest.raises(BudgetError, match="above 0 and at most 1"):
            set_budget(model, attention=wrong)
    with pytest.raises(BudgetError, match="no calibration"):
        set_budget(model, attention=0.75)
    with pytest.raises(BudgetError, match="routed target is 'attention'"):
        set_budget(model, mlp=0.75)
    set_budget(model, attention=1.0)
    assert all(float(r.threshold) == -torch.inf for r in routing.routers().values())


def test_too_few_prompts_to_calibrate_are_said():
    model = attach(tiny(), MindSkipConfig(layers=(1, 2)))
    with pytest.raises(BudgetError, match="3 prompts are too few to calibrate 7 budgets: give at least 8"):
        calibrate(model, prompts_to_batches(prompts(3, 0), pad=0))
    with pytest.raises(BudgetError, match=r"0 prompts are too few .* at least 8"):
        calibrate(model, [])
    assert calibrate(model, prompts_to_batches(prompts(8, 0), pad=0)).points
    by_token = attach(tiny(), MindSkipConfig(layers=(1, 2), granularity="token"))
    with pytest.raises(BudgetError, match="1 prompts are too few to calibrate 7 budgets"):
        calibrate(by_token, prompts_to_batches(prompts(1, 0), pad=0))
    with pytest.raises(BudgetError, match="no keep ratios: name at least one"):
        calibrate(model, prompts_to_batches(prompts(8, 0), pad=0), keeps=())


def test_calibration_and_loading_leave_a_budget_of_one_unasked(tmp_path):
    model = attach(tiny(), MindSkipConfig(layers="all"))
    calibrate(model, prompts_to_batches(prompts(8, 0), pad=0))
    set_budget(model, attention=1.0)
    calibrate(model, prompts_to_batches(prompts(8, 0), pad=0))
    assert not any(router.asked for router in routing_of(model).routers().values())
    save(model, tmp_path)
    again = load(tiny(), tmp_path)
    assert not any(router.asked for router in routing_of(again).routers().values())
