"""Routes as people read them: how much those of many inputs differ, and which answers and tokens had more depth."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from dynadepth import Site, attach, hub
from dynadepth.methods import MindSkipConfig
from dynadepth.report.routes import mean_keep, shaded, span_of, told, variety
from dynadepth.report.samples import answers
from dynadepth.routed import routing_of

SITES = [Site(layer, "attention") for layer in range(3)]


def sequences(*routes):
    return [dict(zip(SITES, map(float, route), strict=True)) for route in routes]


def test_variety_of_one_route_and_of_many():
    same = sequences(*["101"] * 5)
    assert variety(same, sticky=True) == {"distinct": 1, "sequences": 5, "entropy": 0.0, "agreement": 1.0}
    many = sequences("101", "101", "011", "000")
    found = variety(many, sticky=True)
    assert (found["distinct"], found["sequences"]) == (3, 4)
    assert found["entropy"] == pytest.approx(0.5 * math.log2(2) + 2 * 0.25 * math.log2(4))
    pairs = [sum(a[site] == b[site] for site in SITES) / 3 for a, b in combinations(many, 2)]
    assert found["agreement"] == pytest.approx(sum(pairs) / len(pairs))


def test_variety_of_tokens_is_their_agreement():
    by_token = sequences((0.5, 1.0, 0.25), (0.5, 0.0, 0.75))
    found = variety(by_token, sticky=False)
    assert (found["distinct"], found["entropy"]) == (None, None)
    assert found["agreement"] == pytest.approx((0.5 + 0.0 + 2 * 0.25 * 0.75) / 3)


@pytest.mark.parametrize("few", [[], sequences("101")])
def test_nothing_agrees_with_itself_alone(few):
    assert variety(few, sticky=True)["agreement"] is None
    assert variety(few, sticky=True)["entropy"] == 0.0


def test_more_depth_than_the_mean_is_marked():
    made = [{"keep_ratio": {"all": share, "routed": 0.5}} for share in (0.5, 0.75)] + [{"keep_ratio": None}]
    mean = mean_keep(made)
    assert mean == 0.625
    assert told(made[0]["keep_ratio"], mean) == ("50% of all, 50% of the routed sites", False)
    assert told(made[1]["keep_ratio"], mean) == ("▲ 75% of all, 50% of the routed sites; its mean: 62%", True)
    assert told(None, mean) == ("", False)
    assert mean_keep(made[2:]) is None
    assert not told(made[0]["keep_ratio"], mean_keep(made[:1]))[1]


def test_shades_span_the_answers_of_a_method():
    made = [{"depth": [["a", 0.2], ["b", 0.2], ["c", 0.9]]}, {"depth": [["d", 1.0], ["e", None]]}, {}]
    span = span_of(made)
    assert span == (0.2, 1.0)
    assert shaded(made[0]["depth"], span) == [("ab", 0), ("c", 4)]
    assert shaded(made[1]["depth"], span) == [("d", 4), ("e", 0)]
    assert shaded([["f", 0.5]], (0.5, 0.5)) == [("f", 0)]


def test_answers_by_token_tell_the_depth_of_each(model_folder):
    model, tokenizer = hub.load_model(model_folder), hub.load_tokenizer(model_folder)
    attach(model, MindSkipConfig(granularity="token", layers="all"))
    generator = torch.Generator().manual_seed(0)
    for router in routing_of(model).routers().values():
        with torch.no_grad():
            router.weight.copy_(torch.randn(router.weight.shape, generator=generator))
    prompts = ["why is the sky blue", "the class"]
    made = answers(model, tokenizer, prompts, max_new_tokens=6)
    for prompt, answer in zip(prompts, made, strict=True):
        assert "".join(piece for piece, _ in answer["depth"]) == answer["text"]
        assert len(answer["depth"]) == len(answer["tokens"])
        read = tokenizer(prompt)["input_ids"]
        ids = torch.tensor([read + answer["tokens"]])
        with torch.no_grad():
            trace = model(input_ids=ids, use_cache=False).depth_trace
        shares = torch.stack([d.execute[0].float() for d in trace.decisions.values()]).mean(0)[len(read) :].tolist()
        found = [share for _, share in answer["depth"]]
        assert found[:-1] == pytest.approx(shares[:-1])
    assert len({share for answer in made for _, share in answer["depth"]}) > 2
    assert made[-1]["depth"][-1][1] is None or made[0]["depth"][-1][1] is None
