"""Router-only tuning end to end on a tiny model: what moves, what must not, and what survives an interruption."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from dynadepth import MindSkipConfig, attach, detach, is_attached, load, recording, routing_of, set_budget, vocabulary
from dynadepth.errors import BudgetError, ConfigError, TuningError
from dynadepth.tuning import run, start
from dynadepth.tuning.controller import QuantileController
from dynadepth.tuning.data import Collator, Example
from dynadepth.tuning.objectives import Predictions, ce_loss, ce_sum, kl_loss, kl_sum
from dynadepth.tuning.run import tune
from dynadepth.tuning.surrogate import fit_paths
from dynadepth.tuning.trainer import RouterTrainer, check_device, trainer_for
from tuning_runs import LINEAR, RECIPE, STATIC, Tokenizer, examples, fingerprint, tiny

both = pytest.mark.parametrize("recipe", [RECIPE, LINEAR], ids=["identity", "linear"])
every = pytest.mark.parametrize("recipe", [RECIPE, LINEAR, STATIC], ids=["identity", "linear", "static"])


@both
def test_tuning_moves_routers_and_nothing_else(tmp_path, recipe):
    """Semantic 8: after tuning every backbone tensor is byte-identical; only routers have gradients and optimiser
    state."""
    model = tiny()
    before = fingerprint(model)
    result = tune(model, Tokenizer(), examples(), recipe, out=tmp_path, budget=0.75)
    assert fingerprint(model) == before
    assert result.steps == 12
    assert result.moved > 1e-3
    assert result.n_trainable == 4 * 33 + (recipe is LINEAR) * 4 * (4 * 32 * 4 + 32)
    assert all(".depth_" in name for name, p in model.named_parameters() if p.requires_grad)
    assert result.keep_after is not None
    assert result.keep_after.all == pytest.approx(0.75, abs=0.02 + 1 / 32)  # 16 held-out prompts of 4 sites
    assert len(result.static_skip) == 1
    assert {"routing_config.json", "routers.safetensors"} <= {path.name for path in tmp_path.iterdir()}


def test_saved_routers_serve_other_budgets(tmp_path):
    tune(tiny(), Tokenizer(), examples(), RECIPE, out=tmp_path, budget=0.75)
    model = load(tiny(), tmp_path).eval()
    batch = Collator(0)(examples(60, seed=9))
    kept = []
    for budget in (0.4, 0.6, 0.9):
        set_budget(model, attention=budget)
        with recording() as record, torch.no_grad():
            model(**batch)
        kept.append(record.keep_ratio("prefill").all)
    assert kept == sorted(kept)
    assert kept[0] < kept[-1]


@every
def test_the_same_seed_gives_the_same_routers(tmp_path, recipe):
    runs = []
    for name in ("a", "b"):
        tune(tiny(), Tokenizer(), examples(), recipe, out=tmp_path / name)
        runs.append((tmp_path / name / "routers.safetensors").read_bytes())
    assert runs[0] == runs[1]


@every
def test_an_interrupted_run_resumes_where_it_was(tmp_path, monkeypatch, recipe):
    """The resumed run ends with the routers of the uninterrupted one."""
    tune(tiny(), Tokenizer(), examples(), recipe, out=tmp_path / "whole")

    step = RouterTrainer.training_step
    calls = []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(RouterTrainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(tiny(), Tokenizer(), examples(), recipe, out=tmp_path / "cut")
    usable = load(tiny(), tmp_path / "cut")
    assert routing_of(usable).provenance["stopped"]["why"] == "interrupted"
    calls.clear()
    calls.extend([0] * 100)
    tune(tiny(), Tokenizer(), examples(), recipe, out=tmp_path / "cut")
    assert len(calls) == 100 + 12 - 4  # four steps were in the last checkpoint
    whole, cut = (load(tiny(), tmp_path / name) for name in ("whole", "cut"))
    told = [routing_of(model).provenance["result"] for model in (cut, whole)]
    assert told[0]["losses"] == pytest.approx(told[1]["losses"]), "those of both legs"
    ended, wanted = routing_of(cut).tensors(), routing_of(whole).tensors()
    assert ended.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(ended[name], tensor, msg=name)


def test_seconds_are_those_of_all_legs(tmp_path):
    tune(tiny(), Tokenizer(), examples(), RECIPE, out=tmp_path)
    (last,) = (tmp_path / "checkpoints").glob("checkpoint-*")
    leg = json.loads((last / "leg.json").read_text())
    assert 0 < leg["seconds"] < 600
    (last / "leg.json").write_text(json.dumps({**leg, "seconds": 5000.0}))
    again = tune(tiny(), Tokenizer(), examples(), RECIPE, out=tmp_path)
    assert 5000 < again.seconds < 5600
    assert again.losses == leg["losses"]
    (last / "leg.json").unlink()
    assert tune(tiny(), Tokenizer(), examples(), RECIPE, out=tmp_path).losses == []


def test_a_method_without_biases_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(start, "fit_paths", lambda *_: pytest.fail("found out late"))
    recipe = dataclasses.replace(LINEAR, method={**LINEAR.method, "method": "random"}, init="importance")
    for name in ("bias", "penalty"):
        recipe.method.pop(name, None)
    with pytest.raises(ConfigError, match="those of method 'random' have none: set init to zeros"):
        tune(tiny(), Tokenizer(), examples(), recipe, out=tmp_path)


def test_a_checkpoint_that_a_kill_left_half_written_is_passed_over(tmp_path, monkeypatch):
    tune(tiny(), Tokenizer(), examples(), RECIPE, out=tmp_path)
    wanted = (tmp_path / "routers.safetensors").read_bytes()
    half = tmp_path / "checkpoints" / "checkpoint-99"
    half.mkdir(parents=True)
    (half / "routing_config.json").write_text('{"format":')
    tune(tiny(), Tokenizer(), examples(), RECIPE, out=tmp_path)
    assert (tmp_path / "routers.safetensors").read_bytes() == wanted


def test_a_checkpoint_without_the_trainers_own_state_is_passed_over(tmp_path):
    """Routers are written first; a kill while the optimiser's state is written leaves them alone."""
    tune(tiny(), Tokenizer(), examples(), RECIPE, out=tmp_path)
    wanted = (tmp_path / "routers.safetensors").read_bytes()
    (whole,) = (tmp_path / "checkpoints").glob("checkpoint-*")
    for number, name in ((98, "optimizer.pt"), (99, "trainer_state.json")):
        half = shutil.copytree(whole, whole.with_name(f"checkpoint-{number}"))
        (half / "trainer_state.json").unlink()
        (half / name).write_text("")
    again = tune(tiny(), Tokenizer(), examples(), RECIPE, out=tmp_path)
    assert again.steps == 12
    assert (tmp_path / "routers.safetensors").read_bytes() == wanted


