"""Mixture-of-Depths against a dense reference that computes every token and masks, in forward and gradients; its causal
decisions in generation; and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import dynadepth
from dynadepth import (
    MoDConfig,
    Site,
    attach,
    detach,
    expert_choice,
    fixed_routes,
    load,
    recording,
    routing_of,
    save,
    set_budget,
)
from dynadepth.budget import calibrate
from dynadepth.cost import router_flops
from dynadepth.errors import AdapterError, BudgetError, ConfigError, UnsupportedCacheError
from dynadepth.methods import config_from_dict
from dynadepth.methods.mod import agreement, top_loss
from dynadepth.routing.expert_choice import places, winners
from small import COMMON, LAYERS, VOCABULARY, WIDTH, alone, bare, checkpoint, ids, ragged

FAMILY = pytest.mark.parametrize("family", ["llama", "gemma3"])
SAMPLING = pytest.mark.parametrize("sampling", ["predictor", "aux_loss"])
ROUTED = (1, 3)


def mod(family: str = "llama", base: Any = None, seed: int = 5, **config: Any) -> Any:
    """A tiny model with routers that are random in all their parts, capacity 0.4 unless said."""
    model = attach(bare(family) if base is None else base, MoDConfig(**{"capacity": 0.4, **config}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for router in routing_of(model).routers().values():
            for parameter in router.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * WIDTH**-0.5)
    return model


def labelled(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = batch.get("attention_mask")
    labels = batch["input_ids"] if mask is None else batch["input_ids"].masked_fill(mask == 0, -100)
    return {**batch, "labels": labels}


def packed() -> dict[str, Tensor]:
    """Two rows of two documents each, told apart by positions that begin anew."""
    positions = torch.stack([torch.tensor([*range(7), *range(5)]), torch.tensor([*range(4), *range(8)])])
    return {"input_ids": ids(2, 12), "position_ids": positions}


BATCHES = {
    "plain": {"input_ids": ids(3, 12)},
    "left": ragged([12, 3, 8]),
    "right": ragged([12, 3, 8], side="right"),
    "packed": packed(),
}
BATCH = pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)


def dense_reference(model: Any, config: MoDConfig, batch: dict[str, Tensor], best: bool = True) -> Any:
    """The bare model in which each routed block runs for every token, hooks hiding the keys of the others; its hooks
    read the routers' vectors from `model`. `best`: by the top k; else where the causal logits are above zero."""
    base = bare(model.config.model_type.removesuffix("_text"))
    base.load_state_dict({k: v for k, v in model.state_dict().items() if ".depth_" not in k})
    vectors, chosen = {}, {}
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()

    def enter(layer: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            hidden = args[0]
            routers = routing_of(model).routers()
            vectors[layer] = routers[Site(layer, "block")].weight.detach().clone().requires_grad_()
            scores = F.rms_norm(hidden, hidden.shape[-1:], eps=1e-6) @ vectors[layer]
            execute = torch.zeros_like(mask)
            for row, scored in enumerate(scores):
                real = mask[row].nonzero().flatten().tolist()
                count = max(1, math.floor(config.capacity * len(real) + 1e-4))
                order = sorted(real, key=lambda t, scored=scored: -float(scored[t].detach()))
                for t in order[:count] if best else [t for t in real if scored[t] > 0]:
                    execute[row, t] = True
            chosen[layer] = (hidden, scores, execute)
            visible = (execute[:, None, :] | torch.eye(hidden.shape[1], dtype=torch.bool))[:, None]
            causal = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool).tril()[None, None]
            given = kwargs["attention_mask"]
            return args, {**kwargs, "attention_mask": visible & (causal if given is None else given)}

        return hook

    def leave(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> Tensor:
            hidden, scores, execute = chosen[layer]
            return torch.where(execute[..., None], hidden + scores[..., None] * (output - hidden), hidden)

        return hook

    for layer in ROUTED:
        base.model.layers[layer].register_forward_pre_hook(enter(layer), with_kwargs=True)
        base.model.layers[layer].register_forward_hook(leave(layer))
    out = base(**batch, use_cache=False)
    return out, base, vectors, {layer: chosen[layer][2] for layer in ROUTED}


@FAMILY
@BATCH
def test_training_is_the_dense_reference_forward_and_backward(family: str, batch: dict[str, Tensor]) -> None:
    batch = labelled(batch)
    model = mod(family).train()
    out = model(**batch)
    wanted, base, vectors, chosen = dense_reference(model, routing_of(model).config, batch)
    for site, decision in out.depth_trace.decisions.items():
        assert torch.equal(decision.execute, chosen[site.layer])
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    torch.testing.assert_close(out.logits[real], wanted.logits[real], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close((out.loss - out.depth_loss), wanted.loss)

    (out.loss - out.depth_loss).backward()
    wanted.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, parameter in base.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: n + m)
    for layer in ROUTED:
        found = gradients[f"model.layers.{layer}.depth_router.weight"]
        torch.testing.assert_close(found, vectors[layer].grad, atol=1e-5, rtol=1e-3)
        assert found.abs().sum() > 1e-3


def test_only_the_chosen_tokens_run_in_training() -> None:
    model, lengths = mod(capacity=0.25).train(), []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape))
    out = model(**labelled(BATCHES["plain"]))
    assert lengths == [(3, 3, WIDTH)]  # a quarter of 12 tokens
    out.loss.backward()
    gate = model.model.layers[1].self_attn.k_proj.weight.grad
    assert gate.abs().sum() > 0


