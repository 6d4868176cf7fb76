"""Kinds of routing to be compared: their decisions are those asked for, on the prompts timed. Times are not tested."""

import pytest
import torch

import dynadepth
from dynadepth import Site
from dynadepth.benchmark import bare_twin, grid, run
from dynadepth.benchmark.timing import Work
from dynadepth.benchmark.variants import KINDS, Variant, applicable, build, drawn_sites, drawn_skip, settling
from dynadepth.errors import ConfigError
from small import LAYERS, bare, ids, routed


def settled(text: str, batch: int = 4, context: int = 12, family: str = "llama", skip_path: str = "identity"):
    """A variant's model, and the batch that it was settled on."""
    variant, work = Variant.parse(text, skip_path), Work(ids(batch, context + 3), context)
    model = build(bare(family), variant)
    with torch.no_grad(), settling(model, variant):
        work.prefill(model)
    return model, work


def prefilled(model, work: Work):
    with torch.no_grad(), dynadepth.recording() as record:
        return work.prefill(model), record


@pytest.mark.parametrize("kind", ["static", "sequence", "route"])
def test_one_route_for_all_rows(kind):
    model, work = settled(f"{kind}@0.5")
    cache, record = prefilled(model, work)
    for site, rows in cache.routes.items():
        assert rows == [site.layer not in drawn_skip(LAYERS, 0.5)] * 4
    assert record.keep_ratio().all == 0.5
    asked = dynadepth.routing_of(model).routers().values()
    assert all((router.constant is None) == (kind != "static") for router in asked)


@pytest.mark.parametrize("kind", ["mixed", "mixed-route"])
@pytest.mark.parametrize("keep", [0.25, 0.5, 0.75])
def test_mixed_rows_differ_at_every_site(kind, keep):
    model, work = settled(f"{kind}@{keep}")
    cache, _ = prefilled(model, work)
    assert [sum(rows) for rows in cache.routes.values()] == [round(4 * keep)] * LAYERS
    assert len({tuple(rows) for rows in cache.routes.values()}) > 1


@pytest.mark.parametrize("kind", ["token-project", "token-drop"])
def test_tokens_at_the_share_asked_for(kind):
    model, work = settled(f"{kind}@0.75")
    _, record = prefilled(model, work)
    for site, share in record.site_keep("prefill").items():  # equal tokens tie below the first layer
        assert share == pytest.approx(0.75, abs=1e-6 if site.layer else 0.1)
    assert dynadepth.routing_of(model).config.kv_policy == kind.split("-")[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [0, 1])
def test_the_ends(kind, keep):
    model, work = settled(f"{kind}@{keep}")
    _, record = prefilled(model, work)
    assert record.keep_ratio().all == keep
    if keep == 1:
        with torch.no_grad():
            assert torch.equal(model(work.ids_BT).logits, bare()(work.ids_BT).logits)