def test_a_run_stopped_after_its_training_trains_no_step_more(tmp_path):
    recipe = dataclasses.replace(LINEAR, epochs=1.5, learning_rate=0.05)  # not whole epochs
    first = tune(tiny(), Tokenizer(), examples(), recipe, out=tmp_path)
    wanted = (tmp_path / "routers.safetensors").read_bytes()
    again = tune(tiny(), Tokenizer(), examples(), recipe, out=tmp_path)
    assert (again.steps, again.losses) == (first.steps, first.losses)
    assert (tmp_path / "routers.safetensors").read_bytes() == wanted
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("checkpoint-*")) == [f"checkpoint-{first.steps}"]


def test_more_gpus_than_one_change_no_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda args: getattr(args, "_n_gpu", 4) or 4))
    model = attach(tiny(), RECIPE.config())
    made = trainer_for(model, examples(), Collator(0), RECIPE, tmp_path, 0.75, 0, None)
    assert made.args.n_gpu == 1
    assert made.args.train_batch_size == RECIPE.batch_size


def test_another_gpu_than_the_first_is_refused(tmp_path, monkeypatch):
    model = tiny()
    check_device(model)
    monkeypatch.setattr(model, "parameters", lambda: iter([SimpleNamespace(device=torch.device("cuda", 1))]))
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES=1"):
        tune(model, Tokenizer(), examples(), RECIPE, out=tmp_path)


