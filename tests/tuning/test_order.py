"""Orders of sublayers that tuning measures: 1 − cosine, or the damage of each with its skip path in place."""

import dataclasses

import pytest
import torch

from dynadepth import StaticConfig, attach, disabled, fixed_routes, routing_of
from dynadepth.budget import in_order, prompts_to_batches
from dynadepth.errors import ConfigError
from dynadepth.tuning import start, tune
from dynadepth.tuning.start import scores_of
from dynadepth.tuning.surrogate import fit_paths
from tuning_runs import LINEAR, STATIC, Tokenizer, examples, tiny

SHORT = dataclasses.replace(STATIC, order="damage", max_steps=1, path_learning_rate=1e-12)


def damages(model, texts):
    """KL of each site skipped alone, from plain forwards of one text after the other."""
    found = dict.fromkeys(routing_of(model).sites, 0.0)
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([text.input_ids])
            with disabled(model):
                dense = model(ids).logits.log_softmax(-1)
            for site in found:
                with fixed_routes(model, {site: False}):
                    routed = model(ids).logits.log_softmax(-1)
                found[site] += float((dense.exp() * (dense - routed)).sum())
    return found


def test_damage_is_measured_behind_the_fitted_paths(tmp_path, monkeypatch):
    monkeypatch.setattr(start, "DAMAGE_STRIDE", 1)
    made, texts = tiny(), examples(n=60)
    tune(made, Tokenizer(), texts, SHORT, out=tmp_path, budget=0.5)
    order = routing_of(made).config.order
    model = attach(tiny().eval(), StaticConfig(layers="all", skip_path="linear", skip_rank=4))
    heldout, training = texts[:24], texts[24:]
    fit_paths(model, prompts_to_batches([e.input_ids for e in training], 0))
    assert order == in_order(damages(model, heldout))
    assert order != in_order(scores_of(tiny(), texts, 0, "attention")), "the test must be able to fail"


def test_routers_start_from_it(tmp_path):
    recipe = dataclasses.replace(LINEAR, order="damage", max_steps=1, learning_rate=1e-12, bias_learning_rate=1e-12)
    static, routers = tiny(), tiny()
    tune(static, Tokenizer(), examples(), SHORT, out=tmp_path / "static", budget=0.5)
    tune(routers, Tokenizer(), examples(), recipe, out=tmp_path / "routers", budget=0.5)
    biases = {site: float(router.bias.detach()) for site, router in routing_of(routers).routers().items()}
    assert in_order(biases) == routing_of(static).config.order


def test_unknown_and_contradicting_orders():
    with pytest.raises(ConfigError, match="order must be one of cosine, damage, not 'greedy'"):
        dataclasses.replace(STATIC, order="greedy")
    recipe = dataclasses.replace(STATIC, order="damage", init="zeros", method={"method": "static", "order": (1, 2)})
    with pytest.raises(ConfigError, match=r"order: damage measures an order, and method.order \[1, 2\] gives one"):
        recipe.config()
