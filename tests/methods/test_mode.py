"""Mixture-of-Depths-and-Experts on tiny Mixtral and OLMoE models: staged and integrated, loads, balance, generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import dynadepth
from dynadepth import IntegratedMoDEConfig, Site, StagedMoDEConfig, attach, detach, fixed_routes, recording, routing_of
from dynadepth.benchmark.pruned import pruned_twin
from dynadepth.cost import flops_share
from dynadepth.errors import BudgetError, ConfigError, UnsupportedModelError
from dynadepth.methods import config_from_dict
from dynadepth.methods.mode import balance_loss
from dynadepth.report.info import describe_routers
from parity.models import LAYERS, VOCABULARY, WIDTH, tiny
from parity.test_execute_all import form
from small import alone, checkpoint, ids, ragged

EXPERTS, NO_OPS, PLACES = 4, 3, 2
FAMILY = pytest.mark.parametrize("family", ["mixtral", "olmoe"])
CONFIGS = {
    "staged": StagedMoDEConfig(capacity=0.4),
    "integrated": IntegratedMoDEConfig(no_ops=NO_OPS),
}
CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
IMPLEMENTATION = pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
BATCHES = {"plain": {"input_ids": ids(3, 12)}, "padded": ragged([12, 3, 8])}
BATCH = pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)


def routed(family: str, config: Any, implementation: str = "eager", seed: int = 1) -> Any:
    """A tiny model with random routers."""
    model = tiny(family)
    model.set_experts_implementation(implementation)
    attach(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for router in routing_of(model).routers().values():
            for parameter in router.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * WIDTH**-0.5)
    return model


def labelled(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    return {**batch, "labels": batch["input_ids"].masked_fill(mask == 0, -100)}


def integrated_reference(model: Any, batch: dict[str, Tensor]) -> tuple[Any, Any, dict[int, Tensor]]:
    """The bare model whose experts are computed for every token and weighted, no-ops weighing nothing; and what each
    token was given, `[N, C]`."""
    base, vectors, given = tiny(model.config.model_type), {}, {}
    base.load_state_dict({k: v for k, v in model.state_dict().items() if ".depth_" not in k})
    normalised = getattr(base.config, "norm_topk_prob", True)

    def mixture(layer: int) -> Any:
        mlp = base.model.layers[layer].mlp

        def forward(hidden: Tensor) -> Tensor:
            flat = hidden.flatten(0, 1)
            router = routing_of(model).routers()[Site(layer, "expert")]
            vectors[layer] = router.weight.detach().clone().requires_grad_()
            logits = torch.cat([F.linear(flat, mlp.gate.weight), flat @ vectors[layer].T], 1)
            probabilities = logits.float().softmax(1)
            chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(PLACES, 1).indices, 1.0)
            weights = probabilities * chosen
            if normalised:
                weights = weights / weights.sum(1, keepdim=True)
            given[layer] = chosen
            total = torch.zeros_like(flat)
            for expert in range(EXPERTS):
                gate, up = F.linear(flat, mlp.experts.gate_up_proj[expert]).chunk(2, -1)
                total = total + weights[:, expert, None] * F.linear(F.silu(gate) * up, mlp.experts.down_proj[expert])
            return total.view_as(hidden)

        return forward

    for layer in range(LAYERS):
        base.model.layers[layer].mlp.forward = mixture(layer)
    out = base(**batch, use_cache=False)
    return (out, base, vectors), base, given


@FAMILY
@BATCH
@IMPLEMENTATION
def test_integrated_is_the_dense_reference(family: str, batch: dict[str, Tensor], implementation: str) -> None:
    batch = labelled(batch)
    model = routed(family, CONFIGS["integrated"], implementation)
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    (wanted, base, vectors), _, given = integrated_reference(model, batch)
    assert 0.1 < given[0][:, EXPERTS:].sum() / given[0].sum() < 0.9, "another seed: some of each"
    found = model(**batch)
    torch.testing.assert_close(found.logits[real], wanted.logits[real], atol=2e-5, rtol=1e-4)
    trained = model.train()(**batch)
    torch.testing.assert_close(trained.logits[real], wanted.logits[real], atol=2e-5, rtol=1e-4)
    for layer, assignments in trained.depth_trace.assignments.items():
        torch.testing.assert_close(assignments.counts(), given[layer][real.flatten()].sum(0))
    (trained.loss - trained.depth_loss).backward()
    wanted.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, parameter in base.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: n + m)
    for layer in range(LAYERS):
        found = gradients[f"model.layers.{layer}.mlp.experts.depth_router.weight"]
        torch.testing.assert_close(found, vectors[layer].grad, atol=1e-5, rtol=1e-3)
        assert found.abs().sum() > 1e-4


@FAMILY
def test_no_ops_run_no_expert(family: str) -> None:
    model, rows = routed(family, CONFIGS["integrated"]), []
    experts = model.model.layers[1].mlp.experts
    experts.act_fn.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    out = model(**BATCHES["plain"])
    executed = int(out.depth_trace.decisions[Site(1, "expert")].execute.sum())
    shared = [other for other in range(LAYERS) if model.model.layers[other].mlp.experts.act_fn is experts.act_fn]
    assert shared == [1]
    assert sum(rows) == executed < 3 * 12 * PLACES
    rows.clear()
    with fixed_routes(model, {Site(1, "expert"): False}):
        model(**BATCHES["plain"])
    assert rows == []


@FAMILY
@CONFIG
def test_execute_all_is_the_bare_model_and_detach_restores_it(family: str, config: Any) -> None:
    batch, bare = BATCHES["padded"], tiny(family)
    before, wanted = form(bare), bare(**batch).logits
    model = attach(bare, config)
    with fixed_routes(model, {}):
        assert torch.equal(model(**batch).logits, wanted)
        assert torch.equal(model.train()(**batch).logits, wanted)
    model.eval()
    with dynadepth.disabled(model):
        assert torch.equal(model(**batch).logits, wanted)
    assert not torch.equal(routed(family, config)(**batch).logits, wanted)
    assert form(detach(model)) == before
    assert torch.equal(model(**batch).logits, wanted)


def test_injected_tokens_skip_their_experts() -> None:
    model, batch = routed("mixtral", CONFIGS["integrated"]), BATCHES["plain"]
    execute = torch.rand(3, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    outputs = {}
    model.model.layers[2].mlp.register_forward_hook(lambda _, args, out: outputs.update(skipped=out))
    with fixed_routes(model, {Site(2, "expert"): execute}):
        model(**batch)
    assert (outputs["skipped"][~execute] == 0).all()
    assert (outputs["skipped"][execute].abs().sum(-1) > 0).all()


# ---- loads and balance


@FAMILY
@CONFIG
def test_the_balance_loss_is_switchs_on_real_executed_tokens(family: str, config: Any) -> None:
    batch = labelled(BATCHES["padded"])
    model = routed(family, config).train()
    inputs: dict[int, Tensor] = {}
    for layer in range(LAYERS):
        model.model.layers[layer].mlp.register_forward_pre_hook(
            lambda _, args, layer=layer: inputs.__setitem__(layer, args[0].flatten(0, 1))
        )
    out = model(**batch)
    real, wanted = batch["attention_mask"].bool(), []
    for layer in range(LAYERS):
        mlp = model.model.layers[layer].mlp
        rows = [mlp.gate.weight]
        states = inputs[layer]
        if config.name == "mode-integrated":
            rows.append(mlp.experts.depth_router.weight)
            states = states[real.flatten()]
        elif (site := Site(layer, "block")) in out.depth_trace.decisions:
            execute = out.depth_trace.decisions[site].execute
            order = torch.argsort(execute.int(), dim=1, descending=True, stable=True)[:, : int(0.4 * 12 + 1e-4)]
            states = states[execute.gather(1, order).flatten()]
            assert len(states) == execute.sum() == 4 + 1 + 3
        else:
            states = states[real.flatten()]
        probabilities = (states @ torch.cat(rows).T).float().softmax(1)
        count = probabilities.shape[1]
        load = torch.bincount(probabilities.topk(PLACES, 1).indices.flatten(), minlength=count) / (len(states) * PLACES)
        wanted.append(count * (load * probabilities.mean(0)).sum())
    torch.testing.assert_close(balance_loss(out.depth_trace), torch.stack(wanted).mean())
    sampling = config.sampling_loss(out.depth_trace, torch.full((3,), 1 / 3)) if config.name == "mode-staged" else 0.0
    torch.testing.assert_close(out.depth_loss, sampling + 0.01 * torch.stack(wanted).mean())
    silent = routed(family, config_from_dict({**config.to_dict(), "balance": 0.0})).train()(**batch)
    torch.testing.assert_close(silent.depth_loss, torch.as_tensor(sampling).float())


def test_the_balance_loss_levels_the_load() -> None:
    torch.manual_seed(0)
    model = attach(tiny("mixtral"), IntegratedMoDEConfig(no_ops=4, balance=1.0)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    batch = {"input_ids": ids(8, 24)}
    first = balance_loss(model(**batch).depth_trace).item()
    for _ in range(40):
        model(**batch).depth_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with recording() as record:
        out = model(**batch)
    assert balance_loss(out.depth_trace).item() < first - 0.02
    assert abs(record.no_op_share - 0.5) < 0.1
    assert record.keep_ratio().routed == pytest.approx(1 - record.no_op_share, abs=1e-5)


@FAMILY
def test_loads_are_recorded_over_forwards(family: str) -> None:
    batch = BATCHES["padded"]
    model = routed(family, CONFIGS["integrated"])
    with recording() as record:
        out = model(**batch)
        model(**{name: value[:1] for name, value in batch.items()})
    once = out.depth_trace.assignments[2]
    again = model(**{name: value[:1] for name, value in batch.items()}).depth_trace.assignments[2]
    counts = once.counts() + again.counts()
    assert counts.sum() == (12 + 3 + 8 + 12) * PLACES
    assert record.expert_load[2] == pytest.approx((counts / counts.sum()).tolist())
    idle = [sum(load[EXPERTS:]) for load in record.expert_load.values()]
    assert record.no_op_share == pytest.approx(sum(idle) / LAYERS)
    assert 0 < record.no_op_share < 1
    with recording() as dense:
        tiny(family)(**batch)
    assert dense.no_op_share is None
    assert dense.expert_load == {}


# ---- generation, training


@FAMILY
@CONFIG
def test_batch_is_singles_and_cached_is_uncached(family: str, config: Any) -> None:
    batch, model = ragged([9, 4, 6]), routed(family, config)
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with recording() as record:
        together = model.generate(**batch, **options)
    assert 0.1 < record.keep_ratio("decode").routed < 0.95, "another seed: some of each"
    for row in range(3):
        own = model.generate(**alone(batch, row), **options)
        assert torch.equal(own.sequences[0, -5:], together.sequences[row, -5:])
        whole = model(input_ids=own.sequences, use_cache=False).logits[0, -6:-1]
        torch.testing.assert_close(torch.stack(own.logits, 1)[0], whole, atol=1e-4, rtol=1e-4)


@FAMILY
@CONFIG
def test_the_future_changes_nothing(family: str, config: Any) -> None:
    model, tokens = routed(family, config), ids(2, 10)
    before = model(input_ids=tokens).logits
    for changed in (1, 4, 9):
        other = tokens.clone()
        other[:, changed:] = (other[:, changed:] + 11) % (VOCABULARY - 1) + 1
        torch.testing.assert_close(
            model(input_ids=other).logits[:, :changed], before[:, :changed], atol=1e-5, rtol=1e-4
        )


@FAMILY
@CONFIG
def test_gradient_checkpointing_changes_nothing(family: str, config: Any) -> None:
    batch, results = labelled(BATCHES["padded"]), []
    for checkpointing in (False, True):
        model = routed(family, config).train()
        if checkpointing:
            checkpoint(model, {"use_reentrant": False})
        out = model(**batch)
        out.loss.backward()
        results.append((out.loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], atol=1e-6, rtol=1e-4, msg=lambda m, n=name: n + m)


def test_reentrant_checkpointing_is_refused() -> None:
    model = routed("mixtral", CONFIGS["integrated"]).train()
    checkpoint(model, {"use_reentrant": True})
    with pytest.raises(ConfigError, match="Reentrant"):
        model(**labelled(BATCHES["plain"]))


@FAMILY
@CONFIG
def test_bfloat16(family: str, config: Any) -> None:
    batch = labelled(BATCHES["padded"])
    model = routed(family, config).to(torch.bfloat16).train()
    out = model(**batch)
    out.loss.backward()
    exact = routed(family, config).train()(**batch)
    torch.testing.assert_close(out.loss.float(), exact.loss, atol=0.2, rtol=0.05)
    for router in routing_of(model).routers().values():
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in router.parameters())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@CONFIG
def test_saved_and_loaded(config: Any, tmp_path: Path) -> None:
    model, batch = routed("olmoe", config), BATCHES["padded"]
    dynadepth.save(model, tmp_path / "routers")
    model.save_pretrained(tmp_path / "base")
    again = type(tiny("olmoe")).from_pretrained(tmp_path / "base")
    dynadepth.load(again, tmp_path / "routers")
    assert routing_of(again).config == config
    torch.testing.assert_close(again.eval()(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-5)


def test_flops_follow_the_assignments() -> None:
    model = routed("mixtral", CONFIGS["integrated"])
    nothing = flops_share(model, dict.fromkeys(routing_of(model).sites, 1.0), tokens=12)
    half = flops_share(model, dict.fromkeys(routing_of(model).sites, 0.5), tokens=12)
    experts = 2 * 12 * PLACES * 3 * WIDTH * 48 * LAYERS  # gate, up and down of 48 units
    routers = 2 * 12 * NO_OPS * WIDTH * LAYERS
    assert nothing.target == pytest.approx(1 + routers / experts)
    assert half.target == pytest.approx(0.5 + routers / experts)
    assert half.model < nothing.model


def test_the_pruned_twin_has_no_mixture_where_no_expert_runs(tmp_path: Path) -> None:
    model, skipped = routed("olmoe", CONFIGS["integrated"]), [Site(0, "expert"), Site(2, "expert")]
    twin = pruned_twin(model, skipped)
    with fixed_routes(model, dict.fromkeys(skipped, False)):
        wanted = model(**BATCHES["plain"]).logits
    torch.testing.assert_close(twin(**BATCHES["plain"]).logits, wanted)
    assert describe_routers(dynadepth.save(model, tmp_path))["adjustable"] is False


# ---- refusals


@pytest.mark.parametrize(
    ("kind", "settings", "sentence"),
    [
        (IntegratedMoDEConfig, {"no_ops": 0}, "whole number of at least 1, not 0"),
        (IntegratedMoDEConfig, {"target": "mlp"}, "target 'expert' alone"),
        (IntegratedMoDEConfig, {"granularity": "token"}, "granularity 'assignment' alone"),
        (IntegratedMoDEConfig, {"skip_path": "linear"}, "no-ops contribute nothing"),
        (IntegratedMoDEConfig, {"balance": -1}, "zero or more, not -1"),
        (StagedMoDEConfig, {"balance": float("nan")}, "not nan"),
        (StagedMoDEConfig, {"target": "mlp"}, "'mode-staged' has target 'block' alone"),
        (dynadepth.MindSkipConfig, {"target": "expert"}, "'mindskip' has no target 'expert'"),
        (dynadepth.MindSkipConfig, {"granularity": "assignment"}, "'mindskip' has no granularity 'assignment'"),
    ],
)
def test_bad_settings_are_refused(kind: Any, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        kind(**settings)


@CONFIG
def test_models_without_experts_are_refused(config: Any) -> None:
    model = tiny("llama")
    before = form(model)
    with pytest.raises(UnsupportedModelError, match="no mixture of experts"):
        attach(model, config)
    assert form(model) == before


def test_budgets_are_refused() -> None:
    model = routed("mixtral", CONFIGS["integrated"])
    with pytest.raises(BudgetError, match="is learnt, and no threshold changes it"):
        dynadepth.set_budget(model, expert=0.5)


def test_the_hosts_own_balance_loss_is_refused_where_tokens_are_routed_around() -> None:
    model = routed("mixtral", CONFIGS["staged"]).train()
    with pytest.raises(ConfigError, match="output_router_logits=True"):
        model(**labelled(BATCHES["padded"]), output_router_logits=True)
    # In evaluation every token has its choice of experts, and is then left out or not.
    batch = BATCHES["padded"]
    real = batch["attention_mask"].bool()
    found = model.eval()(**batch, output_router_logits=True)
    assert [len(logits) for logits in found.router_logits] == [3 * 12] * LAYERS
    torch.testing.assert_close(found.logits[real], model(**batch).logits[real], atol=2e-5, rtol=1e-4)
