"""Routers on disk: they come back as they were, for the model they were made for, or an error says what to do."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as deserialise

from adapters import content, refused, save_tiny
from dynadepth import MindSkipConfig, StaticConfig, attach, detach, is_attached, load, routing_of, save
from dynadepth.adapter import CONFIG, WEIGHTS, WITHOUT_LORA
from dynadepth.errors import ConfigError
from dynadepth.routing.calibration import Calibration, CalibrationPoint
from small import FAMILIES, KINDS, bare, ids, ragged, routed


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_tiny(tmp_path)


# ---- there and back


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("granularity", "kv_policy"), KINDS)
@pytest.mark.parametrize("target", ["attention", "block"])
def test_round_trip(tmp_path: Path, family: str, granularity: str, kv_policy: str, target: str) -> None:
    config = MindSkipConfig(
        target=target, granularity=granularity, kv_policy=kv_policy, layers=[3, 1], capacity=0.4, penalty=0.2, bias=True
    )
    model = routed(base=bare(family), **{k: v for k, v in config.to_dict().items() if k != "method"})
    routing = routing_of(model)
    for number, router in enumerate(routing.routers().values()):
        router.threshold.fill_(number / 4)
    points = (CalibrationPoint(0.25, (0.5, 1.5)), CalibrationPoint(0.75, (-1.0, 2.0)))
    routing.calibration, routing.budget = Calibration(points, n_sequences=12), 0.8
    routing.provenance["seed"] = 3
    assert save(model, tmp_path / "a" / "b") == tmp_path / "a" / "b"
    again = load(bare(family), tmp_path / "a" / "b")
    found = routing_of(again)
    assert found.config == config
    assert found.sites == routing.sites
    assert (found.calibration, found.budget, found.provenance) == (routing.calibration, 0.8, {"seed": 3})
    for site, router in routing.routers().items():
        for name, value in router.state_dict().items():
            assert torch.equal(value, found.routers()[site].state_dict()[name])
    batch = ragged([6, 3])
    assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_static_routes_round_trip(tmp_path: Path) -> None:
    model = attach(bare(), StaticConfig(target="mlp", skip=(2, 0)))
    again = load(bare(), save(model, tmp_path))
    assert routing_of(again).config == StaticConfig(target="mlp", skip=(0, 2))
    assert torch.equal(again(input_ids=ids(2, 4)).logits, model(input_ids=ids(2, 4)).logits)


def test_thresholds_of_full_budgets_survive(tmp_path: Path) -> None:
    model = routed()
    for router in routing_of(model).routers().values():
        router.threshold.fill_(-math.inf)
    again = load(bare(), save(model, tmp_path))
    assert all(router.threshold == -math.inf for router in routing_of(again).routers().values())


def test_nothing_is_pickled_and_no_weight_of_the_model_is_saved(saved: Path) -> None:
    assert set(content(saved)) == {CONFIG, WEIGHTS}
    assert set(deserialise((saved / WEIGHTS).read_bytes())) == {
        f"{layer}.attention.{name}" for layer in range(4) for name in ("weight", "bias", "threshold")
    }
    data = json.loads((saved / CONFIG).read_text())
    assert data["format"] == WITHOUT_LORA
    assert data["config"]["method"] == "mindskip"
    assert data["base_model"]["name"] == "tiny/llama"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_change_of_dtype_is_no_other_model(saved: Path, dtype: torch.dtype) -> None:
    model = load(bare().to(dtype), saved)
    assert all(p.dtype == torch.float32 for r in routing_of(model).routers().values() for p in r.parameters())
    assert save(model, saved.parent / "again")
    load(bare(), saved.parent / "again")


def test_overwriting_replaces_both_files(saved: Path) -> None:
    other = routed(layers=(1,))
    save(other, saved)
    assert routing_of(load(bare(), saved)).sites == routing_of(other).sites


# ---- another model


def test_other_weights_are_refused_naming_both_models_and_fingerprints(saved: Path) -> None:
    other = bare(seed=1)
    other.config._name_or_path = "tiny/other"
    message = refused(other, saved)
    theirs = save(attach(other, MindSkipConfig()), saved.parent / "theirs")
    documents = [json.loads((directory / CONFIG).read_text()) for directory in (saved, theirs)]
    fingerprints = [document["base_model"]["fingerprint"] for document in documents]
    for part in ("'tiny/llama'", "'tiny/other'", "fingerprint", "strict=False", *fingerprints):
        assert part in message
    assert fingerprints[0] != fingerprints[1]
    assert is_attached(load(detach(other), saved, strict=False))


def of_shape(**changes: int) -> Any:
    """A bare Llama of another shape."""
    model = bare()
    return type(model)(type(model.config)(**{**model.config.to_dict(), **changes})).eval()


@pytest.mark.parametrize(
    ("make", "difference"),
    [
        (lambda: bare("gemma3"), "model_type is 'llama' there and 'gemma3_text' here"),
        (lambda: of_shape(hidden_size=32), "hidden_size is 16 there and 32 here"),
        (lambda: of_shape(num_hidden_layers=3), "num_hidden_layers is 4 there and 3 here"),
        (lambda: of_shape(vocab_size=70), "vocab_size is 61 there and 70 here"),
    ],
    ids=["family", "width", "depth", "vocabulary"],
)
@pytest.mark.parametrize("strict", [True, False])
def test_other_shapes_are_refused(saved: Path, make: Any, difference: str, strict: bool) -> None:
    other = make()
    other.config._name_or_path = "tiny/other"
    message = refused(other, saved, strict=strict)
    assert difference in message
    assert "'tiny/llama'" in message
    assert "'tiny/other'" in message


def test_a_model_that_is_routed_already(saved: Path) -> None:
    with pytest.raises(ConfigError, match=r"already routed.*detach"):
        load(routed(), saved)
