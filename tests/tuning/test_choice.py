"""Routers or a static route: whichever is better on held-out examples, at the same keep ratio."""

import dataclasses
from functools import partial

import pytest
import torch

from dynadepth import StaticConfig, attach, detach, fixed_routes, load, recording, routing_of, set_budget
from dynadepth.budget import calibrate, importance, prompts_to_batches
from dynadepth.cost import flops_share
from dynadepth.errors import ConfigError
from dynadepth.methods import MindSkipConfig
from dynadepth.routing.decision import KeepRatio
from dynadepth.tuning import Collator, Example, Recipe, choice, tune
from dynadepth.tuning.choice import choose, settle
from dynadepth.tuning.heldout import Distance, distance, distances
from dynadepth.tuning.trainer import RouterTrainer
from tuning_runs import LINEAR, Tokenizer, examples, fingerprint, tiny

HALF = 16
"""Dimensions of the residual stream that each kind of prompt uses."""
KINDS = Recipe(
    name="kinds",
    source="test",
    method={"method": "mindskip", "bias": True, "penalty": 0.0, "layers": [1, 2]},
    init="importance",
    controller="quantile",
    learning_rate=0.05,
    bias_learning_rate=0.02,
    batch_size=8,
    epochs=6,
    holdout=0.4,
    choose=True,
)


def two_kinds():
    """A model in which layer 1's attention does nothing for ids from 32 on, and layer 2's nothing for those below.

    Each kind of id lives in its own half of the dimensions, and either attention reads and writes one half alone; the
    first dimension of each half says which kind it is. Nothing else of the model adds to the stream.
    """
    model = tiny(num_key_value_heads=4)
    with torch.no_grad():
        embeddings = model.model.embed_tokens.weight
        embeddings.mul_(3)
        embeddings[:32, HALF:], embeddings[32:, :HALF] = 0, 0
        embeddings[:32, 0], embeddings[32:, HALF] = 1, 1
        for number, layer in enumerate(model.model.layers):
            layer.mlp.down_proj.weight.zero_()
            read, write = layer.self_attn.v_proj.weight, layer.self_attn.o_proj.weight
            other = slice(HALF, None) if number == 1 else slice(0, HALF)
            read[:, other], write[other], write[[0, HALF]] = 0, 0, 0
            write.mul_(8 if number in (1, 2) else 0)
    return model.eval()


