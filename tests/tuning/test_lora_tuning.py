"""Tuning a LoRA beside routers and skip paths: what learns, what must not, and what survives an interruption."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from dynadepth import detach, disabled, is_attached, load, routing_of
from dynadepth.errors import ConfigError, TuningError
from dynadepth.tuning import Collator, tune
from dynadepth.tuning.choice import settle
from dynadepth.tuning.recipe import recipe_from_dict
from dynadepth.tuning.trainer import RouterTrainer
from tuning_runs import LINEAR, RECIPE, STATIC, Tokenizer, examples, fingerprint, tiny

LORA = {"lora": {"rank": 2}, "lora_learning_rate": 0.01}
recipes = pytest.mark.parametrize(
    "recipe", [dataclasses.replace(r, **LORA) for r in (RECIPE, LINEAR, STATIC)], ids=["identity", "linear", "static"]
)
PER_LAYER = 2 * (64 + 48 + 48 + 64 + 3 * 80)  # rank × (in + out) of q, k, v, o and the MLP's three
FILES = ("routers.safetensors", "adapter_model.safetensors", "adapter_config.json")


@recipes
def test_it_learns_and_the_backbone_does_not(tmp_path, recipe):
    model = tiny()
    before, batch = fingerprint(model), Collator(0)(examples(6, seed=9))
    dense = model.eval()(**{k: v for k, v in batch.items() if k != "prompt_mask"}).logits
    result = tune(model, Tokenizer(), examples(), recipe, out=tmp_path, budget=0.5)
    learnt = routing_of(model).lora.tensors()
    assert sum(t.numel() for t in learnt.values()) == 4 * PER_LAYER
    assert result.n_trainable >= 4 * PER_LAYER
    assert all(t.abs().sum() > 0 for name, t in learnt.items() if "down_proj.lora_B." in name)
    with disabled(model):
        assert torch.equal(model(**batch).logits, dense)
    again = load(tiny(), tmp_path).eval()
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert fingerprint(detach(model)) == before
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in learnt.items())


def test_it_brings_the_routed_model_nearer_to_the_dense_one(tmp_path):
    """With steps enough for so small a model; skip paths, routers and data are the same."""
    without = dataclasses.replace(STATIC, epochs=12)
    results = [
        tune(tiny(), Tokenizer(), examples(), recipe, out=tmp_path / str(number), budget=0.5)
        for number, recipe in enumerate((without, dataclasses.replace(without, **LORA)))
    ]
    assert results[0].kl_before == results[1].kl_before
    assert results[1].losses[-1] < results[0].losses[-1]


@recipes
def test_an_interrupted_run_ends_as_a_whole_one(tmp_path, monkeypatch, recipe):
    tune(tiny(), Tokenizer(), examples(), recipe, out=tmp_path / "whole")
    step, calls = RouterTrainer.training_step, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RouterTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tune(tiny(), Tokenizer(), examples(), recipe, out=tmp_path / "cut")
    assert {*FILES} <= {path.name for path in (tmp_path / "cut").iterdir()}
    calls.clear()
    monkeypatch.setattr(RouterTrainer, "training_step", lambda self, *a, **k: (calls.append(1), step(self, *a, **k))[1])
    tune(tiny(), Tokenizer(), examples(), recipe, out=tmp_path / "cut")
    assert len(calls) < 12
    for name in FILES:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_loss_that_is_no_number_leaves_the_last_good_lora(tmp_path, monkeypatch):
    recipe = dataclasses.replace(LINEAR, **LORA)
    step, kept = RouterTrainer.training_step, []

    def poisoned(self, *args, **kwargs):
        kept.append({n: t.clone() for n, t in routing_of(self.model).lora.tensors().items()})
        if len(kept) == 4:
            with torch.no_grad():
                for _, parameter in routing_of(self.model).lora.named_parameters():
                    parameter.fill_(float("nan"))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(RouterTrainer, "training_step", poisoned)
    with pytest.raises(TuningError):
        tune(tiny(), Tokenizer(), examples(), recipe, out=tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())
    assert load(tiny(), tmp_path)


def test_the_chosen_static_route_keeps_it(tmp_path):
    model = tiny()
    tune(model, Tokenizer(), examples(), dataclasses.replace(LINEAR, **LORA), out=tmp_path, budget=0.5)
    learnt = routing_of(model).lora.tensors()
    settle(model, (2, 1, 3))
    assert routing_of(model).is_static
    kept = routing_of(model).lora.tensors()
    assert kept.keys() == learnt.keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in learnt.items())


def test_bad_settings_are_said_before_anything_is_tuned(tmp_path):
    with pytest.raises(ConfigError, match="lora has no setting 'r'"):
        recipe_from_dict({"name": "x", "source": "y", "method": {"method": "mindskip"}, "lora": {"r": 2}}, "file")
    with pytest.raises(ConfigError, match=r"lora must be dict.*not 16"):
        recipe_from_dict({"name": "x", "source": "y", "method": {"method": "mindskip"}, "lora": 16}, "file")
    model = tiny()
    recipe = dataclasses.replace(LINEAR, lora={"rank": 2, "modules": ["w1"]})
    with pytest.raises(ConfigError, match="no linear layer 'w1'"):
        tune(model, Tokenizer(), examples(), recipe, out=tmp_path)
    assert not is_attached(model)


def test_joint_without_skip_paths_leaves_the_lora_to_learn(tmp_path):
    recipe = dataclasses.replace(RECIPE, joint=0.5, **LORA)
    assert tune(tiny(), Tokenizer(), examples(), recipe, out=tmp_path).steps == 12
    with pytest.raises(ConfigError, match="leaves nothing to learn without skip paths or LoRA"):
        tune(tiny(), Tokenizer(), examples(), dataclasses.replace(RECIPE, joint=0.5), out=tmp_path)


def test_a_users_own_lora_is_a_part_of_the_dense_model(tmp_path):
    """It is what the teacher is, too; no checkpoint would hold what it learnt."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    model = peft.get_peft_model(tiny(), peft.LoraConfig(r=2, lora_dropout=0.5, init_lora_weights=False))
    own = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    assert own
    dropped = []
    for name, module in model.named_modules():
        if "lora_dropout" in name and isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda module, *_: dropped.append(module.training))
    tune(model, Tokenizer(), examples(), LINEAR, out=tmp_path)
    assert dropped
    assert not any(dropped)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], tensor) for name, tensor in own.items())
    detach(model)
    assert all(now[name].requires_grad for name in own)
