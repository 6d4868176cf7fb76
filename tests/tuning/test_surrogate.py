"""The closed-form fit of skip paths: it is the regression it claims to be, on what the paths really see."""

import pytest
import torch
from tests.parity.models import tiny
from tests.parity.oracle import attention_of, contributor_of, module_of
from torch import nn

from dynadepth import MindSkipConfig, attach, routing_of
from dynadepth.errors import ConfigError
from dynadepth.routing.skip_path import Reality
from dynadepth.tuning import surrogate
from dynadepth.tuning.data import Example
from dynadepth.tuning.start import fit_batches, fit_tokens
from dynadepth.tuning.surrogate import fit_paths


def batches(side="right", seed=0):
    made = []
    for half, lengths in ((0, (40, 31, 25)), (1, (36, 36, 9))):
        generator = torch.Generator().manual_seed(2 * seed + half)
        ids = torch.randint(1, 90, (3, 40), generator=generator)
        column = torch.arange(40)
        mask = torch.stack([column < n if side == "right" else column >= 40 - n for n in lengths]).long()
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def routed(name="llama", rank=8, **settings):
    return attach(tiny(name), MindSkipConfig(layers="all", skip_path="linear", skip_rank=rank, **settings))


def seen(name, target, layer, given):
    """What a bare model's sublayer was given, and what it added to the stream, real tokens only."""
    model = tiny(name)
    block = model.get_decoder().layers[layer]
    kept = {}
    module, contributor = module_of(block, target), contributor_of(block, target)
    module.register_forward_pre_hook(
        lambda m, args, kwargs: kept.update(hidden=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )

    def note(m, args, output):
        kept["out"] = output[0] if isinstance(output, tuple) else output

    contributor.register_forward_hook(note)
    with torch.no_grad():
        model(**given)
    return kept["hidden"], kept["out"] - kept["hidden"] if target == "block" else kept["out"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("name", "target"),
    [("llama", "attention"), ("llama", "mlp"), ("llama", "block"), ("gemma3", "attention"), ("gemma3", "mlp"),
     ("olmo2", "attention"), ("gpt_neox", "attention"), ("granite", "block")],
)  # fmt: skip
def test_what_is_explained_is_what_the_path_gets_right(name, target, side):
    model, data = routed(name, target=target), batches(side)
    explained = fit_paths(model, data)
    for site, path in routing_of(model).paths().items():
        errors, contributions = [], []
        for batch in data:
            mask = batch["attention_mask"].bool()
            hidden, wanted = seen(name, target, site.layer, batch)
            with torch.no_grad():
                found, _ = path(hidden, Reality.of(mask))
            errors.append((found - wanted)[mask])
            contributions.append(wanted[mask])
        wanted = torch.cat(contributions)
        share = 1 - torch.cat(errors).square().sum() / (wanted - wanted.mean(0)).square().sum()
        # the variance is summed batch by batch around each batch's own mean, which is a little less
        assert explained[site] == pytest.approx(float(share), abs=1e-3), site
        assert explained[site] > 0.05


def regression(name, layer, data):
    """What a layer's path is fitted on, by definition, in float64: features with ones behind, and contributions."""
    features, wanted = [], []
    for batch in data:
        mask = batch["attention_mask"].bool()
        hidden, out = seen(name, "attention", layer, batch)
        for row in range(len(mask)):
            h = hidden[row][mask[row]]
            before = torch.cat([torch.zeros_like(h[:1]), h[:-1]])
            mean = torch.stack([h[: t + 1].mean(0) for t in range(len(h))])
            features.append(torch.cat([h, before, mean, torch.ones(len(h), 1)], 1))
            wanted.append(out[row][mask[row]])
    return torch.cat(features).double(), torch.cat(wanted).double()


def ridge_regression(x, y, ridge):
    moments = x.T @ x / len(x)
    damping = (ridge * moments.diagonal()[:-1].mean()).expand(len(moments)).clone()
    damping[-1] = 1e-6
    return torch.linalg.solve(moments + damping.diag(), x.T @ y / len(x))


def test_full_rank_is_ridge_regression_and_less_rank_explains_less(monkeypatch):
    monkeypatch.setattr(surrogate, "RIDGES", (0.01,))
    data = batches()
    shares = {rank: fit_paths(routed(rank=rank), data) for rank in (2, 8, 32)}
    for site in shares[32]:
        assert shares[2][site] < shares[8][site] < shares[32][site]
    model = routed(rank=32)
    fit_paths(model, data)
    site, path = list(routing_of(model).paths().items())[1]
    weights = ridge_regression(*regression("llama", site.layer, data), 0.01)
    read = torch.cat(path.read.chunk(3, dim=1), 0).double()
    torch.testing.assert_close(read @ path.write.double(), weights[:-1], atol=2e-3, rtol=1e-2)
    torch.testing.assert_close(path.bias.double(), weights[-1], atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("n_batches", [2, 3, 5, 12])
def test_the_ridge_is_the_least_that_is_good_enough_on_batches_held_out(n_batches, monkeypatch):
    """Few tokens for 97 features: the least ridge fits noise, as held-out batches tell. All are fitted on at last."""
    ridges = (1e-6, 1e-2, 1.0, 1e3)
    monkeypatch.setattr(surrogate, "RIDGES", ridges)
    data = [batch for seed in range(-(-n_batches // 2)) for batch in batches(seed=seed)][:n_batches]
    held = data[3::8] or data[1:2]
    others = [batch for batch in data if not any(batch is one for one in held)]
    model = routed(rank=32)
    fit_paths(model, data)
    taken = set()
    for site, path in routing_of(model).paths().items():
        x, y = regression("llama", site.layer, others)
        new_x, new_y = regression("llama", site.layer, held)
        errors = [float((new_x @ ridge_regression(x, y, ridge) - new_y).square().sum()) for ridge in ridges]
        enough = min(errors) + 0.02 * float((new_y - y.mean(0)).square().sum())
        ridge = next(ridge for ridge, error in zip(ridges, errors, strict=True) if error <= enough)
        weights = ridge_regression(*regression("llama", site.layer, data), ridge)
        found = torch.cat(path.read.chunk(3, dim=1), 0).double() @ path.write.double()
        torch.testing.assert_close(found, weights[:-1], atol=5e-3, rtol=2e-2)
        taken.add(ridge)
    few = n_batches < 12
    assert bool(taken & set(ridges[1:])) == few, "with enough tokens the least is good enough"


def test_a_wide_model_is_fitted_on_more_tokens():
    model = routed()
    assert fit_tokens(model) == 32_768
    model.config.hidden_size = 4096  # 12,289 features
    assert fit_tokens(model) == 16 * 12_289
    texts = [Example(list(range(500)), 0) for _ in range(600)]
    assert sum(int(batch["attention_mask"].sum()) for batch in fit_batches(model, texts, 0)) == 197_000


def test_a_small_memory_takes_more_passes_and_gives_the_same():
    data, calls = batches(), []
    one, many = routed(), routed()
    fit_paths(one, data)
    fit_paths(many, data, lambda done, total: calls.append((done, total)), memory=1)
    assert calls == [(i + 1, 8) for i in range(8)]  # 4 sites, 2 batches
    for name, tensor in routing_of(one).tensors().items():
        torch.testing.assert_close(routing_of(many).tensors()[name], tensor)


def test_bad_input():
    few = [{"input_ids": torch.ones(1, 9, dtype=torch.long), "attention_mask": torch.ones(1, 9, dtype=torch.long)}]
    with pytest.raises(ConfigError, match="9 tokens are too few to fit skip paths of 97 features"):
        fit_paths(routed(), few)
    with pytest.raises(ConfigError, match="set skip_path to linear"):
        fit_paths(attach(tiny("llama"), MindSkipConfig(layers="all")), few)
    with pytest.raises(ConfigError, match="skip_rank must be a whole number of at least 1, not 0"):
        MindSkipConfig(skip_rank=0)
    with pytest.raises(ConfigError, match=r"Unknown skip path 'liner'; known: identity, linear\. Did you mean"):
        MindSkipConfig(skip_path="liner")


def test_nothing_of_the_model_changes():
    bare, model = tiny("llama"), routed()
    fit_paths(model, batches())
    names = dict(model.named_parameters())
    assert all(torch.equal(p, names[name]) for name, p in bare.named_parameters())
    assert all(not isinstance(m, nn.Module) or not m._forward_hooks for m in model.modules())
    assert attention_of(model.get_decoder().layers[0]).depth_state.skip_path.write.abs().sum() > 0


def test_a_rank_above_the_hidden_size_is_the_hidden_size():
    model = routed(rank=500)
    assert all(0 < share < 1 for share in fit_paths(model, batches()).values())
    assert next(iter(routing_of(model).paths().values())).write.shape == (32, 32)