def test_a_model_that_overflows_is_said_before_anything_is_fitted(tmp_path):
    """On the texts that it is tuned on: what `attach` shows it may be harmless."""
    model = tiny()
    with torch.no_grad():
        model.model.embed_tokens.weight[61].fill_(torch.inf)
    given = [Example([61, 5, 61, 7, 61, 9, 61, 11], 4), *examples()]
    for recipe in (RECIPE, LINEAR):
        with pytest.raises(TuningError, match="LlamaForCausalLM overflows in float32, without any route"):
            tune(model, Tokenizer(), given, recipe, out=tmp_path)
        assert not is_attached(model)


def test_skip_paths_are_tuned_and_saved(tmp_path):
    """Paths move away from their fit, answer the same after loading, and another model's are refused."""
    model = tiny()
    attach(model, LINEAR.config())
    fit_paths(model, [{k: v for k, v in Collator(0)(examples()[16:]).items() if k in ("input_ids", "attention_mask")}])
    fitted = {name: t.clone() for name, t in routing_of(model).tensors().items() if ".depth_path." in name}
    detach(model)
    still = dataclasses.replace(LINEAR, learning_rate=0.0, bias_learning_rate=0.0, budgets=())  # one route throughout
    result = tune(model, Tokenizer(), examples(), still, out=tmp_path, budget=0.5)
    assert result.keep_after == result.keep_before
    assert result.kl_after < result.kl_before
    assert result.explained is not None
    assert all(0 < share < 1 for share in result.explained.values())
    tuned = routing_of(model).tensors()
    assert len(fitted) == 12
    for name, tensor in fitted.items():
        assert not torch.equal(tuned[name], tensor), name
    batch = Collator(0)(examples(6, seed=5))
    routing_of(model).budget = None
    set_budget(model, attention=0.5)
    loaded = load(tiny(), tmp_path).eval()
    set_budget(loaded, attention=0.5)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)


def test_a_path_of_a_small_scale_takes_small_steps(tmp_path):
    """Adam's steps have one size, a path's tensors the scale of the model's states: none may be swept away."""
    model = tiny()
    recipe = dataclasses.replace(LINEAR, path_learning_rate=1e-3)
    attach(model, recipe.config())
    paths = list(routing_of(model).paths().values())
    with torch.no_grad():
        for path in paths:
            for tensor in path.parameters():
                tensor.copy_(torch.randn_like(tensor))
        paths[0].read.mul_(1e-3)
        paths[1].bias.zero_()
    trainer = trainer_for(model, examples(), Collator(0), recipe, tmp_path, 0.5, 0, None)
    rates = {id(p): g["lr"] for g in trainer.create_optimizer().param_groups for p in g["params"]}
    small = {id(paths[0].read): 0.03 * paths[0].read.square().mean().sqrt().item()}
    for path in paths:
        for tensor in path.parameters():
            assert rates[id(tensor)] == pytest.approx(small.get(id(tensor), 1e-3))
    learnt = {id(p) for p in model.parameters() if p.requires_grad}
    assert set(rates) == learnt, "each parameter once"


def test_routers_learn_in_their_share_of_the_steps_and_paths_in_all(tmp_path):
    """Behind the joint steps routers stay, and what skips does not run; the loss counts prompts where asked to."""
    recipe = dataclasses.replace(LINEAR, joint=0.5, score="all", save_steps=1)
    model, kinds, moved = tiny(), [], []

    def look(stage, done, total, figures):
        if stage == "tune":
            routing = routing_of(model)
            kinds.append(routing.learns)
            parts = (routing.routers(), routing.paths())
            moved.append([{str(s): [p.clone() for p in m.parameters()] for s, m in part.items()} for part in parts])

    tune(model, Tokenizer(), examples(), recipe, out=tmp_path, budget=0.5, progress=look)
    assert kinds == [True] * 6 + [False] * 6
    assert routing_of(model).learns  # as before
    flat = [[torch.cat([p.flatten() for m in part.values() for p in m]) for part in step] for step in moved]
    assert not torch.equal(flat[0][0], flat[5][0])
    assert torch.equal(flat[5][0], flat[11][0])
    assert not torch.equal(flat[5][1], flat[11][1])