@FAMILY
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_expert_choice_in_evaluation_is_what_training_computes(family: str, attention: str) -> None:
    model = mod(family)
    model.set_attn_implementation(attention)
    for batch in map(labelled, BATCHES.values()):
        trained = model.train()(**batch)
        model.eval()
        with torch.no_grad(), expert_choice(model):
            found = model(**batch)
        assert torch.equal(found.logits, trained.logits)
        assert found.depth_loss is None
        torch.testing.assert_close(found.loss, trained.loss - trained.depth_loss)
        assert found.past_key_values is None


def test_the_choice_is_not_causal_and_refuses_a_cache() -> None:
    model = mod()
    with expert_choice(model), pytest.raises(UnsupportedCacheError, match="needs the whole sequence at once"):
        model.generate(ids(1, 12), max_new_tokens=2)
    plain = attach(bare(), dynadepth.MindSkipConfig())
    with pytest.raises(ConfigError, match="mindskip"), expert_choice(plain):
        pass


# ---- winners


def test_places_are_rounded_down_and_never_none() -> None:
    assert [places(0.125, n) for n in (8, 15, 16, 2048)] == [1, 1, 2, 256]
    assert places(0.29, 100) == 29  # 0.29 * 100 is 28.999...
    assert places(1.0, 3) == 3
    with pytest.raises(ConfigError, match=r"capacity 0.125 of a sequence of 7 tokens lets none execute: .* 8 tokens"):
        places(0.125, 7)


def test_a_short_sequence_is_refused_in_training_and_runs_in_evaluation() -> None:
    model = mod(capacity=0.125)
    with pytest.raises(ConfigError, match=r"at least 8 tokens, or a capacity of at least 0.2"):
        model.train()(**labelled({"input_ids": ids(2, 5)}))
    model.eval()
    assert torch.isfinite(model(input_ids=ids(2, 1)).logits).all()


def test_padding_never_wins_and_short_rows_have_a_place() -> None:
    scores = torch.tensor([[5.0, 4, 3, 2, 1, 0, -1, -2], [9, 9, 9, 9, 9, 9, 9, -5]])
    real = torch.ones(2, 8, dtype=torch.bool)
    real[1, :7] = False
    assert winners(scores, 0.25, None).tolist() == [
        [1, 1, 0, 0, 0, 0, 0, 0],
        [*winners(scores, 0.25, None)[1].tolist()],
    ]
    won = winners(scores, 0.25, real)
    assert won[0].tolist() == [True, True] + [False] * 6
    assert won[1].tolist() == [False] * 7 + [True]
    real[1] = False
    assert not winners(scores, 0.25, real)[1].any()


