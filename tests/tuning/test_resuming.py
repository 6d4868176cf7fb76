"""What an interrupted run finds of itself, and what it leaves alone."""

import dataclasses

import pytest
import torch

from dynadepth import load, routing_of
from dynadepth.tuning import run
from dynadepth.tuning.run import tune
from dynadepth.tuning.trainer import RouterTrainer
from tuning_runs import LINEAR, RECIPE, STATIC, Tokenizer, examples, tiny

TOKEN = dataclasses.replace(LINEAR, method={**LINEAR.method, "granularity": "token"})
LORA = dataclasses.replace(LINEAR, lora={"rank": 2})
RANKS = dataclasses.replace(LINEAR, order="ranks")
RECIPES = {"ranks": RANKS, "identity": RECIPE, "linear": LINEAR, "static": STATIC, "token": TOKEN, "lora": LORA}


@pytest.fixture
def stopped(monkeypatch):
    """Interrupts a run before its first step; gives a function that counts what a run measures from then on."""
    step = RouterTrainer.training_step

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    def stop(recipe, out, **given):
        monkeypatch.setattr(RouterTrainer, "training_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tune(tiny(), Tokenizer(), examples(), recipe, out=out, **given)
        monkeypatch.setattr(RouterTrainer, "training_step", step)
        calls = []
        for name in ("fit", "scores_by", "start_by_token"):
            whole = getattr(run, name)
            monkeypatch.setattr(run, name, lambda *a, _name=name, _whole=whole: calls.append(_name) or _whole(*a))
        return calls

    return stop


@pytest.mark.parametrize("name", RECIPES)
def test_what_was_measured_and_fitted_is_not_done_again(tmp_path, stopped, name):
    recipe = RECIPES[name]
    tune(tiny(), Tokenizer(), examples(), recipe, out=tmp_path / "whole")
    calls = stopped(recipe, tmp_path / "cut")
    tune(tiny(), Tokenizer(), examples(), recipe, out=tmp_path / "cut")
    assert calls == []
    cut, whole = (routing_of(load(tiny(), tmp_path / folder)) for folder in ("cut", "whole"))
    assert cut.provenance["result"]["explained"] == whole.provenance["result"]["explained"]
    assert cut.provenance["result"]["order"] == whole.provenance["result"]["order"]
    assert cut.config == whole.config
    ended, wanted = cut.tensors(), whole.tensors()
    assert ended.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(ended[key], tensor), key


def test_seconds_of_the_start_count(tmp_path, stopped):
    stopped(LINEAR, tmp_path)
    path = tmp_path / "checkpoints" / "start" / "measured.json"
    text = path.read_text()
    first, _, last = text.partition('"seconds": ')
    path.write_text(first + '"seconds": 5000.0' + last[last.index("\n") :])
    assert 5000 < tune(tiny(), Tokenizer(), examples(), LINEAR, out=tmp_path).seconds < 5600


@pytest.mark.parametrize("damage", ["missing", "torn", "another", "tensors"])
def test_a_start_that_does_not_fit_is_made_again(tmp_path, stopped, damage):
    """Without its scores, with half of them, with those of nothing, or with other tensors."""
    calls = stopped(LINEAR, tmp_path)
    folder = tmp_path / "checkpoints" / "start"
    if damage == "missing":
        (folder / "measured.json").unlink()
    elif damage == "torn":
        (folder / "measured.json").write_text('{"scores": {"0.attention": 0.1')
    elif damage == "another":
        (folder / "measured.json").write_text('{"scores": ["0.attention"], "explained": null, "seconds": 1}')
    else:
        (folder / "routers.safetensors").write_bytes(b"\0" * 64)
    tune(tiny(), Tokenizer(), examples(), LINEAR, out=tmp_path)
    assert calls == ["fit", "scores_by", "start_by_token"]


def test_another_run_measures_for_itself(tmp_path, stopped):
    """Other settings, other texts, and other weights under the same settings and texts."""
    calls = stopped(LINEAR, tmp_path)
    for model, texts, recipe in (
        (tiny(), examples(), dataclasses.replace(LINEAR, learning_rate=0.01)),
        (tiny(), examples(seed=1), LINEAR),
    ):
        tune(model, Tokenizer(), texts, recipe, out=tmp_path)
        assert calls[:2] == ["fit", "scores_by"]
        calls.clear()
    stopped(LINEAR, tmp_path)
    calls.clear()
    flipped = tiny()
    with torch.no_grad():
        for parameter in flipped.parameters():
            parameter.neg_()
    tune(flipped, Tokenizer(), examples(), LINEAR, out=tmp_path)
    assert calls[:2] == ["fit", "scores_by"]


def test_a_checkpoint_of_other_weights_is_not_gone_on_from(tmp_path):
    tune(tiny(), Tokenizer(), examples(), RECIPE, out=tmp_path)
    flipped = tiny()
    with torch.no_grad():
        for parameter in flipped.parameters():
            parameter.neg_()
    result = tune(flipped, Tokenizer(), examples(), RECIPE, out=tmp_path)
    assert len(result.losses) == result.steps, "all steps are this run's"
    assert result.losses != tune(tiny(), Tokenizer(), examples(), RECIPE, out=tmp_path / "other").losses


def test_resume_false_starts_anew(tmp_path, stopped):
    calls = stopped(LINEAR, tmp_path)
    tune(tiny(), Tokenizer(), examples(), LINEAR, out=tmp_path, resume=False)
    assert calls[:2] == ["fit", "scores_by"]
