"""The tree search alone: exact on toy rewards, within its rules, never twice on one route, the same for one seed."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynadepth.errors import ConfigError
from dynadepth.search.tree import RouteTree, TreeSettings, _Node, made, moves_of


def allowed(n_layers, rules):
    """Every route that the rules allow, found by looking at all."""
    routes = itertools.product(range(rules.repeats + 2), repeat=n_layers)

    def fine(route):
        runs = [len(list(group)) for zero, group in itertools.groupby(route, key=lambda c: c == 0) if zero]
        return max(runs, default=0) <= rules.max_consecutive_skips and 0 < sum(route) <= rules.max_path * n_layers

    return {route for route in routes if fine(route)}


def run(tree, reward):
    rounds = []
    while routes := tree.ask():
        rounds.append(routes)
        tree.tell([reward(route) for route in routes])
    return rounds


rules = st.builds(
    TreeSettings,
    simulations=st.just(10_000),
    max_consecutive_skips=st.integers(0, 3),
    repeats=st.integers(1, 2),
    max_path=st.sampled_from([1.0, 1.5, 2.0]),
    random_prior=st.sampled_from([0.0, 0.1, 1.0]),
    siblings=st.integers(1, 9),
    widening=st.sampled_from([0.5, 3.0]),
)


@settings(deadline=None, max_examples=60)
@given(rules=rules, n_layers=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_with_enough_simulations_the_optimum_of_any_reward_is_found(rules, n_layers, seed):
    def reward(route):  # as good as random: nothing can be inferred from one route about another
        return hash((seed, route)) % 1009 / 1009

    tree = RouteTree(n_layers, rules, seed)
    rounds = run(tree, reward)
    asked = [route for routes in rounds for route in routes]
    assert len(asked) == len(set(asked))
    assert set(asked) == allowed(n_layers, rules) | {(1,) * n_layers}
    assert rounds[0] == [(1,) * n_layers]
    assert max(map(len, rounds)) <= rules.siblings
    assert max(tree.evaluated.values()) == max(map(reward, asked))


@settings(deadline=None, max_examples=40)
@given(rules=rules, n_layers=st.integers(2, 12), simulations=st.integers(1, 60), seed=st.integers(0, 99))
def test_a_short_search_keeps_the_rules(rules, n_layers, simulations, seed):
    limited = TreeSettings(**{**vars(rules), "simulations": simulations})
    tree = RouteTree(n_layers, limited, seed)
    run(tree, lambda route: 1 / (1 + sum(route)))
    assert len(tree.evaluated) <= simulations + 1
    assert all(limited.allows(route) for route in list(tree.evaluated)[1:])
    again = RouteTree(n_layers, limited, seed)
    run(again, lambda route: 1 / (1 + sum(route)))
    assert list(again.evaluated.items()) == list(tree.evaluated.items())


GOOD = {3: 0, 9: 0, 14: 0, 20: 0, 11: 2}


def good_changes(seeds, most_layers=None, **changes):
    """Of 30 layers four hurt and one wants to run twice; every other change costs. How many of the five good changes
    the best route of each search has."""

    def reward(route):
        margin = sum(0.8 if GOOD.get(at) == n else -0.5 for at, n in enumerate(route) if n != 1) - 1.0
        return 1 / (1 + math.exp(-margin))

    found = []
    for seed in range(seeds):
        tree = RouteTree(30, TreeSettings(**changes), seed, most_layers)
        run(tree, reward)
        best = max(tree.evaluated, key=tree.evaluated.get)
        found.append(sum(GOOD.get(at) == n for at, n in enumerate(best)))
    return found


def test_it_finds_more_than_chance(monkeypatch):
    assert sum(n >= 2 for n in good_changes(20)) >= 19
    within = good_changes(20, most_layers=27)
    assert sum(n >= 2 for n in good_changes(20, random_prior=1.0)) <= 8
    monkeypatch.setattr(RouteTree, "_gain", lambda self, move: 0.0)
    assert sum(n >= 2 for n in good_changes(20)) <= 15, "moves that gained come first"
    assert sum(within) > sum(good_changes(20, most_layers=27)) + 5


def test_more_simulations_go_deeper():
    assert max(good_changes(6)) == 2, "about half single changes, half pairs"
    assert sum(n >= 4 for n in good_changes(6, simulations=200)) >= 5
    assert sum(n == 5 for n in good_changes(3, simulations=400)) >= 2
    assert (TreeSettings().siblings, TreeSettings().widening) == (8, 3.0), "files of 50 simulations are gone on from"


@pytest.mark.parametrize("most", [27, 24, 15, 10])
def test_a_budget_is_where_the_search_begins(most):
    """Nothing is spent on routes above it, and what is learnt of moves on the way counts."""
    tree = RouteTree(30, TreeSettings(), 0, most)
    run(tree, lambda route: 1 / (1 + sum(route)))
    dense, *others = tree.evaluated
    assert sum(dense) == 30
    assert all(sum(route) <= most and tree.settings.allows(route) for route in others)
    assert len(others) == 50 or (0 < len(others) < 50 and most == 10), "few routes are as short as ten layers"


@settings(deadline=None, max_examples=30)
@given(rules=rules, n_layers=st.integers(2, 5), share=st.floats(0.2, 2.0), seed=st.integers(0, 10**6))
def test_a_search_within_a_budget_keeps_the_rules(rules, n_layers, share, seed):
    most = max(rules.fewest(n_layers), int(share * n_layers))
    tree = RouteTree(n_layers, rules, seed, most)
    run(tree, lambda route: hash((seed, route)) % 1009 / 1009)
    within = {route for route in allowed(n_layers, rules) if sum(route) <= most}
    found = set(tree.evaluated) - {(1,) * n_layers}
    assert found <= within
    if most >= n_layers:
        assert found | {(1,) * n_layers} == within | {(1,) * n_layers}
    elif rules.max_consecutive_skips:
        assert found


def test_the_formula_of_a_descent():
    """Mean reward, what little is known, and length, each by hand: arXiv 2510.12773's, c 1.8 and λ 3.0."""
    tree = RouteTree(4, TreeSettings())
    root = _Node((1, 1, 1, 1), 0.5, visits=16)

    def child(counts, mean, visits):
        return _Node(counts, mean, root, visits=visits, total=mean * visits)

    assert tree._ucb(child((1, 0, 1, 1), 0.5, 4)) == pytest.approx(0.5 + 1.8 * math.sqrt(math.log(16) / 4) - 3 * 3 / 4)
    usual = tree._ucb(child((1, 0, 1, 1), 0.5, 4))
    assert tree._ucb(child((1, 0, 1, 1), 0.5, 2)) > usual, "less is known"
    assert tree._ucb(child((1, 0, 1, 0), 0.5, 4)) > usual, "shorter"
    assert tree._ucb(child((1, 0, 1, 1), 0.75, 4)) > usual, "better"


def test_moves():
    rules = TreeSettings()
    assert moves_of((1, 1, 1), rules) == [(0, 1), (0, 2), (0, 0), (1, 1), (1, 2), (1, 0), (2, 1), (2, 0)]
    assert moves_of((0, 0, 1), rules) == [(2, 0)]
    assert moves_of((2, 1, 0), rules) == [(1, 1), (1, 0)]
    assert made((1, 1, 1), (0, 2)) == (0, 0, 1)
    assert made((1, 1, 1), (1, 0)) == (1, 2, 1)
    assert [rules.fewest(n) for n in (1, 2, 3, 30, 31)] == [1, 1, 1, 10, 10]
    for n in range(1, 8):
        assert min(map(sum, allowed(n, rules))) == rules.fewest(n)


def test_settings_out_of_range():
    with pytest.raises(ConfigError, match="simulations must be at least 1, not 0"):
        TreeSettings(simulations=0)
    with pytest.raises(ConfigError, match="dense route is the only one"):
        TreeSettings(max_consecutive_skips=0, repeats=0)
    with pytest.raises(ConfigError, match="repeats must be at most 8, not 9"):
        TreeSettings(repeats=9)