def test_a_rows_places_do_not_depend_on_its_batch() -> None:
    batch = ragged([16, 9, 4])
    model = mod()
    with expert_choice(model):
        together = model(**batch)
        for row in range(3):
            own = model(**alone(batch, row))
            real = batch["attention_mask"][row].bool()
            torch.testing.assert_close(own.logits[0], together.logits[row, real], atol=1e-4, rtol=1e-4)


# ---- what is learnt


@SAMPLING
def test_the_auxiliary_loss_is_the_cross_entropy_on_real_tokens(sampling: str) -> None:
    batch = labelled(BATCHES["left"])
    model = mod(sampling=sampling, aux_weight=0.5).train()
    out = model(**batch)
    real, rows = batch["attention_mask"].bool(), []
    for row in range(3):
        each = []
        for decision in out.depth_trace.decisions.values():
            p = torch.sigmoid(decision.logits[row, real[row]])
            t = decision.top[row, real[row]].float()
            each.append(-(t * p.log() + (1 - t) * (1 - p).log()).mean())
        rows.append(sum(each) / len(each))
    torch.testing.assert_close(out.depth_loss, 0.5 * sum(rows) / 3)
    trace = out.depth_trace
    right = [((d.logits >= 0) == d.top).float() for d in trace.decisions.values()]
    wanted = torch.stack([torch.stack([r[row, real[row]].mean() for r in right]).mean() for row in range(3)])
    torch.testing.assert_close(agreement(trace), wanted)
    assert 0 < wanted.min() < 1


def test_the_predictor_sends_no_gradient_to_the_model() -> None:
    model = mod(sampling="predictor").train()
    model(**labelled(BATCHES["plain"])).depth_loss.backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert touched == {n for n, _ in model.named_parameters() if ".predictor." in n}
    assert len(touched) == 4 * len(ROUTED)


def test_the_auxiliary_loss_on_scores_reaches_router_and_model() -> None:
    model = mod(sampling="aux_loss").train()
    model(**labelled(BATCHES["plain"])).depth_loss.backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {"model.layers.1.depth_router.weight", "model.layers.0.mlp.up_proj.weight"} <= touched
    assert not any("predictor" in name for name, _ in model.named_parameters())


@SAMPLING
def test_a_short_training_learns_to_decide_causally(sampling: str) -> None:
    torch.manual_seed(0)
    model = attach(LlamaForCausalLM(LlamaConfig(**COMMON)), MoDConfig(capacity=0.25, sampling=sampling, aux_weight=0.3))
    assert all(p.requires_grad for p in model.parameters()), "the base is trained, too"
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    batch = labelled({"input_ids": ids(8, 32)})
    losses = []
    for _ in range(60):
        out = model.train()(**batch)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    assert losses[-1] < 0.75 * losses[0]
    model.eval()
    with torch.no_grad(), expert_choice(model):
        out = model(**batch)
    assert agreement(out.depth_trace).mean() > 0.9
    with torch.no_grad(), recording() as record:
        causal = model(**batch)
    assert abs(record.keep_ratio().routed - 0.25) < 0.08
    assert (
        abs(causal.loss - out.loss) < 0.25
    )  # of texts learnt by heart, at 4.1 before; deciding the other way costs more


# ---- causal decisions


def slots(cache: Any) -> int:
    """Tokens whose keys the routed blocks keep, over all rows."""
    return sum(cache.layers[layer].stored(cache.seen) for layer in ROUTED)


