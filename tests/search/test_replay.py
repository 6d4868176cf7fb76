"""Found routes, given to a routed model as decisions, give the recorded answers: what is searched is what will run."""

import pytest
import torch
from search_data import choices, shorts, write_rows

from dynadepth import MindSkipConfig, Site, attach, fixed_routes, hub
from dynadepth.search.questions import load_questions
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
