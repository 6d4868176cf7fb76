"""Routers or a static route from one file of routes: what is compared, chosen and saved."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from search_data import choices, shorts, write_rows

from commands import invoke
from dynadepth import detach, hub, is_attached, load, routing_of
from dynadepth.errors import DataError, TuningError
from dynadepth.evaluation import evaluate
from dynadepth.records import write_text
from dynadepth.search import choice, search_files
from dynadepth.search.choice import ROUTERS, STATIC, choose_from_routes
from dynadepth.search.searcher import SearchSettings
from dynadepth.search.static import KEPT, StaticRoute
from dynadepth.search.tree import TreeSettings
from dynadepth.tuning.route_data import parted
from dynadepth.tuning.route_recipe import load_route_recipe

RECIPE = replace(
    load_route_recipe(),
    method={"method": "drllm", "hidden": 4, "windows": 2},
    epochs=2,
    warmup_steps=1,
    validation=0.3,
    holdout=0.3,
)


@pytest.fixture(scope="module")
def routes_file(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("routes")
    model, tokenizer = hub.load_model(model_folder), hub.load_tokenizer(model_folder)
    words = [{**row, "choices": row["choices"][0].split() + row["choices"][1:2]} for row in choices(20)]
    files = [write_rows(folder / "arc_tiny.jsonl", words), write_rows(folder / "short.jsonl", shorts(2))]
    settings = SearchSettings(TreeSettings(simulations=12), margin=0.0)
    search_files(model, tokenizer, files, folder / "routes.jsonl", settings)
    return folder / "routes.jsonl"


@pytest.fixture
def opened(model_folder):
    return hub.load_model(model_folder), hub.load_tokenizer(model_folder)


@pytest.fixture
def fixed(monkeypatch):
    """The best static route is this one; which prompts it was chosen by."""
    asked = {}

    def best(model, tokenizer, file, *, among, seed, kept, progress):
        asked.update(among=set(among))
        write_text(kept, "what ran")
        progress("step 1")
        return StaticRoute((1, 2, 0, 1), 0.5, 0.4, len(among), ())

    monkeypatch.setattr(choice, "best_static", best)
    return asked


def test_the_static_route_is_saved_where_routers_are_no_better(opened, routes_file, fixed, tmp_path):
    model, tokenizer = opened
    told = []
    found = choose_from_routes(
        model, tokenizer, routes_file, RECIPE, out=tmp_path / "out", progress=lambda *line: told.append(line[0])
    )
    assert "best static route, step 1" in told
    assert set(found.validation) == set(found.heldout) == {"dense", STATIC, ROUTERS}
    assert found.routers is not None
    assert found.routers.n_trainable > 0
    assert found.chosen == STATIC
    assert routing_of(model).is_static
    assert not (tmp_path / "out" / KEPT).exists(), "what ran is needed no more"
    assert found.validation[STATIC].layers == found.heldout[STATIC].layers == 4.0
    detach(model)
    load(model, tmp_path / "out")
    config, saved = routing_of(model).config, routing_of(model).provenance["result"]["choice"]
    assert (config.name, config.skip, config.repeat) == ("static", (2,), (1,))
    assert saved["chosen"] == STATIC
    assert saved["validation"]["dense"]["difference"] == [0.0, 0.0, 0.0]


def test_figures_are_those_of_eval_on_prompts_that_decided_nothing(opened, routes_file, fixed, tmp_path):
    """`dynadepth eval` on the held-out rows gives the same accuracies."""
    model, tokenizer = opened
    found = choose_from_routes(model, tokenizer, routes_file, RECIPE, out=tmp_path / "out", with_routers=False)
    assert (found.chosen, found.why, found.routers) == (STATIC, "asked for", None)
    file = choice.read(routes_file)
    training, validation, heldout = parted(file, RECIPE, None, 0, learnable=False)
    assert fixed["among"] == {(p.source, p.id) for p in training if p.options is not None}
    names = {(p.source, p.id) for part in (validation, heldout) for p in part}
    assert not names & fixed["among"]
    queries = {p.id: p.prompt.removeprefix("Question: ").removesuffix("\nAnswer:") for p in heldout}
    rows = [
        {"query": queries[p.id], "choices": [option.strip() for option in p.options], "gold": p.gold}
        for p in heldout
        if p.options is not None
    ]
    write_rows(tmp_path / "arc_tiny.jsonl", rows)
    scored = evaluate(model, tokenizer, tasks=["arc_tiny"], task_data=tmp_path, compare_dense=True)
    assert found.n_heldout == len(rows)
    assert scored["tasks"]["arc_tiny"]["acc"] == pytest.approx(found.heldout[STATIC].accuracy)
    assert scored["dense"]["tasks"]["arc_tiny"]["acc"] == pytest.approx(found.heldout["dense"].accuracy)


def test_routers_are_chosen_beyond_the_noise_alone():
    side = object.__new__(choice._Side)
    side.seed, side._right = 0, {"dense": [0.0] * 40, STATIC: [0.0] * 40, ROUTERS: [1.0] * 30 + [0.0] * 10}
    assert side.judged()[0] == ROUTERS
    side._right = {name: right[:19] for name, right in side._right.items()}
    assert side.judged() == (STATIC, "19 validation prompts are too few to tell: it takes 20")
    side._right = {STATIC: [0.0] * 40, ROUTERS: [1.0] + [0.0] * 39}
    chosen, why = side.judged()
    assert chosen == STATIC
    assert why.startswith("routers answer 2.5% of 40 prompts rightly, the static route 0.0%; difference +0.0 to ")


def test_routers_that_are_better_stay(opened, routes_file, fixed, tmp_path, monkeypatch):
    monkeypatch.setattr(choice._Side, "judged", lambda self: (ROUTERS, "better"))
    model, tokenizer = opened
    choose_from_routes(model, tokenizer, routes_file, RECIPE, out=tmp_path / "out")
    detach(model)
    load(model, tmp_path / "out")
    assert routing_of(model).config.name == "drllm"
    assert routing_of(model).provenance["result"]["choice"]["chosen"] == ROUTERS


def test_prompts_without_options_cannot_be_compared(opened, routes_file, tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "questions_of", lambda file, tokenizer: {})
    monkeypatch.setattr(choice, "best_static", lambda *_, **__: pytest.fail("found out late"))
    with pytest.raises(DataError, match="none of the validation prompts is a multiple choice"):
        choose_from_routes(*opened, routes_file, RECIPE, out=tmp_path / "out", with_routers=False)
    assert not is_attached(opened[0])


def test_a_static_route_needs_no_prompt_with_a_kept_route(opened, routes_file, fixed, tmp_path):
    strict = replace(RECIPE, margin=1e9)
    with pytest.raises(TuningError, match="0 of 22 prompts have a route to learn from"):
        choose_from_routes(*opened, routes_file, strict, out=tmp_path / "out")
    found = choose_from_routes(*opened, routes_file, strict, out=tmp_path / "out", with_routers=False)
    assert found.n_train + found.n_validation + found.n_heldout == 20


def test_the_static_route_is_compared_as_it_is_saved(opened, routes_file, fixed, tmp_path):
    """Whatever layers the recipe gives the routers."""
    few = replace(RECIPE, method={**RECIPE.method, "layers": [0]})
    found = choose_from_routes(*opened, routes_file, few, out=tmp_path / "few")
    assert found.validation[STATIC].layers == 4.0
    alone = choose_from_routes(detach(opened[0]), opened[1], routes_file, RECIPE, out=tmp_path / "all")
    assert found.validation[STATIC] == alone.validation[STATIC]


@pytest.mark.parametrize("method", ["static", "auto"])
def test_the_command_says_what_it_chose(model_folder, routes_file, tmp_path, method):
    recipe = "name: small\nsource: test\nmethod: {method: drllm, hidden: 4, windows: 2}\nepochs: 2\n"
    (tmp_path / "small.yaml").write_text(recipe + "validation: 0.3\nholdout: 0.3\n", encoding="utf-8")
    words = ["tune", model_folder, "--routes", routes_file, "--recipe", tmp_path / "small.yaml", "--method", method]
    result = invoke(*words, "--out", tmp_path / "out", "--json", tmp_path / "result.json")
    assert result.exit_code == 0, result.output
    assert "Chosen: static" in result.stdout
    assert ("too few to tell" in result.stdout) is (method == "auto")
    document = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert (document["routers"] is None) is (method == "static")
    shown = invoke("info", tmp_path / "out")
    assert shown.exit_code == 0, shown.output
    assert "chosen" in shown.stdout
    assert f"{document['n_train']} samples" in " ".join(shown.stdout.split())
