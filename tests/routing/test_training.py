"""Training routers: what gets gradients, what does not, and that checkpointing or accumulation change nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from dynadepth import MindSkipConfig, Site, StaticConfig, attach, detach, fixed_routes, recording, routing_of
from dynadepth.errors import ConfigError
from dynadepth.routing.context import carrying_context
from dynadepth.routing.decision import RoutingDecision, RoutingTrace
from dynadepth.routing.forward import row_weights
from small import FAMILIES, KINDS, LAYERS, bare, checkpoint, ids, ragged, routed

FAMILY = pytest.mark.parametrize("family", FAMILIES)
KIND = pytest.mark.parametrize(("granularity", "kv_policy"), KINDS)
NON_REENTRANT, REENTRANT = {"use_reentrant": False}, {"use_reentrant": True}


def batch(rows: int = 4, length: int = 8, prompt: int = 4) -> dict[str, Tensor]:
    tokens = ids(rows, length)
    return {"input_ids": tokens, "labels": tokens.masked_fill(torch.arange(length) < prompt, -100)}


def gradients(model: Any) -> Tensor:
    return torch.cat([router.weight.grad for router in routing_of(model).routers().values()])


def step(model: Any, inputs: dict[str, Tensor], **more: Any) -> Any:
    model.zero_grad()
    out = model(**inputs, **more)
    out.loss.backward()
    return out


@FAMILY
@KIND
@pytest.mark.parametrize("target", ["attention", "block"])
def test_every_router_gets_a_gradient_and_nothing_else_does(
    family: str, granularity: str, kv_policy: str, target: str
) -> None:
    model = routed(
        family, target=target, granularity=granularity, kv_policy=kv_policy, penalty=0.1, capacity=0.1
    ).train()
    out = step(model, batch())
    routers = {id(p) for router in routing_of(model).routers().values() for p in router.parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in routers), name
        assert (parameter.grad is not None) == (id(parameter) in routers), name
        if id(parameter) in routers:
            assert parameter.grad.dtype == parameter.dtype == torch.float32
            assert parameter.grad.abs().sum() > 0, name
    assert 0 < out.depth_loss < out.loss


@FAMILY
def test_after_training_the_backbone_is_byte_identical(family: str) -> None:
    model = routed(family, capacity=0.1, penalty=1.0).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        step(model, batch())
        optimizer.step()
    for name, value in model.state_dict().items():
        moved = not torch.equal(value, before[name])
        assert moved == name.endswith("depth_router.weight"), name
    state = dict(detach(model).state_dict().items())
    assert all(torch.equal(value, bare(family).state_dict()[name]) for name, value in state.items())


def test_a_straight_through_gate_has_the_gradient_of_the_score() -> None:
    model = routed(penalty=0.5, capacity=0.01, layers=(1,)).train()
    with torch.no_grad():
        for router in routing_of(model).routers().values():
            router.threshold.fill_(0.2)
    out = model(**batch())
    decision = next(iter(out.depth_trace.decisions.values()))
    score = torch.sigmoid(decision.logits - 0.2)
    assert torch.equal(decision.gate, (score >= 0.5).float())
    (found,) = torch.autograd.grad(decision.gate.sum(), decision.logits, retain_graph=True)
    torch.testing.assert_close(found, (score * (1 - score)).detach())


# ---- no backward below the lowest routed layer


def reached(loss: Tensor) -> set[Any]:
    """All nodes of the autograd graph."""
    todo, seen = [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo.extend(parent for parent, _ in node.next_functions)
    return seen


@pytest.mark.parametrize("when", ["never", "before attach", "after attach"])
def test_no_backward_below_the_lowest_routed_layer(when: str) -> None:
    base = bare()
    if when == "before attach":
        checkpoint(base, NON_REENTRANT)
    model = routed(base=base, layers=(2, 3)).train()
    if when == "after attach":
        checkpoint(model, NON_REENTRANT)
    needed: dict[int, bool] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, i=i: needed.__setitem__(i, args[0].requires_grad))
        for i, layer in enumerate(model.model.layers)
    ]
    step(model, batch())
    assert needed == {0: False, 1: False, 2: False, 3: True}
    for hook in hooks:
        hook.remove()
    # The routed model's graph holds no leaf but its routers' weights.
    leaves = {node.variable.data_ptr() for node in reached(model(**batch()).loss) if hasattr(node, "variable")}
    assert leaves == {router.weight.data_ptr() for router in routing_of(model).routers().values()}
    # Taken off, the model checkpoints as it was told to: reentrantly it would need gradients of its embeddings.
    detach(model)
    assert bool(vars(model).get("_require_grads_hooks")) == (when != "never")


# ---- gradient checkpointing


@FAMILY
@pytest.mark.parametrize(
    ("target", "granularity", "kv_policy"),
    [("mlp", "sequence", "project"), ("mlp", "token", "project")]
    + [(target, *kind) for target in ("attention", "block") for kind in KINDS],
)
@pytest.mark.parametrize("when", ["before attach", "after attach"])
def test_checkpointing_changes_nothing(family: str, target: str, granularity: str, kv_policy: str, when: str) -> None:
    config = {"target": target, "granularity": granularity, "kv_policy": kv_policy, "penalty": 0.1, "capacity": 0.2}
    plain = routed(family, **config).train()
    base = bare(family)
    if when == "before attach":
        checkpoint(base, NON_REENTRANT)
    saving = routed(family, base=base, **config).train()
    if when == "after attach":
        checkpoint(saving, NON_REENTRANT)
    replays = []
    saving.model.layers[3].input_layernorm.register_forward_hook(lambda *_: replays.append(1))
    wanted, found = step(plain, batch()), step(saving, batch())
    assert len(replays) == 2  # once forward, once again for the backward
    assert torch.equal(found.loss, wanted.loss)
    assert torch.equal(found.depth_loss, wanted.depth_loss)
    torch.testing.assert_close(gradients(saving), gradients(plain))
    assert gradients(plain).abs().min() > 0
    checkpoint(saving, None)
    replays.clear()
    step(saving, batch())
    assert len(replays) == 1


def test_a_replay_is_no_new_decision() -> None:
    model = routed().train()
    checkpoint(model, NON_REENTRANT)
    with recording() as record:
        step(model, batch())
    assert len(record.sequences) == 4
    assert record.keep_ratio() is not None


@KIND
def test_checkpointing_replays_under_the_forwards_own_injections(granularity: str, kv_policy: str) -> None:
    # The backward runs after the block is left: the replay must still see what was injected, or it would differ.
    model = routed(granularity=granularity, kv_policy=kv_policy).train()
    checkpoint(model, NON_REENTRANT)
    inputs = batch()
    with fixed_routes(model, {routing_of(model).sites[3]: False}):
        embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
        out = model(inputs_embeds=embeddings, labels=inputs["labels"])
    out.loss.backward()
    saved = embeddings.grad.clone()
    checkpoint(model, None)
    embeddings.grad = None
    with fixed_routes(model, {routing_of(model).sites[3]: False}):
        model(inputs_embeds=embeddings, labels=inputs["labels"]).loss.backward()
    torch.testing.assert_close(embeddings.grad, saved)


@KIND
@pytest.mark.parametrize("when", ["before attach", "after attach"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's, on the way to the refusal
def test_reentrant_checkpointing_is_refused(granularity: str, kv_policy: str, when: str) -> None:
    base = bare()
    if when == "before attach":
        checkpoint(base, REENTRANT)
    model = routed(base=base, granularity=granularity, kv_policy=kv_policy).train()
    if when == "after attach":
        checkpoint(model, REENTRANT)
    with pytest.raises(ConfigError, match=r"use_reentrant.: False"):
        model(**batch())
    model.eval()(**batch())  # nothing is learnt here, so nothing is refused
    with torch.no_grad():
        model.train()(**batch())


def test_static_routes_may_checkpoint_reentrantly() -> None:
    model = attach(bare(), StaticConfig(skip=(1,))).train()
    checkpoint(model, REENTRANT)
    embeddings = model.get_input_embeddings()(ids(2, 5)).detach().requires_grad_()
    model(inputs_embeds=embeddings, labels=ids(2, 5)).loss.backward()
    assert embeddings.grad.abs().sum() > 0


@pytest.mark.parametrize("when", ["before attach", "after attach"])
def test_detach_unwraps_the_checkpoint_function(when: str) -> None:
    model = bare()
    if when == "before attach":
        checkpoint(model, NON_REENTRANT)
    attach(model, MindSkipConfig())
    if when == "after attach":
        checkpoint(model, NON_REENTRANT)
    carried = carrying_context(lambda *_: None).__qualname__
    functions = [vars(m).get("_gradient_checkpointing_func") for m in model.modules()]
    assert any(getattr(f, "__qualname__", "") == carried for f in functions)
    detach(model).train().requires_grad_(True)
    functions = [vars(m).get("_gradient_checkpointing_func") for m in model.modules()]
    assert any(functions)
    assert not any(getattr(f, "__qualname__", "") == carried for f in functions)
    step(model, batch())


# ---- gradient accumulation


@pytest.mark.parametrize("granularity", ["sequence", "route", "token"])
@pytest.mark.parametrize("plain", [False, True], ids=["prompt and answer", "plain text"])
def test_gradients_do_not_depend_on_the_division_into_micro_batches(granularity: str, plain: bool) -> None:
    model = routed(granularity=granularity, penalty=0.5, capacity=0.3).train()
    whole = ragged([12, 5, 9, 7, 12, 4, 6, 10], side="right")
    labels = whole["input_ids"].masked_fill(whole["attention_mask"] == 0, -100)
    if not plain:
        labels = labels.masked_fill(torch.arange(12) < 3, -100)
    whole["labels"] = labels
    items = (labels[:, 1:] != -100).sum()
    found, losses = [], []
    for size in (1, 2, 8):
        model.zero_grad()
        total = 0.0
        for start in range(0, 8, size):
            part = {name: value[start : start + size] for name, value in whole.items()}
            out = model(**part, num_items_in_batch=items)
            out.loss.backward()
            total += out.loss.item()
        found.append(gradients(model).clone())
        losses.append(total)
    torch.testing.assert_close(found[0], found[2], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found[1], found[2], atol=1e-6, rtol=1e-4)
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)
    assert losses[1] == pytest.approx(losses[2], rel=1e-5)


# ---- modes


def test_training_mode_runs_masked_without_a_cache_and_sparse_with_one() -> None:
    model, tokens = routed().train(), ids(3, 5)
    masked = model(input_ids=tokens)
    assert masked.past_key_values is None
    assert all(d.gate is not None and d.gate.requires_grad for d in masked.depth_trace.decisions.values())
    generated = model.generate(tokens, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, model.eval().generate(tokens, max_new_tokens=4, do_sample=False))


def test_without_gradients_there_are_no_gates_and_no_loss_term() -> None:
    model = routed().train()
    with torch.no_grad():
        out = model(**batch())
    assert out.depth_loss is None
    assert all(d.gate is None for d in out.depth_trace.decisions.values())


def freeze(model: Any) -> Any:
    for router in routing_of(model).routers().values():
        router.requires_grad_(False)
    return model


@FAMILY
@pytest.mark.parametrize(
    ("target", "granularity", "kv_policy"),
    [("mlp", "sequence", "project"), ("mlp", "token", "project")]
    + [(target, *kind) for target in ("attention", "block") for kind in KINDS],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_skip_paths_learn_the_same_where_only_what_executes_runs(
    family: str,
    granularity: str,
    kv_policy: str,
    target: str,
    checkpointing: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where no router learns, the sparse path runs; it has the loss and the path gradients of the masked one."""
    config = {"target": target, "granularity": granularity, "kv_policy": kv_policy, "skip_path": "linear", "penalty": 0}
    inputs = {**ragged([9, 5, 7, 8], "right"), "prompt_mask": torch.arange(9).expand(4, -1) < 4}
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    found, seen = [], []
    for frozen in (False, True):
        generator = torch.Generator().manual_seed(3)
        model = routed(family, **config).train()
        kind = type(routing_of(model).granularity)
        sparse_run = kind.sparse
        monkeypatch.setattr(kind, "sparse", lambda *args, run=sparse_run: (seen.append("sparse"), run(*args))[1])
        if frozen:
            freeze(model)
        if checkpointing:
            checkpoint(model, NON_REENTRANT)
        shape = (4, 9) if granularity == "token" else (4,)
        routes = {site: torch.rand(shape, generator=generator) < 0.6 for site in routing_of(model).sites}
        with fixed_routes(model, routes):
            out = step(model, inputs)
        assert (seen.count("sparse") > 0) == frozen
        grads = {
            f"{site} {name}": parameter.grad
            for site, path in routing_of(model).paths().items()
            for name, parameter in path.named_parameters()
            if parameter.grad is not None and parameter.grad.any()
        }
        found.append((out.loss.detach(), grads))
    (masked_loss, masked), (sparse_loss, sparse) = found
    assert masked
    torch.testing.assert_close(sparse_loss, masked_loss, rtol=1e-4, atol=1e-5)
    assert set(sparse) == set(masked)
    for name, gradient in masked.items():
        torch.testing.assert_close(sparse[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_a_copy_trains_alone() -> None:
    model = routed(penalty=0.1).train()
    twin = copy.deepcopy(model)
    step(twin, batch())
    assert all(router.weight.grad is None for router in routing_of(model).routers().values())
    assert gradients(twin).abs().sum() > 0


@pytest.mark.parametrize("inputs", [{}, {"labels": torch.ones(3, 4, dtype=torch.long)}], ids=["no labels", "labels"])
def test_rows_are_weighed_where_they_were_decided(inputs: dict[str, Tensor]) -> None:
    """On a second device the depth loss multiplies what routers gave with these weights."""
    trace = RoutingTrace(LAYERS, batch=3, tokens=4)
    trace.record(Site(1, "attention"), RoutingDecision(torch.ones(3, dtype=torch.bool, device="meta")))
    assert row_weights(trace, inputs).device.type == "meta"
    assert row_weights(RoutingTrace(LAYERS, batch=2, tokens=4), {}).tolist() == [0.5, 0.5]