def test_every_stage_tells_how_far_it_is(tmp_path):
    """On a large model each of them takes minutes."""
    stages = {}
    recipe = dataclasses.replace(LINEAR, order="ranks", choose=True)
    tune(tiny(), Tokenizer(), examples(), recipe, out=tmp_path, budget=0.5,
         progress=lambda stage, done, total, _: stages.setdefault(stage, []).append((done, total)))  # fmt: skip
    assert list(stages) == ["fit", "importance", "compare", "tune", "calibrate"]
    assert all(told[-1][0] == told[-1][1] for told in stages.values())
    finished = {stage: sum(done == total for done, total in told) for stage, told in stages.items()}
    assert finished["importance"] == 2, "damage, then 1 - cosine"
    assert finished["compare"] >= 3, "before, between routers and route, and after"


def test_a_step_in_which_everything_executes_teaches_nothing(tmp_path):
    recipe = dataclasses.replace(LINEAR, joint=0.0, budgets=())
    result = tune(tiny(), Tokenizer(), examples(), recipe, out=tmp_path, budget=1.0)
    assert result.losses == pytest.approx([0.0] * 12, abs=1e-6)


def test_without_skip_paths_there_is_nothing_left_to_learn(tmp_path):
    with pytest.raises(
        ConfigError, match=r"joint: 0.5 leaves nothing to learn without skip paths or LoRA: set it to 1\."
    ):
        tune(tiny(), Tokenizer(), examples(), dataclasses.replace(RECIPE, joint=0.5), out=tmp_path)


def test_every_step_has_one_of_the_budgets():
    controller = QuantileController(attach(tiny(), RECIPE.config()), [0.25, 0.5, 1.0], seed=3)
    keeps = [controller.keep_at(step) for step in range(60)]
    assert set(keeps) == {0.25, 0.5, 1.0}
    assert keeps == [controller.keep_at(step) for step in range(60)]


def test_padding_has_no_part_in_the_threshold_of_tokens():
    model = attach(tiny(), dataclasses.replace(RECIPE.config(), granularity="token")).train()
    controller = QuantileController(model, [0.5], seed=0)
    rows = [Example(list(range(2, 2 + n)), 2) for n in (5, 12)]
    model(**Collator(0)(rows))
    kept = [torch.cat(inputs) for inputs in controller.inputs.values()]
    assert [len(units) for units in kept] == [5 + 12] * len(kept)


def test_a_share_of_the_tokens_stands_for_all_of_them():
    """The mean over draws is the loss on all tokens, and the head runs for the drawn positions alone."""
    model = attach(tiny(), LINEAR.config())
    routers = list(routing_of(model).routers().values())
    for router in routers[:2]:
        router.threshold.fill_(float("inf"))
    rows = [Example(torch.arange(2, 26).roll(i).tolist(), 8) for i in range(4)]
    batch = Collator(0)(rows)
    whole = kl_loss(model, batch, None)[0].item()
    torch.manual_seed(0)
    heads: list[int] = []
    watch = model.lm_head.register_forward_hook(lambda head, args, logits: heads.append(logits.shape[:-1].numel()))
    drawn = [kl_loss(model, batch, None, share=0.25)[0].item() for _ in range(60)]
    watch.remove()
    # Teacher and student: the last position of 4 rows each, once one row to know V, then 4 of 16 positions of each.
    assert sum(heads) == 60 * (2 * 4 + 1 + 2 * 4 * 4)
    assert min(drawn) < whole < max(drawn)
    assert sum(drawn) / len(drawn) == pytest.approx(whole, rel=0.1)


def test_few_examples_are_held_out_as_calibration_needs_them(tmp_path):
    few = dataclasses.replace(RECIPE, holdout=0.1)
    result = tune(tiny(), Tokenizer(), examples(24), few, out=tmp_path / "24")
    assert (result.n_heldout, result.n_train) == (8, 16)  # one more than 7 shares
    with pytest.raises(BudgetError, match="too few to calibrate 7 budgets: give at least 8"):
        tune(tiny(), Tokenizer(), examples(2), few, out=tmp_path / "2")


def test_a_checkpoint_of_other_settings_is_not_resumed(tmp_path):
    tune(tiny(), Tokenizer(), examples(), RECIPE, out=tmp_path)
    other = dataclasses.replace(RECIPE, learning_rate=0.01)
    assert len(tune(tiny(), Tokenizer(), examples(), other, out=tmp_path).losses) == 12
    assert len(tune(tiny(), Tokenizer(), examples(seed=1), other, out=tmp_path).losses) == 12
    assert len(tune(tiny(), Tokenizer(), examples(seed=1), other, out=tmp_path, granularity="token").losses) == 12


