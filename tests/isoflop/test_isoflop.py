"""A study: which cells it has, that it resumes cell by cell, and what it says."""

import json
import re
from dataclasses import replace

import pytest

from dynadepth.errors import ConfigError, DataError
from dynadepth.isoflop import IsoflopRecipe, run_isoflop
from dynadepth.isoflop import run as runs
from dynadepth.isoflop.figures import drawings
from dynadepth.isoflop.recipe import Cell, budget_label
from dynadepth.isoflop.run import Teller, read_study
from dynadepth.isoflop.table import headline, lines, markdown, questions
from dynadepth.pretraining import run as pretraining
from dynadepth.pretraining.trainer import PretrainTrainer
from pretraining_runs import DENSE, SHAPE, STEP, write_text

BUDGET = float(20 * STEP)
BASE = {
    name: getattr(DENSE, name)
    for name in ("model", "tokenizer", "sequence_length", "batch_size", "learning_rate", "validation_tokens")
}
MIXTURE = {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1}
STUDY = IsoflopRecipe(
    name="tiny",
    source="test",
    base={**BASE, "evaluations": 1, "checkpoints": 0},
    sizes={"small": {"model": {"num_hidden_layers": 2}}, "large": {}},
    variants={
        "dense": {},
        "mod": {"method": {"method": "mod", "capacity": 0.25, "predictor_width": 4}},
        "noise": {"method": {"method": "mod", "capacity": 0.25, "routing": "stochastic"}},
        "moe": {"model": {**MIXTURE, "output_router_logits": True, "router_aux_loss_coef": 0.01}},
        "mode": {"model": MIXTURE, "method": {"method": "mode-integrated", "no_ops": 2}},
    },
    budgets=(BUDGET,),
    grid=({"variants": ["dense", "mod"]}, {"variants": ["noise", "moe", "mode"], "sizes": ["large"]}),
    repeats={"variants": ["mod"], "seeds": [1]},
    time_rows=2,
    time_repeats=1,
)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    said = []
    found = run_isoflop(STUDY, [write_text(folder)], folder / "out", teller=Teller(said.append))
    return folder, found, said


def test_budgets_have_short_names():
    assert [budget_label(b) for b in (3e12, 1.25e13, 7e9)] == ["3e12", "1.25e13", "7e9"]


def test_every_part_of_the_grid_and_the_repeats_are_trained(study):
    _, found, said = study
    grid = [(c.size, c.variant) for c in STUDY.cells()]
    small, large = [("small", "dense"), ("small", "mod")], [("large", v) for v in STUDY.variants]
    assert grid == small + large
    again = [cell for cell in found if cell.seed == 1]
    assert len(found) == 8
    assert len(said) == 8
    (repeat,) = again
    assert repeat.variant == "mod"
    others = [c for c in found if c.variant == "mod" and c.seed == 0]
    assert repeat.size == min(others, key=lambda c: headline(found[c])).size
    assert headline(found[repeat]) != headline(found[replace(repeat, seed=0)])


def test_cells_spend_the_same_flops(study):
    _, found, _ = study
    for cell, document in found.items():
        if cell.variant != "mode":  # how many assignments go to no-ops is learnt
            assert BUDGET - document["plan"]["flops_per_step"] < document["flops"] <= BUDGET
        assert document["settings"]["recipe"]["flops"] == cell.budget
        relative = document["plan"]["forward_per_token"] / document["plan"]["dense_forward_per_token"]
        assert (relative == 1) == (cell.variant in ("dense", "moe"))
        timing = document["timing"]
        assert timing["prefill against own"]["times"] > 0
        assert timing["reference"] == "large"
        assert (timing["kv share"] == 1) == (cell.variant in ("dense", "moe", "mode"))


def test_a_finished_study_trains_nothing_and_needs_no_text(study, monkeypatch):
    folder, found, _ = study
    monkeypatch.setattr(runs, "train", None)
    assert run_isoflop(STUDY, [], folder / "out") == found
    recipe, again = read_study(folder / "out")
    assert again == found
    assert list(recipe.cells()) == list(STUDY.cells())
    with pytest.raises(DataError, match="holds no corpus: give the text with --data FILE"):
        run_isoflop(STUDY, [], folder / "elsewhere")


def test_other_settings_are_not_mixed_in(study):
    folder, _, _ = study
    other = replace(STUDY, base={**STUDY.base, "learning_rate": 0.5})
    with pytest.raises(ConfigError, match=r"small-dense-s0\.json was made with other settings \(recipe: learning_rate"):
        run_isoflop(other, [], folder / "out")


def test_several_processes_are_refused(study, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="A study runs in one process, not in 2"):
        run_isoflop(STUDY, [], study[0] / "out")


def test_a_damaged_cell_is_said_and_trained_again(study):
    folder, found, _ = study
    cell = next(iter(found))
    path = folder / "out" / "cells" / f"{cell.name}.json"
    kept = path.read_text()
    path.write_text(kept[:100])
    said = []
    again = run_isoflop(STUDY, [], folder / "out", teller=Teller(said.append))
    assert "damaged" in said[0]
    assert "trained again" in said[0]
    assert headline(again[cell]) == headline(found[cell])
    assert json.loads(path.read_text())["valid"] == json.loads(kept)["valid"]