def test_the_given_model_stays_as_it_is():
    model = bare()
    build(bare_twin(model), Variant("sequence"))
    assert not dynadepth.is_attached(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_linear_skip_paths_are_in_the_models_dtype():
    model = build(bare().bfloat16(), Variant("sequence", 0.5, "linear"))
    paths = dynadepth.routing_of(model).paths()
    assert len(paths) == LAYERS
    assert {p.dtype for path in paths.values() for p in path.parameters()} == {torch.bfloat16}


def test_names():
    assert Variant.parse("token-drop") == Variant("token-drop", 0.5)
    assert str(Variant.parse(" sequence@0.75 ")) == "sequence@0.75"
    with pytest.raises(ConfigError, match=r"'sequense'.*Did you mean 'sequence'"):
        Variant.parse("sequense@0.5")
    with pytest.raises(ConfigError, match="number behind the @"):
        Variant.parse("sequence@half")
    with pytest.raises(ConfigError, match="outside 0 to 1"):
        Variant.parse("sequence@1.5")


def test_one_row_cannot_be_mixed():
    variants = [Variant("mixed"), Variant("static")]
    assert applicable(variants, 1) == [Variant("static")]
    assert applicable(variants, 2) == variants


def test_cells_of_what_is_compared():
    model, batch, context = bare(), 2, 9
    names = [f"{kind}@0.5" for kind in KINDS] + ["sequence@1"]
    cells = run(
        model,
        ids(batch, context + 3),
        batches=[batch],
        contexts=[context],
        new_tokens=3,
        repeats=1,
        compare=[Variant.parse(name) for name in names],
    )
    assert [(c["variant"], c["phase"]) for c in cells] == [(n, p) for n in names for p in ("prefill", "decode")]
    assert not dynadepth.is_attached(model)
    for cell in cells:
        kind, keep = cell["variant"].split("@")
        assert cell["dense_s"] == cells[0 if cell["phase"] == "prefill" else 1]["dense_s"], "timed once"
        unit = "token" if kind.startswith("token") else "route" if kind.endswith("route") else "sequence"
        assert cell["granularity"] == unit
        assert (cell["pruned_s"] is not None) == (cell["variant"] in ("static@0.5", "sequence@0.5", "route@0.5"))
        assert (cell["nominal_s"] is not None) == (keep == "0.5")
        assert cell["saving"] == pytest.approx(1 - 1 / cell["speedup"])
        shown = {"dense", cell["variant"]} | ({"pruned"} if cell["pruned_s"] is not None else set())
        assert set(cell["tokens_per_s"]) == shown
        assert cell["tokens_per_s"]["dense"] == pytest.approx(
            batch * (context if cell["phase"] == "prefill" else 1) / cell["dense_s"]
        )
        whole = kind == "token-project" or keep == "1"
        assert (cell["kv_bytes_routed"] == cell["kv_bytes_dense"]) == whole
        if keep == "1":
            assert cell["ideal_saving"] == pytest.approx(0, abs=1e-2)
        elif cell["phase"] == "prefill":
            keep = 0 if kind == "static" else 0.5  # of the sites that it routes
            assert cell["keep_ratio"] == pytest.approx(keep, abs=0.05)
            assert cell["ideal_saving"] > 0
    halves = {c["variant"]: c["kv_bytes_routed"] for c in cells if c["phase"] == "prefill"}
    assert halves["static@0.5"] == halves["sequence@0.5"] == halves["mixed@0.5"] == cells[0]["kv_bytes_dense"] / 2


def test_the_grid_is_given_point_by_point_without_what_is_finished():
    given = grid(
        bare(),
        ids(2, 12),
        batches=[1, 2],
        contexts=[4, 9],
        new_tokens=3,
        repeats=1,
        compare=[Variant("mixed"), Variant("static")],
        finished={(1, 9)},
    )
    found = [{(c["batch"], c["context"], c["variant"]) for c in cells} for cells in given]
    assert found == [
        {(1, 4, "static@0.5")},
        {(2, 4, "mixed@0.5"), (2, 4, "static@0.5")},
        {(2, 9, "mixed@0.5"), (2, 9, "static@0.5")},
    ]


def test_a_twin_has_as_many_attentions_as_the_variant():
    assert drawn_sites(bare(), 0.5) == {Site(layer, "attention") for layer in drawn_skip(LAYERS, 0.5)}
    assert [len(drawn_skip(30, keep)) for keep in (0, 0.5, 0.75, 1)] == [30, 15, 8, 0]


def test_contexts_beyond_the_models_positions_are_said():
    found = run(bare(), ids(1, 131), batches=[1], contexts=[126, 127], new_tokens=2, repeats=1)
    assert [(cell["context"], cell["beyond_positions"]) for cell in found[::2]] == [(126, False), (127, True)]


def test_beside_the_models_own_routers():
    model = routed()
    cells = run(model, ids(1, 12), batches=[1], contexts=[9], new_tokens=3, repeats=1, compare=[Variant("sequence")])
    assert list(dict.fromkeys(cell["variant"] for cell in cells)) == ["routed", "execute_all", "sequence@0.5"]
    assert len({cell["dense_s"] for cell in cells if cell["phase"] == "prefill"}) == 1, "one dense for all"
    own = [router.weight for router in dynadepth.routing_of(model).routers().values()]
    assert not any(torch.equal(a, b) for a, b in zip(own[1:], own[:-1], strict=True))
    assert dynadepth.is_attached(model)