def test_nan_stops_keeps_the_last_good_state_and_says_what_to_try(tmp_path, monkeypatch):
    compute = RouterTrainer.compute_loss
    calls = []

    def poisoned(self, *args, **kwargs):
        calls.append(1)
        loss = compute(self, *args, **kwargs)
        return loss * float("nan") if len(calls) == 4 else loss

    monkeypatch.setattr(RouterTrainer, "compute_loss", poisoned)
    with pytest.raises(TuningError, match=r"became nan at step 4.*lower learning_rate"):
        tune(tiny(), Tokenizer(), examples(), RECIPE, out=tmp_path)
    for router in routing_of(load(tiny(), tmp_path)).routers().values():
        assert torch.isfinite(router.weight).all()
        assert torch.isfinite(router.bias).all()


def test_a_last_step_that_went_wrong_is_noticed(tmp_path, monkeypatch):
    step = torch.optim.AdamW.step

    def poisoned(self, *args, **kwargs):
        done = step(self, *args, **kwargs)
        with torch.no_grad():
            self.param_groups[0]["params"][0].fill_(float("nan"))
        return done

    monkeypatch.setattr(torch.optim.AdamW, "step", poisoned)
    with pytest.raises(TuningError, match=r"not finite after step 1; .*lower learning_rate"):
        tune(tiny(), Tokenizer(), examples(), dataclasses.replace(RECIPE, max_steps=1), out=tmp_path)
    for router in routing_of(load(tiny(), tmp_path)).routers().values():
        assert torch.isfinite(router.weight).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"lr_scheduler": "cosin"}, "Did you mean 'cosine'"), ({"report_to": ("nope",)}, "report_to: .*nope")],
)
def test_what_the_trainer_does_not_know_is_said_first(tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(run, "attach", lambda *_: pytest.fail("nothing is measured before"))
    with pytest.raises(ConfigError, match=message):
        tune(tiny(), Tokenizer(), examples(), dataclasses.replace(RECIPE, **change), out=tmp_path)


@pytest.mark.parametrize("objective", ["kl", "ce"])
def test_gradient_accumulation_gives_one_trajectory(tmp_path, objective):
    """8 x 1 and 2 x 4 (batch x accumulation) end with the same routers, depth loss included."""
    method = {"method": "mindskip", "bias": True, "penalty": 0.5, "layers": "all"}
    base = dataclasses.replace(
        RECIPE, objective=objective, controller="none", method=method, shuffle=False, calibrate=False, epochs=1
    )
    ends = []
    for batch, accumulation in ((8, 1), (2, 4)):
        recipe = dataclasses.replace(base, batch_size=batch, gradient_accumulation=accumulation)
        model = tiny()
        tune(model, Tokenizer(), examples(40), recipe, out=tmp_path / str(batch), budget=0.5)
        ends.append(torch.cat([torch.cat([r.weight, r.bias[None]]) for r in routing_of(model).routers().values()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rows", [5, 300])
def test_kl_and_its_gradient_are_those_of_the_definition(rows):
    teacher, student = torch.randn(rows, 7), torch.randn(rows, 7, requires_grad=True)
    p, q = teacher.softmax(-1), student.softmax(-1)
    wanted = (p * (p / q).log()).sum()
    found = kl_sum(Predictions(teacher), Predictions(student))
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad(3 * loss, student)[0] for loss in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert float(kl_sum(Predictions(teacher), Predictions(teacher))) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("rows", [5, 300])
def test_cross_entropy_and_its_gradient_are_pytorchs(rows, monkeypatch):
    monkeypatch.setattr(vocabulary, "CACHED", 7 * 64)  # 64 rows at a time
    logits, labels = torch.randn(rows, 7, requires_grad=True), torch.randint(0, 7, (rows,))
    labels[::3] = -100
    found, wanted = ce_sum(Predictions(logits), labels), nn.functional.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(3 * loss, logits)[0] for loss in (found, wanted)))


@pytest.mark.parametrize("items", [None, 50])
def test_the_task_loss_is_the_models_own_with_its_depth_loss(items):
    model = attach(tiny(), MindSkipConfig(layers="all", penalty=0.5)).train()
    batch = Collator(0)([Example(e.input_ids[: 9 + 3 * i], 2 + i) for i, e in enumerate(examples(4))])
    loss, _ = ce_loss(model, batch, items)
    loss.backward()
    found = [router.weight.grad.clone() for router in routing_of(model).routers().values()]
    model.zero_grad()
    count = int((batch["labels"][:, 1:] != -100).sum())
    own = model(**batch, num_items_in_batch=torch.tensor(items or count)).loss
    own.backward()
    torch.testing.assert_close(loss, own)
    for gradient, router in zip(found, routing_of(model).routers().values(), strict=True):
        torch.testing.assert_close(gradient, router.weight.grad)
    assert min(float(gradient.abs().max()) for gradient in found) > 0


def test_kl_loss_is_zero_where_everything_executes():
    model = attach(tiny(), MindSkipConfig(layers="all", penalty=0.0)).train()
    loss, _ = kl_loss(model, Collator(0)(examples(4)), None)
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_the_frozen_backbone_drops_nothing(tmp_path, monkeypatch):
    """A teacher and a student that drop different units are apart where everything executes."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128}
    dropped = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **dropped, pad_token_id=0, eos_token_id=1, bos_token_id=None))
    step, losses = RouterTrainer.compute_loss, []

    def everything_executes(self, model, *args, **kwargs):
        for router in routing_of(model).routers().values():
            router.threshold.fill_(float("-inf"))
        loss = step(self, model, *args, **kwargs)
        losses.append(loss.item())
        routers = routing_of(model).routers().values()
        assert all(router.training for router in routers)
        assert model.training
        return loss

    monkeypatch.setattr(RouterTrainer, "compute_loss", everything_executes)
    recipe = dataclasses.replace(LINEAR, controller="none", budgets=(), lora={"rank": 2}, max_steps=3)
    tune(model, Tokenizer(), examples(), recipe, out=tmp_path)
    assert len(losses) == 3
    assert losses[0] == pytest.approx(0, abs=1e-5)


def test_what_cannot_be_tuned_is_said(tmp_path):
    with pytest.raises(TuningError, match="1 example leaves nothing"):
        tune(tiny(), Tokenizer(), examples(1), RECIPE, out=tmp_path)
    paper = dataclasses.replace(RECIPE, init="zeros", method={"method": "mindskip", "layers": (1,)})
    with pytest.raises(BudgetError, match=r"budget 0\.5 cannot be reached"):
        tune(tiny(), Tokenizer(), examples(), paper, out=tmp_path, budget=0.5)
    model = tiny()
    no_bias = dataclasses.replace(RECIPE, method={"method": "mindskip"})
    with pytest.raises(ConfigError, match="routers with a bias"):
        tune(model, Tokenizer(), examples(), no_bias, out=tmp_path, budget=0.9)
    assert not is_attached(model)  # a run that never started leaves the model as it was


@pytest.mark.parametrize("recipe", [RECIPE, LINEAR], ids=["one budget", "several"])
def test_every_step_executes_the_share_that_it_is_to(tmp_path, monkeypatch, recipe):
    """The controller pins it: the loss alone would have everything execute."""
    recipe = dataclasses.replace(recipe, batch_size=8, epochs=4, bias_learning_rate=0.2, joint=1.0)
    keeps, trainers = [], []
    note = RouterTrainer.note_keep
    monkeypatch.setattr(RouterTrainer, "note_keep", lambda self, trace: (trainers.append(self), note(self, trace)))
    tune(tiny(), Tokenizer(), examples(60), recipe, out=tmp_path, budget=0.5)
    controller = next(c for c in trainers[0].callback_handler.callbacks if isinstance(c, QuantileController))
    keeps = trainers[0].keeps
    assert len(keeps) == len(trainers) >= 18
    asked = [controller.keep_at(step) for step in range(len(keeps))]
    drift = [kept - wanted for kept, wanted in zip(keeps[8:], asked[8:], strict=True)]
    assert abs(sum(drift) / len(drift)) < 0.05, (keeps, asked)
