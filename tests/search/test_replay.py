"""Found routes, given to a routed model as decisions, give the recorded answers: what is searched is what will run."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from search_data import choices, shorts, write_rows

from dynadepth import MindSkipConfig, Site, attach, fixed_routes, hub
from dynadepth.errors import DataError
from dynadepth.search import replay, search_files
from dynadepth.search.questions import load_questions
from dynadepth.search.replay import best_static, questions_of
from dynadepth.search.searcher import Searcher, SearchSettings
from dynadepth.search.tree import TreeSettings


@torch.no_grad()
def margin(model, question):
    """Of the gold answer, from the model's own forwards, one for each continuation."""
    sums, margins = [], []
    for tokens in question.continuations:
        ids = torch.tensor([question.context + tokens[:-1]])
        logits = model(input_ids=ids, prompt_mask=torch.ones_like(ids, dtype=torch.bool)).logits
        log_probs = logits[0, len(question.context) - 1 :].log_softmax(-1)
        sums.append(sum(float(row[token]) for row, token in zip(log_probs, tokens, strict=True)))
        for at in question.results:
            top = log_probs[at].topk(2)
            other = top.values[1] if top.indices[0] == tokens[at] else top.values[0]
            margins.append(float(log_probs[at][tokens[at]] - other))
    if question.options is None:
        return min(margins)
    return sums[question.gold] - max(total for option, total in enumerate(sums) if option != question.gold)


def test_the_best_static_route_is_right_for_the_most_prompts(model_folder, tmp_path, monkeypatch):
    """Counted by plain forwards, one prompt and route at a time."""
    model, tokenizer = hub.load_model(model_folder, dtype="float32"), hub.load_tokenizer(model_folder)
    words = [{**row, "choices": row["choices"][0].split() + row["choices"][1:2]} for row in choices(14)]
    data, out = write_rows(tmp_path / "arc.jsonl", words), tmp_path / "routes.jsonl"
    monkeypatch.setattr(replay, "CANDIDATES", 30)
    settings = SearchSettings(TreeSettings(simulations=25), margin=0.0)
    file = search_files(model, tokenizer, [data], out, settings).file
    route, accuracy, dense = best_static(model, tokenizer, file)
    questions = questions_of(file, tokenizer)
    read = {(question.source, question.id): question for question in load_questions([data], tokenizer)[0]}
    assert questions == read
    kept = Counter(r.counts for prompt in file.prompts for r in prompt.routes)
    attach(model, MindSkipConfig(target="block", layers=(0, 1, 2, 3)))

    def measured(counts):
        with fixed_routes(model, {Site(layer, "block"): count for layer, count in enumerate(counts)}):
            return sum(margin(model, question) > 0 for question in questions.values()) / 14

    tried = {counts: measured(counts) for counts in [(1,) * 4, *(counts for counts, _ in kept.most_common(30))]}
    assert len(set(tried.values())) > 2
    assert (accuracy, dense) == (max(tried.values()), tried[(1,) * 4])
    assert tried[route] == accuracy
    assert sum(route) == min(sum(counts) for counts, share in tried.items() if share == accuracy)
    shorts_only = replace(file, prompts=[replace(p, options=None, gold=None) for p in file.prompts])
    with pytest.raises(DataError, match="no multiple-choice prompts"):
        best_static(model, tokenizer, shorts_only)


def test_a_routed_model_replays_what_was_found(model_folder, tmp_path):
    model, tokenizer = hub.load_model(model_folder, dtype="float32"), hub.load_tokenizer(model_folder)
    files = [write_rows(tmp_path / "arc.jsonl", choices(5)), write_rows(tmp_path / "short.jsonl", shorts(3))]
    questions, _ = load_questions(files, tokenizer)
    found = Searcher(model, SearchSettings(TreeSettings(simulations=25), margin=0.01)).search(questions)
    attach(model, MindSkipConfig(target="block", layers=(0, 1, 2, 3)))
    actions = set()
    for question, prompt in zip(questions, found, strict=True):
        for route in prompt.routes:
            with fixed_routes(model, {Site(layer, "block"): count for layer, count in enumerate(route.counts)}):
                assert margin(model, question) == pytest.approx(route.margin, abs=1e-4)
            actions |= set(route.counts)
    assert actions == {0, 1, 2}
