"""Routers of tokens start from what skipping each token costs, predicted in closed form."""

import dataclasses

import pytest
import torch

from dynadepth import attach, fixed_routes, routing_of, set_budget
from dynadepth.budget import prompts_to_batches
from dynadepth.errors import ConfigError
from dynadepth.routing.decision import Site
from dynadepth.tuning import Collator, tune
from dynadepth.tuning.heldout import distance
from dynadepth.tuning.surrogate import fit_paths
from dynadepth.tuning.token_routers import fit_token_routers
from tuning_runs import LINEAR, RECIPE, Tokenizer, examples, tiny

TOKENS = dataclasses.replace(LINEAR, method={**LINEAR.method, "granularity": "token"})


def batches(n=40, seed=0):
    return prompts_to_batches([e.input_ids for e in examples(n, seed)], 0)


def costs_by_hand(model, batch, layer, target="attention"):
    """Log of the squared change of the stream behind one skipped sublayer, over the squared stream before its layer."""
    seen = {}
    layers = model.model.layers
    hooks = [
        layers[layer].register_forward_pre_hook(lambda m, args, kwargs: seen.update(before=args[0]), with_kwargs=True),
        layers[layer].post_attention_layernorm.register_forward_pre_hook(lambda m, args: seen.update(behind=args[0])),
    ]
    streams = []
    for execute in (True, False):
        decisions = {site: site.layer != layer or execute for site in routing_of(model).sites}
        with torch.no_grad(), fixed_routes(model, decisions):
            model(**batch)
        streams.append(seen["behind"])
    for hook in hooks:
        hook.remove()
    change = (streams[0] - streams[1]).square().sum(-1)
    return (change / seen["before"].square().sum(-1)).log()


@pytest.mark.parametrize("skip_path", ["identity", "linear"])
def test_what_is_predicted_is_the_cost_of_skipping_a_token(skip_path):
    """The regression is made again from costs measured by skipping, with torch's least squares."""
    recipe = dataclasses.replace(TOKENS, method={**TOKENS.method, "skip_path": skip_path})
    model = attach(tiny(), recipe.config()).eval()
    if skip_path == "linear":
        fit_paths(model, batches())
    explained = fit_token_routers(model, batches())
    assert set(explained) == {Site(layer, "attention") for layer in range(4)}
    states, costs = [], []
    for batch in batches():
        mask, kept = batch["attention_mask"].bool(), {}
        hook = model.model.layers[2].self_attn.register_forward_pre_hook(
            lambda m, args, kwargs, kept=kept: kept.update(x=kwargs["hidden_states"]), with_kwargs=True
        )
        costs.append(costs_by_hand(model, batch, 2)[mask])
        hook.remove()
        states.append(kept["x"][mask])
    states, costs = torch.cat(states).double(), torch.cat(costs).double()
    centred = states - states.mean(0)
    spread = centred.T @ centred / len(states)
    ridge = 3e-2 * spread.diagonal().mean() * torch.eye(len(spread))
    weights = torch.linalg.solve(spread + ridge, centred.T @ (costs - costs.mean()) / len(states))
    router = routing_of(model).routers()[Site(2, "attention")]
    found = router(states.float()).detach()
    assert torch.allclose(found, (costs.mean() + centred @ weights).float(), atol=2e-3)
    left = (costs - found).square().mean() / costs.var(correction=0)
    assert explained[Site(2, "attention")] == pytest.approx(1 - float(left), abs=1e-3)
    assert explained[Site(2, "attention")] > 0


def test_tuning_by_token_starts_with_tokens_told_apart(tmp_path):
    model = tiny()
    still = dataclasses.replace(TOKENS, learning_rate=0.0, bias_learning_rate=0.0, budgets=(), joint=0.0)
    result = tune(model, Tokenizer(), examples(), still, out=tmp_path, budget=0.5)
    assert all(bool(router.weight.any()) for router in routing_of(model).routers().values())
    assert result.moved == 0.0
    assert result.keep_before.all == pytest.approx(0.5, abs=0.1)  # the first threshold is of these routers already
    assert result.keep_after.all == pytest.approx(0.5, abs=0.04)
    for budget in (0.75, 0.35):
        set_budget(model, attention=budget)
        keep = distance(model, examples()[: result.n_heldout], Collator(0)).keep
        assert keep.all == pytest.approx(budget, abs=0.04)
    assert result.kl_after < result.kl_before


def test_too_few_tokens_are_said():
    model = attach(tiny(), dataclasses.replace(RECIPE.config(), granularity="token"))
    with pytest.raises(ConfigError, match="20 tokens are too few to fit routers of 32 weights: give at least 33"):
        fit_token_routers(model, prompts_to_batches([list(range(2, 22))], 0))