@FAMILY
@SAMPLING
def test_causal_decisions_batch_is_singles_and_cached_is_uncached(family: str, sampling: str) -> None:
    batch = ragged([9, 4, 6])
    model = mod(family, sampling=sampling)
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with recording() as record:
        together = model.generate(**batch, **options)
    assert 0.1 < record.keep_ratio("decode").routed < 0.9, "another seed: tokens must differ"
    stored = 0
    for row in range(3):
        own = model.generate(**alone(batch, row), **options)
        assert torch.equal(own.sequences[0, -6:], together.sequences[row, -6:])
        stored += slots(own.past_key_values)
        # one token at a time with a cache, and the whole sequence at once without one
        whole = model(input_ids=own.sequences, use_cache=False).logits[0, -7:-1]
        torch.testing.assert_close(torch.stack(own.logits, 1)[0], whole, atol=1e-4, rtol=1e-4)
    assert 0 < slots(together.past_key_values) == stored < 0.9 * sum((9 + 5, 4 + 5, 6 + 5)) * len(ROUTED)


@SAMPLING
def test_the_future_changes_no_causal_decision(sampling: str) -> None:
    model, tokens = mod(sampling=sampling), ids(2, 12)
    before = model(input_ids=tokens).logits
    for changed in range(1, 12):
        other = tokens.clone()
        other[:, changed:] = (other[:, changed:] + 11) % (VOCABULARY - 1) + 1
        after = model(input_ids=other).logits
        torch.testing.assert_close(after[:, :changed], before[:, :changed], atol=1e-5, rtol=1e-4)


def test_causal_decisions_are_the_dense_reference_with_score_weights() -> None:
    for batch in (BATCHES["plain"], BATCHES["left"]):
        model = mod(sampling="aux_loss")
        wanted, *_ = dense_reference(model, routing_of(model).config, batch, best=False)
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        torch.testing.assert_close(model(**batch).logits[real], wanted.logits[real], atol=2e-5, rtol=1e-4)


def test_every_token_executing_keeps_its_weight() -> None:
    model = mod(sampling="aux_loss", unit_input=False, layers=(1,))
    with torch.no_grad():
        router = routing_of(model).routers()[Site(1, "block")]
        router.threshold.fill_(-math.inf)
    tokens, states = ids(2, 6), {}
    model.model.layers[1].register_forward_hook(lambda _, args, output: states.update(x=args[0], y=output))
    model(input_ids=tokens)
    base = bare().model
    base.layers[1].register_forward_hook(lambda _, args, output: states.update(bare=output))
    base(input_ids=tokens)
    wanted = states["x"] + (states["x"] @ router.weight)[..., None] * (states["bare"] - states["x"])
    torch.testing.assert_close(states["y"], wanted)


def test_budgets_move_thresholds_and_keep_weights() -> None:
    model = mod(sampling="aux_loss")
    batches = [{"input_ids": ids(8, 24, seed=s), "attention_mask": torch.ones(8, 24, dtype=torch.long)} for s in (1, 2)]
    calibrate(model, batches)
    for budget in (0.9, 0.6):
        set_budget(model, block=budget)
        with recording() as record:
            model(**batches[0])
        assert abs(record.keep_ratio().all - budget) < 0.03
    set_budget(model, block=1.0)
    with recording() as record:
        everything = model(**batches[0]).logits
    assert record.keep_ratio().routed == 1
    assert (everything - bare()(**batches[0]).logits).abs().max() > 0.1, "the weights are not 1"


@SAMPLING
def test_at_a_capacity_of_one_every_token_competes_and_wins(sampling: str) -> None:
    model = attach(bare(), MoDConfig(capacity=1.0, sampling=sampling)).train()
    out = model(**labelled(BATCHES["left"]))
    out.loss.backward()
    real = BATCHES["left"]["attention_mask"].bool()
    assert all(torch.equal(decision.execute, real) for decision in out.depth_trace.decisions.values())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_injected_decisions_have_weight_one() -> None:
    batch, model = BATCHES["left"], mod()
    wanted = bare()(**batch).logits
    with fixed_routes(model, {}):
        assert torch.equal(model(**batch).logits, wanted)
        assert torch.equal(model.train()(**batch).logits, wanted)
    assert torch.equal(detach(model.eval())(**batch).logits, wanted)


# ---- variants


