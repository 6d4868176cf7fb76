"""The best static route: which moves are tried, what is taken, and that its figures are those of plain forwards."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from search_data import choices, shorts, write_rows
from test_replay import margin

from dynadepth import MindSkipConfig, Site, attach, fixed_routes, hub
from dynadepth.errors import DataError
from dynadepth.route_file import Answer, Header, PromptRoutes, Route, RouteFile
from dynadepth.search import replay, search_files, static
from dynadepth.search.answers import replies
from dynadepth.search.questions import load_questions
from dynadepth.search.replay import questions_of
from dynadepth.search.searcher import SearchSettings
from dynadepth.search.static import best_static, candidates_of, drawn_gains, moves_in, ranked_moves, static_route
from dynadepth.search.tree import TreeSettings, made, moves_of

DENSE = (1,) * 6


@given(st.lists(st.sampled_from([0, 1, 2, 3]), min_size=1, max_size=12).map(tuple))
def test_moves_lead_from_the_dense_route_to_the_given_one(counts):
    route = (1,) * len(counts)
    for move in moves_in(counts):
        route = made(route, move)
    assert route == counts


def test_one_move_is_one():
    for move in moves_of(DENSE, TreeSettings()):
        assert moves_in(made(DENSE, move)) == [move]


def prompt(number, tried, dense=-1.0, **changes):
    routes = tuple(Route(lead > 0, lead, counts) for counts, lead in tried)
    given = PromptRoutes(str(number), "t", "why", (" a", " of"), 0, " a", Answer(dense > 0, dense), (), None, 9, 9, 9)
    return replace(given, tried=routes, **changes)


def test_moves_are_ranked_by_what_was_drawn_before_anything_was_known():
    skip, pair, again = made(DENSE, (1, 1)), made(DENSE, (2, 2)), made(DENSE, (4, 0))
    both = made(skip, (4, 0))
    prompts = [
        prompt(0, [(skip, 2.0), (pair, -3.0), (both, 9.0), (again, 9.0)]),  # what follows two moves was chosen
        prompt(1, [(skip, -1.0), (again, -0.5)]),
    ]
    assert ranked_moves(prompts) == [(1, 1), (4, 0), (2, 2)]
    assert {move: len(gains) for move, gains in drawn_gains(prompts).items()} == {(1, 1): 2, (2, 2): 1, (4, 0): 1}


@given(st.lists(st.sampled_from([0, 1, 2]), min_size=6, max_size=6).map(tuple), st.randoms())
def test_candidates_are_allowed_and_run_no_more_layers_than_there_are(counts, drawn):
    settings = TreeSettings()
    if not settings.allows(counts) or sum(counts) > 6:
        return
    moves = moves_of(DENSE, settings)
    drawn.shuffle(moves)
    found = candidates_of(counts, moves, settings)
    assert len(set(found)) == len(found)
    for route in found:
        assert settings.allows(route)
        assert sum(route) <= 6
        assert len(moves_in(route)) <= len(moves_in(counts)) + 2
        assert all(was == now for was, now in zip(counts, route, strict=True) if was != 1)  # nothing is taken back


def test_a_step_tries_skips_alone_and_with_repeats():
    found = candidates_of((1,) * 6, [(0, 1), (5, 0), (2, 2), (0, 0)], TreeSettings())
    assert found == [(0, 1, 1, 1, 1, 1), (1, 1, 0, 0, 1, 1), (0, 1, 1, 1, 1, 2), (1, 1, 0, 0, 1, 2), (2, 1, 0, 0, 1, 1)]
    # With room for a layer more, a repeat alone is tried, too; what is skipped already cannot be repeated.
    assert (0, 1, 1, 1, 1, 2) in candidates_of((0, 1, 1, 1, 1, 1), [(5, 0), (0, 0)], TreeSettings())
    assert candidates_of((0, 1, 1, 1, 1, 1), [(0, 0), (0, 1)], TreeSettings()) == []


@pytest.fixture
def toy(monkeypatch):
    return made_toy(monkeypatch)


def made_toy(monkeypatch, seed=0):
    """Every prompt's lead is a sum over layers, and noise; `ran`: how many prompts each route ran on."""
    ran = {}
    worth = {(1, 0): 2.0, (3, 0): -1.0, (4, 2): 1.5, (5, 0): -2.0, (2, 2): 0.5, "else": -0.6}

    def leads(runner, questions, routes, progress=None, journal=None):
        found = {}
        for key in questions:
            for counts in routes[key]:
                value = sum(worth.get(pair, worth["else"] * (pair[1] != 1)) for pair in enumerate(counts))
                found[key, counts] = value - 1.0 + random.Random(f"{seed} {key} {counts}").gauss(0, 0.5)
                ran[counts] = ran.get(counts, 0) + 1
        return found

    monkeypatch.setattr(static, "leads", leads)
    monkeypatch.setattr(static, "LayerRunner", lambda model: None)
    monkeypatch.setattr(static, "questions_of", lambda file, tokenizer: {("t", str(n)): n for n in range(64)})
    singles = [made(DENSE, move) for move in moves_of(DENSE, TreeSettings())]
    prompts = [prompt(n, list(zip(singles, leads(None, [n], {n: singles}).values(), strict=True))) for n in range(64)]
    ran.clear()
    header = Header({}, 6, SearchSettings().to_dict(), {})
    return RouteFile(header, prompts), ran, worth


