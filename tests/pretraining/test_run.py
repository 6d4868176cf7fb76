"""A run: the budget is met, it resumes where it stopped, and what it leaves is usable."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import dynadepth
from dynadepth.errors import ConfigError, DataError, TuningError
from dynadepth.pretraining import pretrain
from dynadepth.pretraining import run as runs
from dynadepth.pretraining.corpus import prepare
from dynadepth.pretraining.scoring import losses
from dynadepth.pretraining.trainer import PretrainTrainer
from pretraining_runs import DENSE, MOD, STEP, write_text


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path)


def test_a_dense_run_spends_its_budget_and_learns(tmp_path, text):
    result = pretrain(DENSE, [text], tmp_path / "out", flops=30.9 * STEP)
    assert result.steps == 30
    assert result.flops == 30 * STEP
    assert result.plan["forward_per_token"] == result.plan["dense_forward_per_token"] == STEP / 192
    assert len(result.losses) == 30
    assert np.mean(result.losses[-5:]) < np.mean(result.losses[:5]) - 0.5
    assert [entry["step"] for entry in result.history] == [15, 30]
    assert set(result.valid) == {"causal"}
    assert result.valid["causal"]["bits_per_byte"] == pytest.approx(result.valid["causal"]["nats"] / np.log(2))
    assert result.parameters - result.inner_parameters == 257 * 16
    assert json.loads((tmp_path / "out" / "run.json").read_text())["result"]["flops"] == result.flops


def test_a_routed_run_leaves_a_model_that_scores_the_same(tmp_path, text):
    out = tmp_path / "out"
    result = pretrain(MOD, [text], out, flops=8 * STEP)
    assert result.steps > 8  # its steps are cheaper
    assert result.flops == result.steps * result.plan["flops_per_step"] <= 8 * STEP
    assert result.plan["forward_per_token"] < result.plan["dense_forward_per_token"]
    assert result.valid["top_k"]["executed"] == 0.25
    assert 0 <= result.valid["top_k"]["accuracy"] <= 1
    model = dynadepth.load(AutoModelForCausalLM.from_pretrained(out / "model"), out / "model" / "routers")
    corpus = prepare(MOD, [text], [], out / "corpus")
    found = losses(model, corpus.windows(16, 256), corpus.byte_lengths)
    for name, loss in found.items():
        assert loss.nats == pytest.approx(result.valid[name]["nats"], rel=1e-5)


@pytest.mark.parametrize("recipe", [DENSE, MOD], ids=["dense", "mod"])
def test_a_stopped_run_resumes_and_ends_the_same(tmp_path, text, recipe, monkeypatch):
    recipe = replace(recipe, evaluations=4)
    whole = pretrain(recipe, [text], tmp_path / "whole", flops=12 * STEP)
    step = PretrainTrainer.training_step

    def stop(self, *args, **kwargs):
        if self.state.global_step == 7:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(PretrainTrainer, "training_step", stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe, [text], tmp_path / "cut", flops=12 * STEP)
    monkeypatch.undo()
    seen = []
    resumed = pretrain(
        recipe, [text], tmp_path / "cut", flops=12 * STEP, resume=True, progress=lambda *a: seen.append(a)
    )
    assert min(done for stage, done, _, _ in seen if stage == "train") > 1  # not from the start
    assert resumed.losses == pytest.approx(whole.losses, abs=1e-4)
    assert resumed.flops == whole.flops
    assert [entry["step"] for entry in resumed.history] == [entry["step"] for entry in whole.history]
    assert resumed.valid["causal"]["nats"] == pytest.approx(whole.valid["causal"]["nats"], abs=1e-4)
    assert pretrain(recipe, [text], tmp_path / "cut", flops=12 * STEP, resume=True) == resumed  # finished: read back


def test_ctrl_c_ends_the_step_and_keeps_it(tmp_path, text):
    import signal

    before = signal.getsignal(signal.SIGINT)

    def press(stage, done, total, figures):
        if stage == "train" and done == 5:
            signal.raise_signal(signal.SIGINT)

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        pretrain(replace(DENSE, checkpoints=0), [text], out, flops=12 * STEP, progress=press)
    assert (out / "checkpoints" / "checkpoint-5" / "pretraining.json").is_file()
    AutoModelForCausalLM.from_pretrained(out / "model")
    assert signal.getsignal(signal.SIGINT) is before
    resumed = pretrain(replace(DENSE, checkpoints=0), [text], out, flops=12 * STEP, resume=True)
    assert len(resumed.losses) == 12


def test_another_recipe_is_not_resumed_and_a_folder_not_overwritten(tmp_path, text):
    out = tmp_path / "out"
    pretrain(DENSE, [text], out, flops=2 * STEP)
    with pytest.raises(ConfigError, match="holds a run already: --resume goes on with it"):
        pretrain(DENSE, [text], out, flops=2 * STEP)
    other = replace(DENSE, learning_rate=0.5)
    with pytest.raises(ConfigError, match=r"\(recipe: learning_rate is 0\.01 there and 0\.5 here\)"):
        pretrain(other, [text], out, flops=2 * STEP, resume=True)
    with pytest.raises(ConfigError, match=r"\(flops is .* there and .* here\)"):
        pretrain(DENSE, [text], out, flops=3 * STEP, resume=True)
    with pytest.raises(ConfigError, match=r"\(corpus: files: text.txt is "):
        pretrain(DENSE, [write_text(tmp_path, 900)], out, flops=2 * STEP, resume=True)


def test_a_budget_below_one_step_says_what_one_costs(tmp_path, text):
    with pytest.raises(
        ConfigError, match=rf"budget of 1e\+04 FLOPs is below one step of {re.escape(f'{STEP:.3g}')}: give"
    ):
        pretrain(DENSE, [text], tmp_path / "out", flops=1e4)
    with pytest.raises(DataError, match="one batch takes 1,600"):
        pretrain(replace(DENSE, batch_size=100), [write_text(tmp_path, 100)], tmp_path / "out", flops=1e4)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_nan_stops_and_the_last_good_state_is_kept(tmp_path, text, monkeypatch, what):
    step = PretrainTrainer.training_step

    def spoil(self, model, inputs, *args, **kwargs):
        bad = self.state.global_step == 10
        if bad and what == "loss":
            with torch.no_grad():
                next(model.parameters()).fill_(float("nan"))
        loss = step(self, model, inputs, *args, **kwargs)
        if bad:
            next(model.parameters()).grad.fill_(float("nan"))
        return loss

    monkeypatch.setattr(PretrainTrainer, "training_step", spoil)
    out = tmp_path / "out"
    with pytest.raises(
        TuningError, match=rf"The {what} became nan at step 11. The model of step 8 is in .*model. Try a"
    ):
        pretrain(DENSE, [text], out, flops=12 * STEP)
    kept = AutoModelForCausalLM.from_pretrained(out / "model")
    assert all(torch.isfinite(p).all() for p in kept.parameters())


MOE = {**DENSE.model, "model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    "method",
    [
        {},
        {"method": "mode-staged", "capacity": 0.25, "predictor_width": 4},
        {"method": "mode-integrated", "no_ops": 2},
    ],
    ids=lambda method: method.get("method", "moe"),
)
def test_mixtures_of_experts_are_pretrained(tmp_path, text, method):
    balanced = {} if method else {"output_router_logits": True, "router_aux_loss_coef": 100.0}
    recipe = replace(DENSE, model={**MOE, **balanced}, method=method)
    result = pretrain(recipe, [text], tmp_path / "out", flops=20 * STEP)
    assert result.losses[0] == pytest.approx(np.log(257), abs=0.3)  # the language's alone
    assert result.losses[-1] < result.losses[0] - 0.5
    assert (result.plan["forward_per_token"] < result.plan["dense_forward_per_token"]) == bool(method)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    if method:
        dynadepth.load(model, tmp_path / "out" / "model" / "routers")


def test_training_goes_on_from_a_finished_model(tmp_path, text):
    first = pretrain(DENSE, [text], tmp_path / "first", flops=20 * STEP)
    method = {**MOD.method, "capacity": 0.5, "weighting": "sigmoid", "layers": [2]}
    recipe = replace(MOD, model={}, start=str(tmp_path / "first" / "model"), method=method)
    onward = pretrain(recipe, [text], tmp_path / "second", flops=4 * STEP)
    assert onward.losses[0] < first.losses[0] - 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model": {**DENSE.model, "hiden_size": 3}},
            "model of type 'llama' has no setting 'hiden_size'. Did you mean",
        ),
        ({"model": {**DENSE.model, "model_type": "lama"}}, "model_type 'lama' is none of transformers'"),
        ({"model": {**DENSE.model, "num_attention_heads": 3}}, "No model can be made of"),
        ({"model": {**DENSE.model, "vocab_size": 9}}, "vocab_size is the tokenizer's"),
        ({"method": {"method": "mod", "capacity": 0.01}}, "capacity 0.01 of a sequence of 16 tokens lets none execute"),
    ],
)
def test_settings_that_make_no_model_are_named(tmp_path, text, change, message):
    with pytest.raises(ConfigError, match=message):
        pretrain(replace(DENSE, **change), [text], tmp_path / "out", flops=4 * STEP)


def test_micro_batches_change_nothing(tmp_path, text):
    whole = pretrain(MOD, [text], tmp_path / "a", flops=4 * STEP)
    parts = pretrain(replace(MOD, gradient_accumulation=2), [text], tmp_path / "b", flops=4 * STEP)
    assert parts.losses == pytest.approx(whole.losses, abs=1e-4)
    assert parts.flops == whole.flops


def test_export_replaces_a_whole_folder_or_nothing(tmp_path, text, monkeypatch):
    out = tmp_path / "out"
    pretrain(DENSE, [text], out, flops=2 * STEP)
    corpus = prepare(DENSE, [text], [], out / "corpus")
    model = runs.build(DENSE, corpus)
    before = sorted(p.name for p in (out / "model").iterdir())

    def fail(folder):
        Path(folder).mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", fail)
    with pytest.raises(ConfigError, match="cannot be written: No space left"):
        runs.export(model, corpus, out / "model")
    assert sorted(p.name for p in (out / "model").iterdir()) == before
    assert not list(out.glob(".model*"))


def test_methods_for_finished_models_are_refused():
    with pytest.raises(ConfigError, match="'mindskip' tunes routers for a model that is finished"):
        replace(DENSE, method={"method": "mindskip", "granularity": "token"})