def test_the_control_draws_noise_at_its_capacity() -> None:
    model = mod(routing="stochastic", capacity=0.25, layers="all").train()
    assert not routing_of(model).learns
    batch = labelled({"input_ids": ids(4, 16)})
    first, second = model(**batch), model(**batch)
    for site, decision in first.depth_trace.decisions.items():
        assert decision.execute.sum(1).tolist() == [4] * 4
        assert torch.equal(decision.execute, decision.logits >= decision.logits.topk(4, dim=1).values[:, -1:])
        assert not torch.equal(decision.logits, second.depth_trace.decisions[site].logits)
    assert first.depth_loss is None
    model.eval()
    with recording() as record:
        model(input_ids=ids(16, 64))
    assert abs(record.keep_ratio().routed - 0.25) < 0.05


@SAMPLING
@BATCH
def test_threshold_routing_trains_what_generation_runs(sampling: str, batch: dict[str, Tensor]) -> None:
    batch = labelled(batch)
    model = mod(routing="threshold", sampling=sampling)
    trained = model.train()(**batch)
    (trained.loss).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    plain = {name: value for name, value in batch.items() if name != "labels"}
    found = model.eval()(**plain, use_cache=False)
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    torch.testing.assert_close(found.logits[real], trained.logits[real], atol=1e-5, rtol=1e-4)
    for decision in trained.depth_trace.decisions.values():
        assert torch.equal(decision.execute, decision.logits >= 0)
        assert not torch.equal(decision.execute & real, decision.top)
    assert trained.depth_loss > 0


def test_weights_are_the_score_or_its_sigmoid() -> None:
    batch = labelled(BATCHES["plain"])
    linear = mod(sampling="aux_loss").train()(**batch).depth_trace.decisions
    sigmoid = mod(sampling="aux_loss", weighting="sigmoid").train()(**batch).depth_trace.decisions
    site = Site(1, "block")
    assert torch.equal(linear[site].weight, linear[site].logits)
    torch.testing.assert_close(sigmoid[site].weight, torch.sigmoid(linear[site].logits))


# ---- training as it is done


@pytest.mark.parametrize("routing", ["top_k", "threshold", "stochastic"])
@pytest.mark.parametrize("preserve", [True, False])
def test_gradient_checkpointing_changes_nothing(routing: str, preserve: bool) -> None:
    batch, results = labelled(BATCHES["left"]), []
    for checkpointing in (False, True):
        model = mod(routing=routing).train()
        if checkpointing:
            checkpoint(model, {"use_reentrant": False, "preserve_rng_state": preserve})
        torch.manual_seed(3)
        out = model(**batch)
        out.loss.backward()
        results.append((out.loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert results[0][1].keys() == results[1][1].keys()
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], atol=1e-6, rtol=1e-4, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("routing", ["top_k", "threshold"])
@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16(routing: str, autocast: bool) -> None:
    batch = labelled(BATCHES["left"])
    model = mod(routing=routing) if autocast else mod(routing=routing).to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = model.train()(**batch)
    out.loss.backward()
    exact = mod(routing=routing).train()(**batch)
    torch.testing.assert_close(out.loss.float(), exact.loss, atol=0.15, rtol=0.05)
    for router in routing_of(model).routers().values():
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in router.parameters())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert all(d.logits.dtype == d.weight.dtype == torch.float32 for d in out.depth_trace.decisions.values())


def test_accumulated_micro_batches_add_up() -> None:
    batch, gradients = labelled(ragged([12, 6, 9, 10])), []
    items = (batch["labels"][:, 1:] != -100).sum()
    for parts in (1, 2, 4):
        model = mod(sampling="aux_loss").train()
        for part in range(parts):
            rows = slice(part * 4 // parts, (part + 1) * 4 // parts)
            model(**{name: value[rows] for name, value in batch.items()}, num_items_in_batch=items).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradient, other[name], atol=1e-5, rtol=1e-3)


