"""Tuning from searched routes: what the routers are shown, what they learn, what is reported, what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dynadepth import DrLLMConfig, adapter, attach, fixed_routes, load, recording, routing_of, set_budget
from dynadepth.architectures import decoder_layers
from dynadepth.errors import BudgetError, ConfigError, DataError, TuningError
from dynadepth.route_file import Answer, Header, PromptRoutes, Route, RouteFile, RouteWriter
from dynadepth.tuning.from_routes import tune_from_routes
from dynadepth.tuning.recipe import Recipe, load_recipe
from dynadepth.tuning.route_data import RouteExample, kept, parted, shown
from dynadepth.tuning.route_recipe import RouteRecipe, load_route_recipe
from dynadepth.tuning.route_scores import action_scores, always_execute, commonest
from tuning_runs import fingerprint, tiny

RECIPE = RouteRecipe(
    name="test", source="test", method={"method": "drllm", "hidden": 16, "windows": 2}, learning_rate=0.02,
    warmup_steps=4, batch_size=8, epochs=12, patience=12, validation=0.2, holdout=0.2,
)  # fmt: skip
KINDS = {5: (1, 0, 1, 1), 6: (1, 1, 2, 1), 7: (1, 1, 1, 1)}
"""The route of a prompt, by the token that fills most of it."""


class Tokenizer:
    pad_token_id = 0
    eos_token_id = 1

    def encode(self, text):
        return [int(word) for word in text.split()]


def prompt(number: int, routes=None, **values) -> PromptRoutes:
    kind = (5, 6, 7)[number % 3]
    text = " ".join(str(token) for i in range(6 + number % 5) for token in (kind, 10 + (number * 7 + i) % 40))
    routes = (Route(True, 1.0, KINDS[kind]),) if routes is None else routes
    made = PromptRoutes(
        str(number), "test", text + " ", (" 1", " 2"), 0, " 1", Answer(True, 0.5), routes, None, 4, 4, 4
    )
    return dataclasses.replace(made, **values)


def write(path, model, prompts, **header):
    identity = {**adapter.identity(model, decoder_layers(model)), **header.pop("identity", {})}
    with RouteWriter(path) as writer:
        writer.start(Header(**{"model": identity, "n_layers": 4, "search": {}, "provenance": {}, **header}))
        writer.append(prompts)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("run"), tiny()
    before = fingerprint(model)
    path = write(folder / "routes.jsonl.gz", model, [prompt(n) for n in range(60)])
    result = tune_from_routes(model, Tokenizer(), path, RECIPE, out=folder / "out")
    return model, result, before, folder / "out", path


def test_routers_learn_what_tells_the_prompts_apart(run):
    _, result, *_ = run
    assert result.losses[-1] < 0.5 * result.losses[0]
    assert result.scores.macro_f1 > 0.9
    assert result.scores.macro_f1 > result.commonest.macro_f1
    assert result.always_execute.macro_f1 < 0.4
    assert (result.n_train, result.n_validation, result.n_heldout) == (36, 12, 12)
    assert sum(result.labels.values()) == 36 * 4
    assert result.weights["repeat"] > result.weights["execute"] > 0
    assert result.depth_routed == pytest.approx(result.depth_labelled, abs=0.2)


def test_the_best_epoch_is_kept_and_the_backbone_is_untouched(run):
    model, result, before, out, _ = run
    assert result.validation[result.best_epoch - 1] == max(result.validation)
    assert fingerprint(model) == before
    model, loaded = model.eval(), load(tiny(), out).eval()
    batch = {"input_ids": torch.tensor([[5, 11, 5, 12, 5, 13], [6, 11, 6, 12, 6, 13]])}
    with torch.no_grad(), recording() as record:
        routes = loaded(**batch).past_key_values.routes
        model(**batch)
    assert record.sequences[:2] == record.sequences[2:]
    assert [tuple(route[row] for route in routes.values()) for row in (0, 1)] == [KINDS[5], KINDS[6]]
    assert routing_of(loaded).provenance["result"]["scores"]["macro_f1"] == result.scores.macro_f1
    with pytest.raises(BudgetError, match="no calibration"):
        set_budget(loaded, block=0.75)


def test_routers_of_the_best_epoch_are_those_of_a_run_that_ends_there(run, tmp_path):
    _, result, _, out, path = run
    assert 1 < result.best_epoch < result.epochs, "another seed: nothing was learnt after the best epoch"
    recipe = dataclasses.replace(RECIPE, epochs=result.best_epoch)
    tune_from_routes(tiny(), Tokenizer(), path, recipe, out=tmp_path)
    kept_, last = adapter.read(out)[1], adapter.read(tmp_path)[1]
    assert all(torch.equal(kept_[name], last[name]) for name in last)


def test_one_seed_one_result(run, tmp_path):
    _, result, _, _, path = run
    again = tune_from_routes(tiny(), Tokenizer(), path, RECIPE, out=tmp_path)
    assert (again.losses, again.scores) == (result.losses, result.scores)


def test_the_loss_is_the_recipes(run, tmp_path):
    """What is sure counts less with a larger γ, and nothing else differs while nothing is learnt."""
    *_, path = run
    still = dataclasses.replace(RECIPE, learning_rate=0.0, epochs=1)
    losses = [
        tune_from_routes(tiny(), Tokenizer(), path, dataclasses.replace(still, gamma=g), out=tmp_path / f"{g}").losses[
            0
        ]
        for g in (0.0, 2.0)
    ]
    assert losses[1] < 0.8 * losses[0]


def test_tuning_stops_where_nothing_gets_better(run, tmp_path):
    *_, path = run
    recipe = dataclasses.replace(RECIPE, learning_rate=0.0, patience=2)
    result = tune_from_routes(tiny(), Tokenizer(), path, recipe, out=tmp_path)
    assert (result.epochs, result.best_epoch) == (3, 1)


def test_the_learning_rate_rises_over_the_warm_up_and_stays(tmp_path, monkeypatch):
    """36 examples in batches of 8: 5 steps an epoch. A warm-up longer than half of all steps is cut to that."""
    rates, step = [], torch.optim.AdamW.step

    def noted(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    path = write(tmp_path / "routes.jsonl", tiny(), [prompt(n) for n in range(60)])
    for warmup, last in ((4, 4), (500, 5)):
        rates.clear()
        recipe = dataclasses.replace(RECIPE, epochs=2, warmup_steps=warmup, learning_rate=0.01)
        tune_from_routes(tiny(), Tokenizer(), path, recipe, out=tmp_path / f"{warmup}")
        assert rates == pytest.approx([0.01 * min(1, (n + 1) / last) for n in range(10)])


def test_routers_are_shown_what_they_see_where_the_layers_below_follow_the_route():
    model = attach(tiny(), DrLLMConfig(hidden=4, windows=3))
    examples = [RouteExample(list(range(2, 9)), (2, 0, 1, 1)), RouteExample(list(range(20, 24)), (1, 1, 2, 0))]
    found = shown(model, examples, 0)  # one padded batch
    assert found.shape == (2, 4, 3, 32)
    for row, example in enumerate(examples):
        route = {site: example.counts[site.layer] for site in routing_of(model).sites}
        with torch.no_grad(), fixed_routes(model, route):
            states = model(input_ids=torch.tensor([example.input_ids]), output_hidden_states=True).hidden_states
        size = len(example.input_ids) // 3
        for layer in range(4):
            windows = torch.stack([states[layer][0, w * size : (w + 1) * size].mean(0) for w in range(3)])
            torch.testing.assert_close(found[row, layer], windows, atol=1e-5, rtol=1e-4)


def test_scores_of_actions():
    wanted = torch.tensor([[0, 1, 1, 2], [1, 1, 1, 1]])
    predicted = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    found = action_scores(predicted, wanted)
    assert (found.classes["skip"].precision, found.classes["skip"].recall) == (0.5, 1.0)
    assert (found.classes["repeat"].f1, found.classes["repeat"].support) == (0.0, 1)
    assert found.accuracy == 0.75
    execute = 2 * 5 / (6 + 6)
    assert found.macro_f1 == pytest.approx((2 / 3 + execute + 0) / 3)
    dense = action_scores(always_execute(wanted), wanted)
    assert dense.classes["execute"].recall == 1
    assert dense.macro_f1 == pytest.approx((2 * 6 / (8 + 6)) / 3)
    none = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    told = action_scores(torch.tensor([[0, 1, 2, 1], [1, 1, 1, 1]]), none)
    assert told.macro_f1 == pytest.approx((1 + 2 * 6 / (7 + 6)) / 2), "repeats, which no label has, are no third class"
    assert commonest(torch.tensor([[0, 1], [0, 2], [1, 2]]), torch.zeros(2, 2)).tolist() == [[0, 2], [0, 2]]


def test_which_routes_are_learnt_from():
    right, better, wrong = Route(True, 0.2, (1, 0, 1, 1)), Route(True, 2.0, (0, 1, 1, 1)), Route(False, -1.0, (0,) * 4)
    one = prompt(0, (right, better, wrong), dense=Answer(False, -0.5), control=1.0)
    assert kept(one, 4, RECIPE) == [right.counts]
    assert kept(one, 4, dataclasses.replace(RECIPE, routes_per_prompt=5)) == [right.counts, better.counts]
    assert kept(one, 4, dataclasses.replace(RECIPE, credible=True)) == [better.counts]
    assert kept(one, 4, dataclasses.replace(RECIPE, order="margin")) == [better.counts]
    assert kept(one, 4, dataclasses.replace(RECIPE, margin=0.5, routes_per_prompt=5)) == [better.counts]
    assert kept(one, 4, dataclasses.replace(RECIPE, towards="control")) == []
    astray = dataclasses.replace(one, control_routes=(Route(False, 1.0, (1, 1, 0, 1)), Route(False, 0.1, (1, 1, 1, 0))))
    control = dataclasses.replace(RECIPE, towards="control", routes_per_prompt=5)
    assert kept(astray, 4, control) == [(1, 1, 0, 1), (1, 1, 1, 0)]
    assert kept(astray, 4, dataclasses.replace(control, margin=0.5)) == [(1, 1, 0, 1)]
    weak = prompt(0, (right,))
    assert kept(weak, 4, dataclasses.replace(RECIPE, dense=True, margin=0.5)) == [(1, 1, 1, 1)]
    none = prompt(0, ())
    assert kept(none, 4, RECIPE) == []
    assert kept(none, 4, dataclasses.replace(RECIPE, dense=True)) == [(1, 1, 1, 1)]
    thrice = Route(True, 1.0, (1, 3, 1, 1))
    assert kept(prompt(0, (thrice, right)), 4, RECIPE) == [right.counts], "routers repeat a layer once"


@pytest.mark.parametrize(("validation", "holdout"), [(0.5, 0.4), (0.9, 0.09), (0.1, 0.1), (0.05, 0.9)])
def test_no_part_is_empty(validation, holdout):
    recipe = dataclasses.replace(RECIPE, validation=validation, holdout=holdout)
    for n in range(3, 12):
        parts = parted(RouteFile(Header({}, 4, {}, {}), [prompt(i) for i in range(n)]), recipe, None, 0)
        assert min(map(len, parts)) >= 1
        assert sum(map(len, parts)) == n


def test_a_file_of_another_model_or_depth_or_with_too_little_in_it(tmp_path):
    model = tiny()
    other = write(tmp_path / "other.jsonl", model, [prompt(0)], identity={"fingerprint": "0" * 16})
    deep = write(tmp_path / "deep.jsonl", model, [], n_layers=6)
    few = write(tmp_path / "few.jsonl", model, [prompt(0), prompt(1), *(prompt(n, ()) for n in range(2, 9))])
    for path, error, message in (
        (other, DataError, "fingerprint is '0000"),
        (deep, DataError, "they have 6 layers and the model has 4"),
        (few, TuningError, "2 of 9 prompts have a route to learn from"),
        (tmp_path / "nothing.jsonl", DataError, "no file of routes"),
    ):
        with pytest.raises(error, match=message):
            tune_from_routes(model, Tokenizer(), path, RECIPE, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("most", [1, 2])
def test_fewer_samples_than_parts(tmp_path, most):
    model = tiny()
    path = write(tmp_path / "many.jsonl", model, [prompt(n) for n in range(9)])
    with pytest.raises(TuningError, match=f"--max-samples {most} leaves {most} of 9 prompts .*: give 3 or more"):
        tune_from_routes(model, Tokenizer(), path, RECIPE, out=tmp_path / "out", max_samples=most)


def test_recipes_of_routes():
    paper = load_route_recipe()
    assert (paper.gamma, paper.beta, paper.learning_rate, paper.batch_size, paper.epochs) == (2.0, 0.999, 1e-3, 16, 25)
    assert (paper.warmup_steps, paper.config()) == (500, DrLLMConfig(hidden=128, windows=8))
    with pytest.raises(ConfigError, match="'mindskip' does not learn from routes"):
        dataclasses.replace(paper, method={"method": "mindskip"}).config()
    with pytest.raises(ConfigError, match="learns from searched routes: tune it with --routes"):
        load_recipe("drllm-paper")
    with pytest.raises(ConfigError, match="learns from searched routes"):
        Recipe(name="x", source="test", method={"method": "drllm"}).config()
    for change, message in (
        ({"beta": 1.0}, "beta must be at least 0 and below 1"),
        ({"epochs": 0}, "epochs must be at least 1, not 0"),
        ({"validation": 0.6, "holdout": 0.4}, "leave something to train on"),
        ({"margin": -0.1}, "margin must be zero or more, not -0.1"),
        ({"order": "length"}, "order must be worth or margin, not 'length'"),
        ({"towards": "wrong"}, "towards must be gold or control, not 'wrong'"),
        ({"towards": "control", "dense": True}, "leave credible and dense out"),
    ):
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(paper, **change)


def test_more_examples_than_the_memory_holds(run, monkeypatch):
    model, *_ = run
    examples = [RouteExample([5, 11], (1, 1, 1, 1))] * 3
    size = shown(model, examples, 0).nbytes
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PHYS_PAGES": size, "SC_PAGE_SIZE": 1}[name])
    with pytest.raises(TuningError, match=r"of 3 routes takes .*, enough for 2: give fewer prompts"):
        shown(model, examples, 0)
    assert len(shown(model, examples[:2], 0)) == 2