def test_the_best_route_of_a_toy_reward_is_found(toy, monkeypatch):
    file, ran, _ = toy
    monkeypatch.setattr(static, "SKIPS", 20)
    monkeypatch.setattr(static, "REPEATS", 20)
    found = best_static(None, None, file)
    # Layer 1 skipped for 4 repeated, then 3 skipped for 2 would lose: (2, 2) gains 0.5 and (3, 0) loses 1.
    assert found.counts == (1, 0, 1, 1, 2, 1)
    assert found.n_prompts == 64
    assert found.accuracy > 0.9 > 0.2 > found.dense
    assert [sum(step.counts) for step in found.steps] == [6]
    assert all(step.gain > step.error > 0 for step in found.steps)
    assert ran[found.counts] == 64  # each pair once
    assert sorted(set(ran.values()))[0] < 16  # most candidates fall out early
    assert best_static(None, None, file, among={("t", "3"), ("t", "4"), ("t", "9")}).n_prompts == 3
    with pytest.raises(DataError, match="two or more, and 1 of the file's 64 prompts are to be used"):
        best_static(None, None, file, among={("t", "3")})


def test_nothing_that_does_not_gain_is_taken(toy):
    file, _, worth = toy
    for pair in worth:
        worth[pair] = -0.3
    found = best_static(None, None, file)
    assert (found.counts, found.steps) == (DENSE, ())
    assert found.accuracy == found.dense


def test_the_best_of_many_that_are_all_alike_is_not_taken(monkeypatch):
    """Noise alone: what was chosen for its gain is judged by other prompts, and passes one time in twenty or so."""
    taken = 0
    for seed in range(40):
        file, _, worth = made_toy(monkeypatch, seed)
        worth.clear()
        worth["else"] = 0.0
        taken += bool(best_static(None, None, file).steps)
    assert taken <= 5


@pytest.fixture
def searched(model_folder, tmp_path):
    """Model, tokenizer and a file of searched routes."""
    model, tokenizer = hub.load_model(model_folder, dtype="float32"), hub.load_tokenizer(model_folder)
    file = write_rows(tmp_path / "arc.jsonl", choices(40))
    settings = SearchSettings(TreeSettings(simulations=12), margin=0.0)
    return model, tokenizer, search_files(model, tokenizer, [file], tmp_path / "routes.jsonl", settings).file