def test_attentions_have_one_entry_a_layer() -> None:
    model = mod(capacity=0.25)
    model.set_attn_implementation("eager")
    with expert_choice(model):
        out = model(**BATCHES["plain"], output_attentions=True)
    assert [weights.shape for weights in out.attentions] == [(3, 2, 12, 12)] * LAYERS
    decision = out.depth_trace.decisions[Site(1, "block")]
    assert torch.equal(out.attentions[1].sum(-1).sum(1) > 0, decision.execute)


# ---- where it is placed, what it saves


def test_defaults_are_the_papers() -> None:
    config = MoDConfig()
    assert (config.capacity, config.routing, config.weighting) == (0.125, "top_k", "linear")
    assert config.routed_layers(6) == (1, 3, 5)
    assert MoDConfig(every=1).routed_layers(4) == (1, 2, 3)
    assert MoDConfig(every=3).routed_layers(8) == (1, 4, 7)
    assert MoDConfig(layers=(0, 2)).routed_layers(4) == (0, 2)
    assert config_from_dict(config.to_dict()) == config


def test_saved_routers_belong_to_the_weights_they_were_trained_with(tmp_path: Path) -> None:
    model, batch = mod(), BATCHES["left"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.neg_()  # what training does to a base, to be sure
    wanted = model(**batch).logits
    save(model, tmp_path / "routers")
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(AdapterError, match=r"trained together with its base.*save_pretrained"):
        load(bare(), tmp_path / "routers")
    again = load(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "routers")
    torch.testing.assert_close(again.eval()(**batch).logits, wanted)
    assert routing_of(again).config == routing_of(model).config
    assert all(p.requires_grad for p in again.parameters()), "training can go on"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"target": "attention"}, "target 'block' alone"),
        ({"granularity": "sequence"}, "granularity 'token' alone"),
        ({"kv_policy": "project"}, "absent as keys and values"),
        ({"skip_path": "linear"}, "keep their residual"),
        ({"capacity": 0}, "above 0 and at most 1, not 0"),
        ({"capacity": 1.5}, "not 1.5"),
        ({"capacity": math.nan}, "not nan"),
        ({"capacity": True}, "not True"),
        ({"routing": "topk"}, "Did you mean 'top_k'"),
        ({"sampling": "none"}, "predictor, aux_loss"),
        ({"weighting": "softmax"}, "linear, sigmoid"),
        ({"aux_weight": 0}, "a number above 0"),
        ({"every": 0}, "whole number of at least 1, not 0"),
        ({"predictor_width": 2.5}, "not 2.5"),
        ({"every": 3, "layers": (1,)}, "leave one out"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        MoDConfig(**settings)


def test_one_block_alone_is_refused() -> None:
    model = LlamaForCausalLM(LlamaConfig(**{**COMMON, "num_hidden_layers": 1}))
    with pytest.raises(ConfigError, match="name it in layers"):
        attach(model, MoDConfig())
    attach(model, MoDConfig(layers=(0,)))


def test_top_loss_is_none_without_a_choice() -> None:
    assert top_loss(mod()(input_ids=ids(1, 4)).depth_trace) is None
    assert agreement(mod()(input_ids=ids(1, 4)).depth_trace) is None


def test_tokens_do_not_compete_while_they_are_written() -> None:
    model = mod(capacity=0.5).train()
    with pytest.raises(ConfigError, match=r"call\s+model\.eval\(\) first"):
        model.generate(ids(1, 4), max_new_tokens=1, use_cache=False)
    cached = model.generate(ids(1, 4), max_new_tokens=3, do_sample=False)
    assert torch.equal(model.eval().generate(ids(1, 4), max_new_tokens=3, do_sample=False), cached)


def test_noise_has_no_probabilities_for_a_control_to_shift() -> None:
    with pytest.raises(BudgetError, match="'mod' draw at random"):
        dynadepth.set_control(mod(routing="stochastic"), 0.0)


def test_router_flops_count_the_predictors_vectors() -> None:
    model = mod(sampling="predictor", predictor_width=6)
    sites = len(dynadepth.routing_of(model).sites)
    assert router_flops(model, 3) == 2 * 3 * sites * (WIDTH + WIDTH * 6 + 6)  # score; the predictor's two layers