def test_an_interrupted_cell_goes_on_from_its_step(tmp_path, study, monkeypatch):
    import signal

    folder, found, _ = study
    text = folder / "text.txt"
    one = replace(STUDY, grid=({"variants": ["dense"], "sizes": ["small"]},), repeats={})
    cell = Cell(BUDGET, "small", "dense")

    def press(line):
        if "step" in line:
            signal.raise_signal(signal.SIGINT)

    step = PretrainTrainer.training_step
    monkeypatch.setattr(runs, "DETAIL_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        run_isoflop(one, [text], tmp_path / "out", teller=Teller(detail=press))
    assert list((tmp_path / "out" / "work" / cell.name / "checkpoints").glob("checkpoint-*"))
    assert not (tmp_path / "out" / "cells").exists()
    steps = []

    def noted(self, *args, **kwargs):
        steps.append(self.state.global_step)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(PretrainTrainer, "training_step", noted)
    again = run_isoflop(one, [], tmp_path / "out")
    assert steps[0] > 0
    assert headline(again[cell]) == pytest.approx(headline(found[cell]), abs=1e-4)
    assert not (tmp_path / "out" / "work" / cell.name).exists()


def test_a_cell_whose_loss_turns_nan_says_so_and_the_others_go_on(tmp_path, study, monkeypatch):
    folder, _, _ = study
    one = replace(STUDY, grid=({"variants": ["dense"]},), repeats={})
    train = pretraining.train

    def fail(model, corpus, recipe, *args, **kwargs):
        if "small" in recipe.name:
            raise runs.TuningError("The loss became nan at step 3.")
        return train(model, corpus, recipe, *args, **kwargs)

    monkeypatch.setattr(runs, "train", fail)
    found = run_isoflop(one, [folder / "text.txt"], tmp_path / "out")
    assert [document.get("failed") for document in found.values()] == ["The loss became nan at step 3.", None]
    assert len(lines(found, BUDGET)) == 1
    (kept,) = (tmp_path / "out" / "work").iterdir()
    assert "small" in kept.name, "its message may say that the last good model is there"


def test_tables_figures_and_sentences(study):
    _, found, _ = study
    rows = lines(found, BUDGET)
    assert len(rows) == 7
    assert sum("2 seeds" in row[4] for row in rows) == 1
    names = dict(drawings(STUDY, found))
    label = budget_label(BUDGET)
    assert set(names) == {f"loss-parameters-{label}", f"loss-forward-{label}"}
    axes = names[f"loss-forward-{label}"].axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(STUDY.variants)
    said = questions(STUDY, found)
    compared = [re.findall(r"the best (\S+) \(", sentence) for sentence in said[:-1]]
    assert compared == [["mod", "dense"], ["noise", "dense"], ["moe", "dense"], ["mode", "moe"]]
    page = markdown(STUDY, found)
    assert page.count("\n| ") == 9
    assert all(sentence in page for sentence in said)
    assert len(said) == 5
    assert said[-1].startswith("Over 3 routed runs, predictor accuracy is ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgets": (1e3,)}, "1e3-small-dense-s0 cannot be trained: A budget of 1e"),
        ({"budgets": ("much",)}, "budgets must be numbers of FLOPs above 0, not 'much'"),
        ({"sizes": {}}, "has no sizes"),
        ({"sizes": {"small": {"vocab_size": 300}}}, "size 'small' cannot have vocab_size: it is the base's, so that"),
        ({"variants": {"dense": {"seed": 3}}}, "variant 'dense' cannot have seed: it is the study's to give"),
        ({"variants": {"dense": {"modle": {}}}}, "unknown setting 'modle'. Did you mean 'model'"),
        ({"grid": ({"variants": ["mud"]},)}, "has no 'mud' among its variants. Did you mean 'mod'"),
        ({"grid": ({"size": ["small"]},)}, "a part of the grid has no 'size'. Did you mean 'sizes'"),
        ({"repeats": {"variants": ["mod"], "seed": [1]}}, "has no 'seed'. Did you mean 'seeds'"),
        ({"reference": "smal"}, "reference names no size: 'smal'. Did you mean 'small'"),
        (
            {"base": {**STUDY.base, "model": {**SHAPE, "hiden": 1}}},
            "has no setting 'hiden'. Did you mean 'hidden_act' or 'hidden_size'",
        ),
        ({"budgets": [1e9, 1e9]}, r"budgets names a number of .* twice: name each once"),
        ({"sizes": {"a/b": {}}}, "'a/b' would be part of a file's name"),
        ({"variants": {"../dense": {}}}, "'../dense' would be part of a file's name"),
        ({"repeats": {"variants": ["mod"], "seeds": [0]}}, r"seeds must be different whole numbers from 1 .*not \[0\]"),
        ({"repeats": {"variants": ["mod"], "seeds": [1, 1]}}, r"seeds must be different .*not \[1, 1\]"),
        ({"repeats": {"variants": ["mod"], "seeds": ["a"]}}, r"repeats needs seeds, .*not \['a'\]"),
        ({"repeats": {"variants": ["mod"]}}, "repeats needs seeds, .*not None"),
        ({"time_repeats": 0}, "time_repeats must be at least 1, not 0"),
    ],
)
def test_bad_recipes_are_named(tmp_path, study, change, message):
    with pytest.raises(ConfigError, match=message):
        run_isoflop(replace(STUDY, **{"grid": (), "repeats": {}, **change}), [study[0] / "text.txt"], tmp_path / "out")
