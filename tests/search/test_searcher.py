"""What the search keeps is what the model does: routes replay, budgets hold, the control is the same search."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from search_data import shorts, write_rows

from dynadepth import hub
from dynadepth.architectures import decoder_layers
from dynadepth.errors import BudgetError, ConfigError, DataError, UnsupportedModelError
from dynadepth.evaluation.tasks import load_tasks, run_tasks
from dynadepth.route_file import RouteWriter
from dynadepth.search import searcher
from dynadepth.search.answers import Reply, replies, with_rivals
from dynadepth.search.layers import LayerRunner
from dynadepth.search.questions import load_questions
from dynadepth.search.searcher import Searcher, SearchSettings, grouped
from dynadepth.search.tree import TreeSettings

DENSE = (1, 1, 1, 1)


@pytest.fixture(scope="module")
def model(model_folder):
    return hub.load_model(model_folder, dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return hub.load_tokenizer(model_folder)


@torch.no_grad()
def plain_log_probs(model, question, counts):
    """Log-probabilities `[T, V]` behind the prompt for each continuation, from a plain forward of moved layers."""
    layers = decoder_layers(model)
    before, number = list(layers), model.config.num_hidden_layers
    del layers[:]
    for layer, count in enumerate(counts):
        layers.extend([before[layer]] * count)
    model.config.num_hidden_layers = len(layers)
    try:
        out = []
        for tokens in question.continuations:
            ids = torch.tensor([question.context + tokens[:-1]])
            out.append(model(input_ids=ids, use_cache=False).logits[0, len(question.context) - 1 :].log_softmax(-1))
        return out
    finally:
        del layers[:]
        layers.extend(before)
        model.config.num_hidden_layers = number


def plain_margins(model, question, counts):
    """Of a short answer: the leads of its right results and of the wrong ones, token by token."""
    (rows,), (tokens,) = plain_log_probs(model, question, counts), question.continuations

    def lead(at, token):
        others = rows[at].clone()
        others[token] = -math.inf
        return float(rows[at][token] - others.max())

    right = [lead(at, tokens[at]) for at in question.results]
    return right, [lead(at, token) for at, token in zip(question.results, question.wrong, strict=False)]


def plain_margin(model, question, counts):
    """Margin of the gold answer by the definition, one continuation after the other."""
    if question.options is None:
        return min(plain_margins(model, question, counts)[0])
    log_probs = plain_log_probs(model, question, counts)
    sums = [
        float(sum(row[token] for row, token in zip(rows, tokens, strict=True)))
        for rows, tokens in zip(log_probs, question.continuations, strict=True)
    ]
    return sums[question.gold] - max(total for option, total in enumerate(sums) if option != question.gold)


@pytest.fixture
def questions(arc, tokenizer, tmp_path):
    files = [arc(7), write_rows(tmp_path / "short.jsonl", shorts(5))]
    return load_questions(files, tokenizer)[0]


def test_found_routes_replay(model, questions):
    settings = SearchSettings(TreeSettings(simulations=40, siblings=5), margin=0.01)
    searcher = Searcher(model, settings)
    found = [prompt for group in grouped(questions) for prompt in searcher.search(group)]
    by_id = {question.id: question for question in questions}
    assert {prompt.id for prompt in found} == set(by_id)
    assert sum(len(prompt.routes) for prompt in found) > 20
    assert any(prompt.dense.correct for prompt in found)
    assert any(not prompt.dense.correct and prompt.routes for prompt in found)
    for prompt in found:
        question = by_id[prompt.id]
        assert prompt.dense.margin == pytest.approx(plain_margin(model, question, DENSE), abs=1e-4)
        assert prompt.dense.correct == (prompt.dense.margin > 0)
        for route in prompt.routes:
            assert route.margin == pytest.approx(plain_margin(model, question, route.counts), abs=1e-4)
            assert route.correct
            assert route.margin >= 0.01
            assert route.layers <= (4 if prompt.dense.correct else 8)
            assert route.counts != DENSE
        assert 4 < prompt.executions < prompt.naive_executions


def test_dense_is_what_the_harness_scores(model, tokenizer, arc, tmp_path):
    """The same prompts, options and decision as `dynadepth eval`."""
    pytest.importorskip("lm_eval")
    from dynadepth.evaluation.lm_eval import DynadepthLM

    path = arc(9)
    wanted = run_tasks(DynadepthLM(model, tokenizer=tokenizer, bars=False), load_tasks(["arc_tiny"], tmp_path), None)
    found = Searcher(model, SearchSettings(TreeSettings(simulations=1))).search(load_questions([path], tokenizer)[0])
    assert sum(prompt.dense.correct for prompt in found) / 9 == pytest.approx(wanted["arc_tiny"].acc)


def test_leads_of_short_answers(model, questions):
    questions = [question for question in questions if question.options is None]
    runner = LayerRunner(model)
    runner.take([question.row for question in questions])
    questions = with_rivals(runner, questions)
    asked = [(number, counts) for number in range(len(questions)) for counts in (DENSE, (1, 0, 2, 1), (2, 1, 1, 0))]
    leads = []
    for (number, counts), reply in zip(asked, replies(runner, questions, asked), strict=True):
        right, wrong = plain_margins(model, questions[number], counts)
        assert reply.margins[0] == pytest.approx(right, abs=1e-4)
        assert reply.margins[1] == pytest.approx(wrong, abs=1e-4)
        assert reply.margin(1) == min(reply.margins[1])
        assert reply.chosen is None
        leads += right + wrong
    assert any(lead > 0.01 for lead in leads)
    assert 0 < reply.reward(0) < 1


def test_a_group_equals_its_questions_one_by_one(model, questions):
    searcher = Searcher(model, SearchSettings(TreeSettings(simulations=30)))
    together = {prompt.id: prompt for prompt in searcher.search(questions)}
    for question in questions:
        (alone,) = searcher.search([question])
        other = together[question.id]
        assert [route.counts for route in alone.routes] == [route.counts for route in other.routes]
        for name in ("executions", "naive_executions", "apart_executions"):
            assert getattr(alone, name) == getattr(other, name)
        assert alone.control == pytest.approx(other.control, abs=1e-4)
        assert [route.counts for route in alone.control_routes] == [route.counts for route in other.control_routes]


def test_an_exhaustive_search_knows_every_route(model, questions):
    """With all of 4 layers' routes tried, what is kept is all there is, best first, as is the control's best margin."""
    tree = TreeSettings(simulations=1000, max_consecutive_skips=4)
    allowed = [c for c in _all(4) if tree.allows(c) and c != DENSE]
    searcher = Searcher(model, SearchSettings(tree, margin=0.0))
    kept = 0
    for question in questions:
        if question.options is None:
            continue
        (found,) = searcher.search([question])
        answers = replies(searcher.runner, [question], [(0, counts) for counts in allowed])
        (dense,) = replies(searcher.runner, [question], [(0, DENSE)])
        most = 4 if found.dense.correct else 8
        short = [(c, a) for c, a in zip(allowed, answers, strict=True) if sum(c) <= most]
        right = {c: a.margin(question.gold) for c, a in short if a.margin(question.gold) > 0}
        assert {route.counts: pytest.approx(route.margin, abs=1e-4) for route in found.routes} == right
        every = {c: a.margin(question.gold) for c, a in zip(allowed, answers, strict=True)}
        assert {route.counts: pytest.approx(route.margin, abs=1e-4) for route in found.tried} == every
        worth = [1 / (1 + math.exp(-route.margin)) - 3.0 * route.layers / 4 for route in found.routes]
        assert worth == sorted(worth, reverse=True)
        kept += len(worth) > 2
        wrong = set(range(len(question.options))) - {question.gold, dense.chosen}
        astray = {route.counts: pytest.approx(route.margin, abs=1e-4) for route in found.control_routes}
        reached = [
            (max(a.margin(w) for _, a in short), {c: a.margin(w) for c, a in short if a.margin(w) > 0}) for w in wrong
        ]
        assert any(found.control == pytest.approx(margin, abs=1e-4) and astray == of for margin, of in reached)
        assert not any(route.correct for route in found.control_routes)
        assert found.naive_executions == 4 + sum(map(sum, allowed))
        assert found.apart_executions == 4 + 2 * sum(map(sum, allowed))
    assert kept, "no question has routes to be put in order"


def _all(n):
    return [(first, *rest) for first in range(3) for rest in _all(n - 1)] if n else [()]


def test_the_control_goes_towards_an_answer_nobody_gave(model, questions):
    settings = SearchSettings(TreeSettings(simulations=20))
    searcher = Searcher(model, settings)
    for question in questions:
        (found,) = searcher.search([question])
        if question.options is None:
            assert (found.control is None) == found.dense.correct
        else:
            assert found.control is not None
            two = replace(question, options=question.options[:2], continuations=question.continuations[:2], gold=0)
            (of_two,) = searcher.search([two])
            assert (of_two.control is None) == (not of_two.dense.correct)


def known(model, question, n):
    """A question of whose results the dense model has the first n right."""
    for at in question.results[:n]:
        tokens = list(question.continuations[0])
        tokens[at] = int(plain_log_probs(model, question, DENSE)[0][at].argmax())
        question = replace(question, continuations=(tuple(tokens),))
    return question


def test_the_control_of_a_short_answer_is_as_far_off(model, questions):
    """Where the dense model is wrong, the token that is nearest to the right one; where it is right, that one."""
    short = [question for question in questions if question.options is None]
    questions = [*short, known(model, short[0], 1), known(model, short[1], 3)]
    runner = LayerRunner(model)
    runner.take([question.row for question in questions])
    held = changed = 0
    for question, found in zip(questions, with_rivals(runner, questions), strict=True):
        (rows,) = plain_log_probs(model, question, DENSE)
        right = tuple(question.continuations[0][at] for at in question.results)
        tops = [int(rows[at].argmax()) for at in question.results]
        if tops == list(right):
            assert question is questions[-1]
            assert found.wrong == ()
            continue
        for at, token, top, rival in zip(question.results, right, tops, found.wrong, strict=True):
            if top == token:
                held += 1
                assert rival == token
                continue
            changed += 1
            others = [other for other in range(len(rows[at])) if other not in (token, top)]
            nearest = min(abs(float(rows[at][other] - rows[at][token])) for other in others)
            assert rival not in (token, top)
            assert abs(float(rows[at][rival] - rows[at][token])) == pytest.approx(nearest, abs=1e-4)
    assert (changed, held) == (3 * 5 + 2, 1)


def test_short_answers(tokenizer, tmp_path):
    (question,), _ = load_questions([write_rows(tmp_path / "gsm.jsonl", shorts(1))], tokenizer)
    assert question.completion == " sky is the and class of it\n#### class"
    words = [tokenizer.decode([question.continuations[0][at]]) for at in question.results]
    assert words == ["the", "class", "class"]
    assert question.options is None
    rows = [{"id": 1, "question": "why ?", "answer": "it is the sky", "final": "sky"}]
    (question,), _ = load_questions([write_rows(tmp_path / "plain.jsonl", rows)], tokenizer)
    assert [tokenizer.decode([question.continuations[0][at]]) for at in question.results] == ["sky"]
    rows = [{"id": n, "context": "the sky is", "continuation": word} for n, word in enumerate(["blue", "on"])]
    first, _ = load_questions([write_rows(tmp_path / "last_word.jsonl", rows)], tokenizer)[0]
    assert (first.completion, first.results, first.wrong) == (" blue", (0,), ())


def test_budgets(model, questions):
    tree = TreeSettings(simulations=60)
    found = Searcher(model, SearchSettings(tree, budget=0.5, margin=0.0)).search(questions)
    assert any(prompt.routes for prompt in found)
    assert all(route.layers <= 2 for prompt in found for route in prompt.tried)
    with pytest.raises(
        BudgetError, match=r"no route can meet the budget 0\.2: .*1 of 4 layers run at least; give 0\.250"
    ):
        Searcher(model, SearchSettings(tree, budget=0.2))
    with pytest.raises(BudgetError, match=r"10 of 30 layers run at least; give 0\.334 or more"):
        SearchSettings(tree, budget=0.333).check(30)
    SearchSettings(tree, budget=0.334).check(30)
    for layers, budget, most in ((50, 0.58, 29), (90, 0.7, 63), (30, 0.999, 29)):
        assert SearchSettings(tree, budget=budget).most_searched(layers) == most
    SearchSettings(TreeSettings(), budget=16 / 49).check(49)
    for budget in (0.0, 2.5):
        with pytest.raises(BudgetError, match="above 0 and at most 2"):
            SearchSettings(budget=budget)
    with pytest.raises(ConfigError, match="margin"):
        SearchSettings(margin=-1.0)


def test_a_route_that_overflows_is_no_route(model, questions, monkeypatch, tmp_path):
    def overflowing(runner, asked_of, asked):
        found = replies(runner, asked_of, asked)
        return [
            Reply((math.nan,) * 3) if route[1] == 0 else reply for (_, route), reply in zip(asked, found, strict=True)
        ]

    monkeypatch.setattr(searcher, "replies", overflowing)
    chosen = [question for question in questions if question.options is not None]
    found = Searcher(model, SearchSettings(TreeSettings(simulations=20), margin=0.0)).search(chosen)
    assert all(route.counts[1] for prompt in found for route in (*prompt.tried, *prompt.routes, *prompt.control_routes))
    assert all(len(prompt.tried) > 5 and (prompt.control is None or math.isfinite(prompt.control)) for prompt in found)
    with RouteWriter(tmp_path / "routes.jsonl") as writer:
        writer.append(found)


def test_a_model_that_overflows_by_itself_is_told_so(model, questions):
    with torch.no_grad():
        broken = copy.deepcopy(model)
        broken.model.layers[2].mlp.down_proj.weight.fill_(torch.inf)
    with pytest.raises(UnsupportedModelError, match="overflows in float32, without any route: give --dtype"):
        LayerRunner(broken).check(questions[0].row)


def test_data_that_cannot_be_searched(tokenizer, tmp_path, arc):
    def refused(rows, match, name="some.jsonl", **options):
        with pytest.raises(DataError, match=match):
            load_questions([write_rows(tmp_path / name, rows)], tokenizer, **options)

    refused([{"id": 1, "query": "why", "choices": ["a", "b"]}], r"no answer at row 1 \(the field 'gold'\)")
    fine = {"id": 1, "query": "why", "choices": ["a", "b"], "gold": 1}
    refused([fine, {**fine, "gold": None}], r"no answer at row 2 \(the field 'gold'\)")
    refused([{"question": "why"}], r"no answer at row 1 \(the field 'answer'\)")
    refused([{"text": "the sky"}], "which no task has")
    public = {"question": "why", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
    for row in (public, {"question": "why", "answer": "42"}, {"context": "a", "question": "b", "answers": ["c"]}):
        refused([row], r"which no task has\. Known: .*choices gold query")  # it has an answer, in another form
    refused([{**fine, "query": None}], "Row 1 of 'some' needs text in the field 'query', not None")
    path = tmp_path / "half.jsonl"
    path.write_text('{"query": "why \\ud83d is", "choices": ["a", "b"], "gold": 0}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"holds half of a character .* at line 1"):
        load_questions([path], tokenizer)
    path.write_text('{"query": "why \\ud83d\\ude00 is", "choices": ["a", "b"], "gold": 0}\n', encoding="utf-8")
    assert "😀" in load_questions([path], tokenizer)[0][0].prompt
    unnamed = [{**fine, "id": None}, {**fine, "id": None, "query": "who"}]
    assert len({q.id for q in load_questions([write_rows(tmp_path / "unnamed.jsonl", unnamed)], tokenizer)[0]}) == 2
    refused([{**fine, "gold": 2}], "no index of its 2 choices")
    refused([fine, fine], "id '1' twice")
    contexts = {"context_options": ["the", "a"], "continuation": "sky", "gold": 0}
    refused([contexts], "options differ in their context")
    refused(
        [{**fine, "query": "the " * 50}],
        r"no prompt to search .*1 of 1 prompts .*longer than the 20 tokens",
        longest=20,
    )
    kept, remarks = load_questions(
        [write_rows(tmp_path / "mixed.jsonl", [fine, {**fine, "id": 2, "query": "the " * 50}])], tokenizer, longest=20
    )
    assert [question.id for question in kept] == ["1"]
    assert "the first is 2, " in remarks[0]
    assert [question.id for question in load_questions([arc(6)], tokenizer, limit=2)[0]] == ["q0", "q1"]


@pytest.mark.parametrize("margin", [-0.1, float("inf"), float("nan")])
def test_margins_are_numbers(margin):
    with pytest.raises(ConfigError, match=f"margin must be a number of nats from 0, not {margin}"):
        SearchSettings(margin=margin)