class TestInterrupted:
    def counted(self, monkeypatch, most=None):
        """The groups that run from now on; the one after `most` is interrupted."""
        ran = []

        def run(runner, group, asked):
            if len(ran) == most:
                raise KeyboardInterrupt
            ran.append(len(asked))
            return replies(runner, group, asked)

        monkeypatch.setattr(replay, "replies", run)
        return ran

    def test_it_goes_on_where_it_was(self, searched, tmp_path, monkeypatch):
        kept = tmp_path / "kept" / "ran.jsonl"
        whole = self.counted(monkeypatch)
        expected = best_static(*searched)
        assert len(whole) > 6
        self.counted(monkeypatch, most=5)
        with pytest.raises(KeyboardInterrupt):
            best_static(*searched, kept=kept)
        with kept.open("a") as file:
            file.write('[["arc", "7", [1, 1,')  # killed while writing
        rest = self.counted(monkeypatch)
        assert best_static(*searched, kept=kept) == expected
        assert rest == whole[5:]
        assert self.counted(monkeypatch) == []
        assert best_static(*searched, kept=kept) == expected

    @pytest.mark.parametrize("what", ["seed", "file", "text", "among"])
    def test_what_depends_on_other_settings_is_run_again(self, searched, tmp_path, monkeypatch, what):
        model, tokenizer, file = searched
        kept = tmp_path / "ran.jsonl"
        best_static(model, tokenizer, file, kept=kept)
        names = {(prompt.source, prompt.id) for prompt in file.prompts[:30]}
        other = replace(file, header=replace(file.header, model={**file.header.model, "fingerprint": "another"}))
        first, *others = file.prompts
        reworded = replace(file, prompts=[replace(first, prompt=f"{first.prompt} the"), *others])
        given = {"file": other, "text": reworded}.get(what, file)
        changed = {"seed": {"seed": 1}, "among": {"among": names}}.get(what, {})
        expected = self.counted(monkeypatch)
        best_static(model, tokenizer, given, **changed)
        ran = self.counted(monkeypatch)
        best_static(model, tokenizer, given, kept=kept, **changed)
        assert ran == expected


def test_figures_are_those_of_plain_forwards(model_folder, tmp_path, monkeypatch):
    model, tokenizer = hub.load_model(model_folder, dtype="float32"), hub.load_tokenizer(model_folder)
    words = [{**row, "choices": row["choices"][0].split() + row["choices"][1:2]} for row in choices(14)]
    files = [write_rows(tmp_path / "arc.jsonl", words), write_rows(tmp_path / "short.jsonl", shorts(2))]
    settings = SearchSettings(TreeSettings(simulations=25), margin=0.0)
    file = search_files(model, tokenizer, files, tmp_path / "routes.jsonl", settings).file
    told = []
    monkeypatch.setattr(static, "standard_error", lambda gains: -9.0)  # takes every step
    found = best_static(model, tokenizer, file, progress=told.append)
    questions = questions_of(file, tokenizer)
    read = {(question.source, question.id): question for question in load_questions(files[:1], tokenizer)[0]}
    assert questions == read
    assert found.n_prompts == 14
    assert told[0].startswith("step 1: ")
    attach(model, MindSkipConfig(target="block", layers=(0, 1, 2, 3)))

    def measured(counts):
        with fixed_routes(model, {Site(layer, "block"): count for layer, count in enumerate(counts)}):
            return sum(margin(model, question) > 0 for question in questions.values()) / 14

    assert len(found.steps) > 1
    assert (found.accuracy, found.dense) == (measured(found.counts), measured((1,) * 4))
    assert found.counts == found.steps[-1].counts
    config = static_route(found.counts)
    assert [2 if n in config.repeat else n not in config.skip for n in range(4)] == list(found.counts)
    shorts_only = replace(file, prompts=[replace(p, options=None, gold=None) for p in file.prompts])
    with pytest.raises(DataError, match="two or more, and 0 of the file's 16 prompts"):
        best_static(model, tokenizer, shorts_only)
