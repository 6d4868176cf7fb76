"""Attaching and taking off: the model stays what it is, in every dtype, as a copy, on disk, and afterwards."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from dynadepth import (
    DrLLMConfig,
    MindSkipConfig,
    MoDConfig,
    Site,
    StaticConfig,
    attach,
    detach,
    disabled,
    fixed_routes,
    is_attached,
    routing_of,
    set_budget,
    set_control,
    set_speedup,
)
from dynadepth.errors import BudgetError, ConfigError, UnsupportedModelError
from dynadepth.routing.calibration import Calibration, CalibrationPoint
from small import ALL, COMMON, FAMILIES, KINDS, bare, ragged, routed, scatter

FAMILY = pytest.mark.parametrize("family", FAMILIES)
KIND = pytest.mark.parametrize(("granularity", "kv_policy"), KINDS)
TARGET = pytest.mark.parametrize("target", ["attention", "mlp", "block"])
BATCH = ragged([6, 3])


# ---- attach and detach


@FAMILY
@TARGET
def test_attach_keeps_the_object_its_class_and_its_names(family: str, target: str) -> None:
    base = bare(family)
    names, kind = list(base.state_dict()), type(base)
    model = attach(base, MindSkipConfig(target=target, layers=[1]))
    assert model is base
    assert isinstance(model, kind)
    assert (type(model).__name__, type(model).__module__) == (kind.__name__, kind.__module__)
    added = set(model.state_dict()) - set(names)
    place = {"attention": "self_attn.", "mlp": "mlp.", "block": ""}[target]
    assert added == {f"model.layers.1.{place}depth_router.{name}" for name in ("weight", "threshold")}
    assert [name for name in model.state_dict() if name not in added] == names


@FAMILY
@TARGET
@pytest.mark.parametrize("granularity", ["sequence", "route", "token"])
def test_detach_restores_the_model(family: str, target: str, granularity: str) -> None:
    base = bare(family)
    base.get_input_embeddings().requires_grad_(False)
    classes = {name: type(module) for name, module in base.named_modules()}
    attributes = {name: set(vars(module)) for name, module in base.named_modules()}
    trainable = {name for name, p in base.named_parameters() if p.requires_grad}
    wanted = base(**BATCH).logits
    model = scatter(attach(base, MindSkipConfig(target=target, granularity=granularity, layers=ALL)))
    assert not torch.equal(model(**BATCH).logits, wanted)
    assert detach(model) is base
    assert {name: type(module) for name, module in base.named_modules()} == classes
    assert {name: set(vars(module)) for name, module in base.named_modules()} == attributes
    assert {name for name, p in base.named_parameters() if p.requires_grad} == trainable
    assert torch.equal(base(**BATCH).logits, wanted)
    assert not is_attached(base)
    attach(base, MindSkipConfig())  # and can be routed again


def test_attach_leaves_modes_and_random_state_alone() -> None:
    base = bare().train()
    base.model.layers[0].eval()
    modes = {name: module.training for name, module in base.named_modules()}
    state = torch.get_rng_state()
    attach(base, MindSkipConfig())
    assert {name: mode for name, mode in ((n, m.training) for n, m in base.named_modules()) if name in modes} == modes
    assert torch.equal(torch.get_rng_state(), state)


@FAMILY
@KIND
def test_disabled_is_the_base_bit_for_bit(family: str, granularity: str, kv_policy: str) -> None:
    base, model = bare(family), routed(family, granularity=granularity, kv_policy=kv_policy)
    options = {"max_new_tokens": 5, "do_sample": False}
    with disabled(model) as same:
        assert same is model
        assert torch.equal(model(**BATCH).logits, base(**BATCH).logits)
        assert torch.equal(model.generate(**BATCH, **options), base.generate(**BATCH, **options))
        assert torch.equal(model.train()(**BATCH).logits, base(**BATCH).logits)
    with disabled(base):
        assert torch.equal(base(**BATCH).logits, bare(family)(**BATCH).logits)


def test_what_is_attached_can_be_read() -> None:
    model = routed(layers=[2, 0], target="mlp")
    routing = routing_of(model)
    assert routing.sites == (Site(0, "mlp"), Site(2, "mlp"))
    assert [str(site) for site in routing.sites] == ["0.mlp", "2.mlp"]
    assert Site.parse("2.mlp") == routing.sites[1]
    assert list(routing.routers()) == list(routing.sites)
    assert routing.n_layers == 4
    assert [site.layer for site in routing_of(routed(layers="all")).sites] == list(ALL)


def test_a_headless_model_and_a_direct_call_of_the_decoder() -> None:
    model = routed()
    whole = model(**BATCH, output_hidden_states=True)
    inner = model.model(**BATCH)
    assert torch.equal(inner.last_hidden_state, whole.hidden_states[-1])
    assert inner.past_key_values.routes == whole.past_key_values.routes
    headless = scatter(attach(bare().model, MindSkipConfig(layers=ALL)))
    assert torch.equal(headless(**BATCH).last_hidden_state, inner.last_hidden_state)
    assert torch.isfinite(detach(headless)(**BATCH).last_hidden_state).all()


def test_arguments_by_position_tuples_and_embeddings() -> None:
    model = routed()
    wanted = model(**BATCH)
    assert torch.equal(model(BATCH["input_ids"], BATCH["attention_mask"]).logits, wanted.logits)
    found = model(**BATCH, return_dict=False)
    assert isinstance(found, tuple)
    assert torch.equal(found[0], wanted.logits)
    embedded = model.get_input_embeddings()(BATCH["input_ids"])
    assert torch.equal(model(inputs_embeds=embedded, attention_mask=BATCH["attention_mask"]).logits, wanted.logits)


def test_outputs_carry_the_trace_beside_their_keys() -> None:
    model = routed()
    out = model(**BATCH)
    assert set(out) == {"logits", "past_key_values"}
    assert list(out.depth_logits) == list(routing_of(model).sites)
    assert all(logits.shape == (2,) and logits.dtype == torch.float32 for logits in out.depth_logits.values())
    assert (out.depth_trace.batch, out.depth_trace.tokens, out.depth_loss) == (2, 6, None)
    by_token = routed(granularity="token")(**BATCH)
    assert all(logits.shape == (2, 6) for logits in by_token.depth_logits.values())


def test_the_signature_is_the_bases_with_prompt_mask() -> None:
    base, model = bare(), routed()
    own, routed_ = (inspect.signature(m.forward).parameters for m in (base, model))
    assert [name for name in routed_ if name != "prompt_mask"] == list(own)
    assert model._supports_logits_to_keep()
    assert model(**BATCH, logits_to_keep=1).logits.shape[1] == 1


# ---- refusals


def test_what_attach_refuses() -> None:
    with pytest.raises(UnsupportedModelError, match="Linear is not a transformers PreTrainedModel"):
        attach(nn.Linear(2, 2), MindSkipConfig())
    with pytest.raises(ConfigError, match=r"already routed.*detach"):
        attach(routed(), MindSkipConfig())
    with pytest.raises(ConfigError, match=r"layers \[4, 9\] do not exist.*4 layers, 0 to 3"):
        attach(bare(), MindSkipConfig(layers=[1, 4, 9]))
    with pytest.raises(UnsupportedModelError, match=r"has no routers: call dynadepth.attach"):
        routing_of(bare())
    with pytest.raises(UnsupportedModelError, match="has no routers"):
        detach(bare())


def test_unsupported_architectures_say_what_was_looked_for() -> None:
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=30))
    with pytest.raises(
        UnsupportedModelError, match=r"BloomForCausalLM cannot be routed.*'layers'.*dynadepth/architectures"
    ):
        attach(bloom, MindSkipConfig())
    with torch.device("meta"):
        hollow = transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON))
    with pytest.raises(UnsupportedModelError, match=r"no weights yet.*load them before"):
        attach(hollow, MindSkipConfig())


def test_a_refused_model_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from dynadepth.architectures import probe

    base = bare()
    classes = [type(module) for module in base.modules()]

    def differs(*_: Any) -> None:
        raise UnsupportedModelError("differs")

    monkeypatch.setattr(probe, "check_same", differs)
    with pytest.raises(UnsupportedModelError, match="differs"):
        attach(base, MindSkipConfig())
    assert [type(module) for module in base.modules()] == classes
    assert all(p.requires_grad for p in base.parameters())


def test_a_layer_that_changes_the_stream_by_itself_is_refused() -> None:
    class Shifting(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden + 1

    base = bare("gemma3")  # what comes behind its attention is part of the contribution, so that zero must stay zero
    base.model.layers[1].post_attention_layernorm = Shifting()
    with pytest.raises(UnsupportedModelError, match=r"at layers \[1\].*not the identity"):
        attach(base, MindSkipConfig(layers=ALL))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"kv_policy": "drop"}, "skipped sequences store none"),
        ({"kv_policy": "drop", "target": "mlp", "granularity": "token"}, "mlp keeps no keys"),
        ({"kv_policy": "drop", "target": "mlp"}, "mlp keeps no keys"),
    ],
    ids=str,
)
def test_a_policy_without_effect_warns(config: dict[str, Any], reason: str) -> None:
    with pytest.warns(UserWarning, match=f"kv_policy='drop' has no effect.*{reason}") as caught:
        attach(bare(), MindSkipConfig(**config))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for target in ("attention", "block"):
            attach(bare(), MindSkipConfig(target=target, granularity="token", kv_policy="drop"))


# ---- budgets


def test_budgets_that_cannot_be_set() -> None:
    model = routed(layers=(1, 2))
    for value in (0, -0.5, 1.01, float("nan")):
        with pytest.raises(BudgetError, match="above 0 and at most 1"):
            set_budget(model, attention=value)
    with pytest.raises(BudgetError, match=r"0.4 cannot be reached: only 2 of 4 attention.*0.500 always executes"):
        set_budget(model, attention=0.4)
    with pytest.raises(BudgetError, match=r"target is 'attention'.*attention=\.\.\."):
        set_budget(model, mlp=0.75)
    with pytest.raises(BudgetError, match=r"no calibration.*tune them, run `dynadepth calibrate`, or call"):
        set_budget(model, attention=0.75)
    for config, way_out in (
        (MoDConfig(), r"trained with the model, and get none; call dynadepth\.budget\.calibrate"),
        (DrLLMConfig(), r"trained apart.* shift their own choice with --control P, or dynadepth\.set_control"),
    ):
        with pytest.raises(BudgetError, match=way_out):
            set_budget(attach(bare(), config), block=0.75)
    with pytest.raises(BudgetError, match="static route"):
        set_budget(attach(bare(), StaticConfig(skip=(1,))), attention=1.0)
    assert routing_of(model).budget is None


def test_controls_and_speed_ups_that_are_no_numbers() -> None:
    model = routed()
    for value in ("0.5", None, 1.5, float("nan"), [0.5]):
        with pytest.raises(BudgetError, match="control must be a number between -1 and 1, not"):
            set_control(model, value)
        with pytest.raises(BudgetError, match="speed-up must be a number of at least 1"):
            set_speedup(model, "1.2" if value is None else "x")
    set_control(model, np.float32(0.25))
    assert type(routing_of(model).control) is float


@pytest.mark.parametrize("config", [None, {"method": "mindskip"}, MindSkipConfig], ids=str)
def test_attach_wants_a_configuration(config: Any) -> None:
    with pytest.raises(ConfigError, match="attach takes a configuration such as"):
        attach(bare(), config)


def test_a_budget_moves_every_threshold() -> None:
    model = routed(layers=(1, 2))
    routing = routing_of(model)
    routing.calibration = Calibration((CalibrationPoint(0.5, (-1.0, 0.0, 1.0)),), n_sequences=3)
    set_budget(model, attention=0.75)  # half of the two routed sites
    assert [router.threshold.item() for router in routing.routers().values()] == [0.0, 0.0]
    assert routing.budget == 0.75
    set_budget(model, attention=1.0)
    assert torch.equal(model(**BATCH).logits, bare()(**BATCH).logits)
    set_budget(model, attention=0.5)
    with fixed_routes(model, dict.fromkeys(routing.sites, False)):
        nothing = model(**BATCH).logits
    assert torch.equal(model(**BATCH).logits, nothing)
