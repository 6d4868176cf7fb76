"""Orders of sublayers that tuning measures: 1 − cosine, damage with the skip path in place, and both ranks."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynadepth import StaticConfig, attach, disabled, fixed_routes, load, routing_of
from dynadepth.budget import in_order, joined, prompts_to_batches
from dynadepth.errors import ConfigError
from dynadepth.routing.decision import Site
from dynadepth.tuning import orders, tune
from dynadepth.tuning.orders import by_rank, one_after_the_other, scores_of
from dynadepth.tuning.surrogate import fit_paths
from tuning_runs import LINEAR, STATIC, Tokenizer, examples, tiny

SHORT = dataclasses.replace(STATIC, order="damage", max_steps=1, path_learning_rate=1e-12)
HELD = 24
"""Of 60 examples, by the recipe."""


@pytest.fixture(autouse=True)
def every_token(monkeypatch):
    """Damage is of every token that is held out, and there are more that are not."""
    monkeypatch.setattr(orders, "DAMAGE_STRIDE", 1)
    monkeypatch.setattr(orders, "DAMAGE_WINDOWS", 16)


def fitted(texts):
    model = attach(tiny().eval(), StaticConfig(layers="all", skip_path="linear", skip_rank=4))
    fit_paths(model, prompts_to_batches([e.input_ids for e in texts[HELD:]], 0))
    return model


def lost(model, texts, skipped):
    """KL of a route in nats a token, from plain forwards of one long held-out window after the other."""
    return lost_on(model, joined((e.input_ids for e in texts[:HELD]), 128, orders.DAMAGE_WINDOWS), skipped)


def lost_on(model, windows, skipped):
    total, tokens = 0.0, 0
    with torch.no_grad():
        for ids in windows:
            with disabled(model):
                dense = model(torch.tensor([ids])).logits.log_softmax(-1)
            with fixed_routes(model, {site: site.layer not in skipped for site in routing_of(model).sites}):
                routed = model(torch.tensor([ids])).logits.log_softmax(-1)
            total += float((dense.exp() * (dense - routed)).sum())
            tokens += len(ids)
    return total / tokens


def test_damage_is_measured_behind_the_fitted_paths(tmp_path):
    made, texts = tiny(), examples(n=60)
    tune(made, Tokenizer(), texts, SHORT, out=tmp_path, budget=0.5)
    order = routing_of(made).config.order
    model = fitted(texts)
    assert order == in_order({Site(i, "attention"): lost(model, texts, {i}) for i in range(4)})
    assert order != in_order(scores_of(tiny(), texts, 0, "attention")), "the test must be able to fail"


@pytest.mark.parametrize("seed", range(4))
def test_ranks_are_the_sum_of_both(tmp_path, seed):
    """Of equal sums the less harmful one goes first; the saved route skips by it."""
    made, texts = tiny(), examples(n=60, seed=seed)
    result = tune(made, Tokenizer(), texts, dataclasses.replace(SHORT, order="ranks"), out=tmp_path, budget=0.5)
    model = fitted(texts)
    cosine = scores_of(tiny().eval(), texts, 0, "attention")
    damage = {site: lost(model, texts, {site.layer}) for site in cosine}
    first, second = ({site: i for i, site in enumerate(sorted(s, key=s.get))} for s in (cosine, damage))
    wanted = sorted(cosine, key=lambda site: (first[site] + second[site], second[site]))
    assert result.order == [site.layer for site in wanted]
    assert routing_of(load(tiny(), tmp_path)).config.order == tuple(result.order)


def test_greedy_is_the_least_harmful_beside_those_before(tmp_path):
    """The first half by plain forwards; the others follow."""
    made, texts = tiny(), examples(n=60, seed=2)
    tune(made, Tokenizer(), texts, dataclasses.replace(SHORT, order="greedy"), out=tmp_path, budget=0.5)
    order, model = routing_of(made).config.order, fitted(texts)
    first = min(range(4), key=lambda layer: lost(model, texts, {layer}))
    second = min({0, 1, 2, 3} - {first}, key=lambda layer: lost(model, texts, {first, layer}))
    assert order[:2] == (first, second)
    assert sorted(order) == [0, 1, 2, 3]
    assert set(routing_of(load(tiny(), tmp_path)).config.skip) == {first, second}


def test_the_second_is_the_least_harmful_beside_the_first():
    """Not the one that is second alone; the others follow by what they last added."""
    a, b, c, d = sites = [Site(layer, "attention") for layer in range(4)]
    together = {frozenset({a}): 1.0, frozenset({a, b}): 10.0, frozenset({a, c}): 4.0, frozenset({a, d}): 20.0}

    class Known:
        def __init__(self):
            self.sites = sites

        def settle(self, skipped):
            pass

        def of(self, skipped):
            return together[frozenset(skipped)]

    scores = one_after_the_other(Known(), {a: 1.0, b: 2.0, c: 3.0, d: 9.0})
    assert in_order(scores) == (0, 2, 1, 3)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12))
def test_what_both_orders_agree_on_the_ranks_keep(scores):
    sites = [Site(i, "attention") for i in range(len(scores))]
    cosine, harm = ({site: pair[k] for site, pair in zip(sites, scores, strict=True)} for k in (0, 1))
    ranks = by_rank(cosine, harm)
    assert len(set(ranks.values())) == len(sites), "no two are equal"
    for a in sites:
        for b in sites:
            if cosine[a] < cosine[b] and harm[a] < harm[b]:
                assert ranks[a] < ranks[b]


def test_routers_start_from_it(tmp_path):
    recipe = dataclasses.replace(LINEAR, order="damage", max_steps=1, learning_rate=1e-12, bias_learning_rate=1e-12)
    static, routers = tiny(), tiny()
    tune(static, Tokenizer(), examples(), SHORT, out=tmp_path / "static", budget=0.5)
    tune(routers, Tokenizer(), examples(), recipe, out=tmp_path / "routers", budget=0.5)
    biases = {site: float(router.bias.detach()) for site, router in routing_of(routers).routers().items()}
    assert in_order(biases) == routing_of(static).config.order


class Reader(Tokenizer):
    """Reads a text as one token a character."""

    def __call__(self, text, verbose):
        return {"input_ids": [2 + ord(letter) % 60 for letter in text]}


@pytest.mark.parametrize("losses", [(1.0, 2.0), (2.0, 1.0), (1.0, 0.95)])
def test_auto_is_damage_where_it_clearly_loses_less(tmp_path, monkeypatch, losses):
    asked = []

    def compared(model, scores, texts, progress):
        asked.extend([*scores, texts])
        return losses

    monkeypatch.setattr(orders, "compared", compared)
    recipe = dataclasses.replace(SHORT, order="auto")
    result = tune(tiny(), Reader(), examples(n=60), recipe, out=tmp_path, budget=0.5)
    cosine, damage, texts = asked
    assert cosine == pytest.approx(scores_of(tiny().eval(), examples(n=60), 0, "attention"))
    assert in_order(cosine) != in_order(damage), "the test must be able to fail"
    assert tuple(result.order) == in_order(damage if losses == (2.0, 1.0) else cosine)
    assert [len(text) for text in texts] == [128] * orders.LONG_TEXTS, "as much as the model reads"


def test_orders_are_compared_by_what_they_skip_together():
    model, texts = fitted(examples(n=60)), [list(range(2, 62)), list(range(40, 10, -1))]
    ranked = ([2, 0, 1, 3], [1, 3, 0, 2])
    scores = [{Site(layer, "attention"): float(rank) for rank, layer in enumerate(order)} for order in ranked]

    def both(*layers):
        return (lost_on(model, texts, set(layers[:1])) + lost_on(model, texts, set(layers))) / 2

    told = []
    found = orders.compared(model, scores, texts, lambda *progress: told.append(progress))
    assert found == pytest.approx([both(2, 0), both(1, 3)], rel=1e-4)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_where_tokens_decide_auto_is_one_minus_cosine(tmp_path):
    recipe = dataclasses.replace(LINEAR, order="auto", max_steps=1, method={**LINEAR.method, "granularity": "token"})
    result = tune(tiny(), Tokenizer(), examples(n=60), recipe, out=tmp_path, budget=0.5)  # which reads no texts
    assert tuple(result.order) == in_order(scores_of(tiny().eval(), examples(n=60), 0, "attention"))


def test_in_doubt_the_order_is_measured_too():
    doubtful = LINEAR.in_doubt()
    assert (LINEAR.order, LINEAR.choose) == ("cosine", False)
    assert (doubtful.order, doubtful.choose) == ("auto", True)
    named = dataclasses.replace(LINEAR, order="ranks").in_doubt()
    assert (named.order, named.choose) == ("ranks", True), "what a recipe names stays"


def test_unknown_and_contradicting_orders():
    with pytest.raises(ConfigError, match="order must be one of cosine, damage, greedy, ranks, auto, not 'best'"):
        dataclasses.replace(STATIC, order="best")
    recipe = dataclasses.replace(STATIC, order="damage", init="zeros", method={"method": "static", "order": (1, 2)})
    with pytest.raises(ConfigError, match=r"order: damage measures an order, and method.order \[1, 2\] gives one"):
        recipe.config()
