"""Importance by removal: damages are KL to the dense model, and the greedy order is the one that slow search finds."""

import pytest
import torch

from dynadepth import Site, fixed_routes, routing_of
from dynadepth.architectures import decoder_layers
from dynadepth.removal import Damage, GreedySearch, alone, greedy
from small import bare, ragged, routed


@pytest.fixture(params=["llama-identity", "llama-linear", "gemma3-linear"])
def damage(request):
    family, path = request.param.split("-")
    return Damage(routed(family, skip_path=path, skip_rank=3), [ragged([9, 5, 7]), ragged([6, 6])], stride=1)


def slow(damage, skipped):
    """The same from plain forwards."""
    model = damage.model
    dense, total, tokens = bare("llama" if "Llama" in type(model).__name__ else "gemma3"), 0.0, 0
    for batch in damage.batches:
        with fixed_routes(model, {site: site not in skipped for site in damage.sites}), torch.no_grad():
            found = model(**batch).logits.log_softmax(-1)
        with torch.no_grad():
            wanted = dense(**batch).logits.log_softmax(-1)
        real = batch["attention_mask"].bool()
        total += float((wanted.exp() * (wanted - found)).sum(-1)[real].sum())
        tokens += int(real.sum())
    return total / tokens


def test_damage_is_kl_to_the_dense_model(damage):
    sites = list(damage.sites)
    assert damage.of([]) == pytest.approx(0.0, abs=1e-6)
    for skipped in ([sites[1]], sites[:2], sites):
        assert damage.of(skipped) == pytest.approx(slow(damage, set(skipped)), rel=1e-4)
        assert damage.of(skipped) > 1e-4


def test_alone_and_greedy(damage):
    scores = alone(damage)
    assert scores == {site: damage.of([site]) for site in damage.sites}
    order = greedy(damage, 4, patience=99)
    assert set(order) == set(damage.sites)
    first = next(iter(order))
    assert first == min(scores, key=lambda site: scores[site])
    chosen = []
    for site, total in order.items():
        assert total == pytest.approx(damage.of([*chosen, site]), rel=1e-5, abs=1e-7)
        chosen.append(site)


def test_lazy_search_measures_less_and_stops_at_the_count(damage):
    before = damage.calls
    order = greedy(damage, 2, patience=1)
    assert len(order) == 2
    assert damage.calls - before == 4 + 1


def test_stride_compares_fewer_positions():
    model = routed()
    routing = routing_of(model)
    batch = ragged([8, 8])
    assert len(Damage(model, [batch], stride=4)._dense[0]) == 2 * 2
    assert routing.sites[0] == Site(0, "attention")


def test_layers_below_the_lowest_change_are_not_run_again(damage):
    ran = []
    layers = decoder_layers(damage.model)
    for index, layer in enumerate(layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    sites, batches = list(damage.sites), len(damage.batches)

    def layers_run(skipped):
        ran.clear()
        found = damage.of(skipped)
        layers_ran = sorted(ran)
        assert found == pytest.approx(slow(damage, set(skipped)), rel=1e-4, abs=1e-6)
        return layers_ran

    assert layers_run([sites[2]]) == sorted([2, 3] * batches)
    damage.settle([sites[1], sites[2]])
    assert layers_run([sites[1], sites[2], sites[3]]) == [3] * batches
    assert layers_run([sites[1], sites[3]]) == sorted([2, 3] * batches)
    assert layers_run([sites[1], sites[2]]) == []
    assert all("forward" not in vars(layer) for layer in layers)


def test_a_search_goes_on_from_what_it_has_learnt(damage):
    whole = greedy(damage, 4, patience=1)
    search = GreedySearch()
    search.extend(damage, 1, patience=1)
    again = GreedySearch(dict(search.chosen), dict(search.increase))
    again.extend(damage, 4, patience=1)
    assert list(again.chosen) == list(whole)
    assert again.chosen == pytest.approx(whole)
    known = GreedySearch(increase=alone(damage))
    before = damage.calls
    known.extend(damage, 1)
    assert (list(known.chosen), damage.calls - before) == ([next(iter(whole))], 1)