def of_both_kinds(n=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(n):
        length = int(torch.randint(8, 24, (1,), generator=generator))
        low = 2 if number % 2 else 32
        made.append(Example(torch.randint(low, low + 30, (length,), generator=generator).tolist(), length // 2))
    return made


def knowing(model, right=True):
    """Routers that tell the kinds apart and let the attention run that counts for each, or the other one."""
    attach(model, MindSkipConfig(layers=(1, 2)))
    for site, router in routing_of(model).routers().items():
        with torch.no_grad():
            router.weight[0] = 1.0 if (site.layer == 1) == right else -1.0
            router.weight[HALF] = -router.weight[0]
    return model


def compared(model, held, budgets=(0.75,)):
    prompts = [e.input_ids[: e.prompt_length] for e in held]
    calibrate(model, prompts_to_batches(prompts, 0), (0.25, 0.5, 0.75))
    scores = importance(model, prompts_to_batches([e.input_ids for e in held], 0), "attention")
    return choose(model, held, Collator(0), budgets, {s: scores[s] for s in routing_of(model).sites})


def test_routers_are_chosen_where_no_static_route_can_be_right():
    held = of_both_kinds(20)
    found = compared(knowing(two_kinds()), held)
    assert found.chosen == "routers"
    assert found.kl_routers == pytest.approx(0, abs=1e-5)
    assert found.kl_static > 0.05
    assert found.interval[1] < 0
    assert found.why == f"KL 0.0000 against {found.kl_static:.4f} of the static route, 1 budget, 20 held-out texts"


def test_a_static_route_is_chosen_over_routers_that_are_wrong():
    held = of_both_kinds(20)
    found = compared(knowing(two_kinds(), right=False), held)
    assert found.chosen == "static"
    assert found.kl_static < found.kl_routers
    assert found.interval[0] > 0
    assert found.why.startswith(f"KL {found.kl_static:.4f} against {found.kl_routers:.4f} of the routers, 1 budget")


def test_a_tie_goes_to_the_static_route():
    model = attach(tiny(), MindSkipConfig(layers="all", bias=True))
    held = examples(12)
    scores = importance(model, prompts_to_batches([e.input_ids for e in held], 0), "attention")
    for site, router in routing_of(model).routers().items():
        router.bias.data.fill_(1e3 * scores[site])
    found = compared(model, held, (0.75, 0.5))
    assert found.kl_routers == found.kl_static > 0
    assert (found.chosen, found.interval) == ("static", (0.0, 0.0))
    assert [row["keep"] for row in found.by_budget] == [0.75, 0.5]
    assert "2 budgets, 12 held-out texts" in found.why


@pytest.mark.parametrize(
    ("routers", "static", "chosen", "noise"),
    [
        ([0.2] * 8, [0.3] * 8, "routers", False),
        ([0.2] * 7 + [0.9], [0.3] * 8, "static", True),  # mean 0.2875: one text that is worse, seven that are better
        ([0.3] * 8, [0.2] * 8, "static", False),
        ([0.2], [0.3], "static", True),  # of one text nobody knows the spread
    ],
)
def test_routers_are_chosen_where_they_are_better_beyond_the_noise(monkeypatch, routers, static, chosen, noise):
    keep, n = KeepRatio(0.5, 0.5), len(routers)
    found = [[Distance(keep, tuple(100 * kl for kl in kls), 100 * n, 0.5)] for kls in (routers, static)]
    monkeypatch.setattr(choice, "distances", lambda *_: found.pop(0))
    model = attach(tiny(), MindSkipConfig(layers="all"))
    made = choose(model, examples(n), Collator(0), [0.5], dict.fromkeys(routing_of(model).sites, 0.0))
    assert made.chosen == chosen
    assert made.kl_routers == pytest.approx(sum(routers) / n)
    assert made.kl_static == pytest.approx(sum(static) / n)
    assert ("within the noise" in made.why) == noise


def test_both_have_the_same_keep_ratio():
    """What the routers executed lies between two whole counts: the static figure is the mean of those two."""
    held = of_both_kinds(20)
    model = knowing(two_kinds())
    for router in routing_of(model).routers().values():
        router.weight.data[1:HALF] = torch.randn(HALF - 1, generator=torch.Generator().manual_seed(1)) / 2
    found = compared(model, held, (0.6,))
    (row,) = found.by_budget
    assert row["keep"] not in (0.5, 0.75)
    skipped = 4 * (1 - row["keep"])
    low = int(skipped)
    routes = [
        partial(fixed_routes, model, {s: s.layer not in found.order[:count] for s in routing_of(model).sites})
        for count in (low, low + 1)
    ]
    few, many = (each.mean for each in distances(model, held, Collator(0), routes))
    assert found.kl_static == pytest.approx((low + 1 - skipped) * few + (skipped - low) * many)


def test_distances_are_those_of_each_route_alone():
    model = attach(tiny(), LINEAR.config()).train()
    first = dict.fromkeys(routing_of(model).sites[:2], False)
    both = distances(model, examples(19), Collator(0), [partial(fixed_routes, model, r) for r in (first, {})])
    assert model.training
    with fixed_routes(model, first):
        alone = distance(model, examples(19), Collator(0))
    assert both[0] == alone
    assert both[1].mean == pytest.approx(0, abs=1e-6)
    assert (alone.keep.all, both[1].keep.all) == (0.5, 1.0)
    assert len(alone.kl) == 19
    with fixed_routes(model, first):
        parts = [distance(model, [e], Collator(0)) for e in examples(19)]
    assert alone.kl == pytest.approx([part.kl[0] for part in parts], abs=1e-5)
    assert alone.tokens == sum(part.tokens for part in parts)


def test_what_executed_counts_by_token_as_kl_does():
    """Routers that let long texts alone execute more do not compare with a twin that lets all of them."""
    held = [Example(list(range(2, 2 + length)), 4) for length in (24, 30)]
    held += [Example(list(range(32, 32 + length)), 4) for length in (6, 9)]  # these skip
    model = attach(two_kinds(), MindSkipConfig(layers=(1,)))
    (router,) = routing_of(model).routers().values()
    router.weight.data[[0, HALF]] = torch.tensor([1.0, -1.0])
    whole, parts = distance(model, held, Collator(0)), [distance(model, [e], Collator(0)) for e in held]
    assert len({part.executed for part in parts}) > 1, "the test must be able to fail"
    assert [part.executed for part in parts] == [part.keep.all for part in parts]
    assert whole.executed == pytest.approx(sum(p.executed * p.tokens for p in parts) / sum(p.tokens for p in parts))
    assert whole.executed != pytest.approx(whole.keep.all, abs=1e-3)


@pytest.mark.parametrize("granularity", ["sequence", "token"])
@pytest.mark.parametrize("target", ["attention", "mlp", "block"])
def test_the_static_route_has_the_routers_skip_paths(granularity, target):
    config = dataclasses.replace(LINEAR.config(target=target, granularity=granularity), layers=(0, 2, 3))
    model = attach(tiny().eval(), config)
    for path in routing_of(model).paths().values():
        torch.nn.init.normal_(path.write, std=0.1)
    routing_of(model).provenance["seed"] = 3
    batch, before = Collator(0)(examples(6)), fingerprint(model)
    with torch.no_grad(), fixed_routes(model, {s: s.layer not in (3, 0) for s in routing_of(model).sites}):
        wanted = model(**batch).logits
    settle(model, (3, 0, 2))
    set_budget(model, **{target: 0.5})
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, wanted)
    assert routing_of(model).provenance == {"seed": 3}
    assert fingerprint(model) == before
    assert all(p.requires_grad for p in detach(model).parameters())


# ---- whole runs


def test_a_run_that_chooses_a_static_route_saves_one(tmp_path):
    recipe = dataclasses.replace(LINEAR, choose=True)
    model = tiny()
    result = tune(model, Tokenizer(), examples(), recipe, out=tmp_path, budget=0.5)
    found = result.choice
    assert found.chosen == "static"
    assert [row["budget"] for row in found.by_budget] == [0.75, 0.5]
    assert result.n_trainable == 4 * 33 + 4 * (4 * 32 * 4 + 32)  # routers were tuned, too
    assert result.moved > 1e-3
    assert (result.keep_after.all, result.kl_static) == (0.5, None)
    again = load(tiny(), tmp_path).eval()
    routing = routing_of(again)
    assert isinstance(routing.config, StaticConfig)
    assert (routing.config.order, routing.budget) == (found.order, 0.5)
    assert list(routing.config.skip) == result.static_skip == sorted(found.order[:2])
    assert routing.provenance["result"]["choice"]["why"] == found.why
    assert routing.provenance["recipe"]["method"]["method"] == "mindskip"
    held = examples()[: result.n_heldout]
    assert distance(again, held, Collator(0)).mean == pytest.approx(result.kl_after)
    set_budget(again, attention=0.25)
    with recording() as record, torch.no_grad():
        again(**Collator(0)(held))
    assert record.keep_ratio("prefill").all == 0.25


def test_a_run_that_chooses_routers_saves_them(tmp_path):
    result = tune(two_kinds(), Tokenizer(), of_both_kinds(), KINDS, out=tmp_path)
    assert result.choice.chosen == "routers"
    (compared,) = result.choice.by_budget
    assert compared["keep"] > 0.8, "more than the budget: held-out texts have more of one kind"
    assert compared["keep"] == pytest.approx(result.keep_after.all, abs=0.01), "the one counts by token, the other not"
    assert compared["keep"] > compared["budget"] + 0.05, "this test needs a twin of another keep ratio"
    assert result.kl_static == pytest.approx(compared["kl_static"]), "of as much as the routers execute"
    assert result.kl_after == pytest.approx(compared["kl_routers"])
    assert result.kl_after < 0.2 * result.kl_static
    again = load(two_kinds(), tmp_path).eval()
    assert isinstance(routing_of(again).config, MindSkipConfig)
    assert routing_of(again).calibration is not None
    assert distance(again, of_both_kinds()[: result.n_heldout], Collator(0)).mean == pytest.approx(result.kl_after)


def test_an_interrupted_run_chooses_what_the_whole_one_does(tmp_path, monkeypatch):
    recipe = dataclasses.replace(LINEAR, choose=True)
    whole = tune(tiny(), Tokenizer(), examples(), recipe, out=tmp_path / "whole")
    step, calls = RouterTrainer.training_step, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(RouterTrainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(tiny(), Tokenizer(), examples(), recipe, out=tmp_path / "cut")
    cut = tune(tiny(), Tokenizer(), examples(), recipe, out=tmp_path / "cut")
    assert len(calls) == 6 + 8  # four steps were in the last checkpoint
    assert cut.choice == whole.choice
    a, b = (routing_of(load(tiny(), tmp_path / name)) for name in ("whole", "cut"))
    assert a.config == b.config
    for name, tensor in a.tensors().items():
        torch.testing.assert_close(b.tensors()[name], tensor, msg=name)


def test_nothing_to_choose_from_is_said():
    with pytest.raises(ConfigError, match=r"'test' cannot choose.*without calibration.*set calibrate to true"):
        dataclasses.replace(LINEAR, choose=True, calibrate=False)


def test_a_static_route_as_dear_as_routers_of_tokens():
    model = tiny()
    attach(
        model, MindSkipConfig(granularity="token", kv_policy="project", skip_path="linear", skip_rank=2, layers="all")
    )
    sites = routing_of(model).sites
    found = choice.as_dear(model, 0.5, 64)
    assert found > 0.5, "skipped tokens project keys and values, and all take the path"
    spent = flops_share(model, dict.fromkeys(sites, 0.5), 64).target
    detach(model)
    attach(model, StaticConfig(skip_path="linear", skip_rank=2, order=(3, 2, 1, 0)))
    assert flops_share(model, dict.fromkeys(routing_of(model).sites, found), 64).target == pytest.approx(spent)
    detach(model)
    attach(model, MindSkipConfig(granularity="token", layers=(0, 1), skip_path="linear", skip_rank=2))
    assert choice.as_dear(model, 1.0, 64) == 1.0


def test_routers_of_tokens_are_compared_at_equal_flops(monkeypatch):
    """Not at an equal keep ratio: what a token skips is not all of a sublayer's work."""
    asked = []

    def noted(model, examples, collator, order, keeps, progress=None):
        asked.extend(keeps)
        return [[0.0] * len(examples) for _ in keeps]

    monkeypatch.setattr(choice, "twins", noted)
    model, held = tiny(), examples(12)
    attach(model, MindSkipConfig(granularity="token", kv_policy="project", layers="all"))
    for router in routing_of(model).routers().values():
        torch.nn.init.normal_(router.weight)
    calibrate(model, prompts_to_batches([example.input_ids for example in held], 0), (0.5,))
    (row,) = choose(model, held, Collator(0), [0.5], dict.fromkeys(routing_of(model).sites, 1.0)).by_budget
    assert asked == [row["keep_static"]]
    assert row["keep"] + 0.02 < row["keep_static"] < 1
