"""Routers that are missing, damaged, newer or wrong are refused with the way out, and a failed write harms nothing."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import content, edit, refused, replace_tensors, save_tiny
from dynadepth import MindSkipConfig, Site, StaticConfig, attach, is_attached, load, routing_of, save
from dynadepth.adapter import CONFIG, FORMAT, WEIGHTS
from dynadepth.errors import AdapterError, ConfigError, DynadepthError
from small import bare, ragged, routed

BATCH = ragged([6, 3])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_tiny(tmp_path)


# ---- damage


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_missing_files(saved: Path, name: str) -> None:
    (saved / name).unlink()
    assert f"{name} is missing" in refused(bare(), saved)


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    assert "nowhere" in refused(bare(), tmp_path / "nowhere")


@pytest.mark.parametrize("kept", [0, 3, 100, -1])
def test_truncated_tensors(saved: Path, kept: int) -> None:
    (saved / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes()[:kept])
    assert "truncated or was changed" in refused(bare(), saved)


def test_tampered_tensors(saved: Path) -> None:
    blob = bytearray((saved / WEIGHTS).read_bytes())
    blob[-1] ^= 1
    (saved / WEIGHTS).write_bytes(bytes(blob))
    assert "truncated or was changed" in refused(bare(), saved)


def test_a_file_that_is_no_safetensors_though_its_checksum_fits(saved: Path) -> None:
    (saved / WEIGHTS).write_bytes(b"not safetensors")
    edit(saved, sha256=hashlib.sha256(b"not safetensors").hexdigest())
    assert "damaged" in refused(bare(), saved)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {k: v for k, v in t.items() if not k.startswith("2.")},
        lambda t: {**t, "9.attention.weight": torch.zeros(3)},
        lambda t: {**t, "1.attention.weight": torch.zeros(3)},
    ],
    ids=["missing", "unknown site", "wrong shape"],
)
def test_tensors_that_do_not_fit_the_configuration(saved: Path, change: Any) -> None:
    replace_tensors(saved, change)
    assert "does not fit its own configuration" in refused(bare(), saved)


SKIP_PATHS = {
    "missing": (lambda t: {k: v for k, v in t.items() if k != "2.attention.depth_path.read"},
                "the skip path of 2.attention is asked for, and '2.attention.depth_path.read' is missing"),
    "another rank": (lambda t: {**t, "1.attention.depth_path.write": torch.zeros(3, 16)},
                     r"skip path of 1.attention is of another shape: .* \(3, 16\) where \(2, 16\) is asked for"),
    "of another site": (lambda t: {**t, "9.attention.depth_path.bias": torch.zeros(16)},
                        "the skip path of 9.attention is not asked for"),
    "not finite": (lambda t: {**t, "0.attention.depth_path.bias": torch.full((16,), torch.nan)},
                   "the skip path of 0.attention is not finite"),
}  # fmt: skip


@pytest.mark.parametrize("damage", SKIP_PATHS)
def test_skip_paths_that_do_not_match_their_routers(tmp_path: Path, damage: str) -> None:
    saved = save(routed(bias=True, skip_path="linear", skip_rank=2), tmp_path / "routers")
    change, said = SKIP_PATHS[damage]
    replace_tensors(saved, change)
    assert re.search(said, refused(bare(), saved))


def test_routers_saved_without_the_skip_paths_that_they_name(saved: Path) -> None:
    document = json.loads((saved / CONFIG).read_text())
    edit(saved, config={**document["config"], "skip_path": "linear"})
    assert "the skip path of 0.attention is asked for" in refused(bare(), saved)


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '{"format": "one"}', '{"format": 0}', "\udcff"])
def test_damaged_json(saved: Path, text: str) -> None:
    (saved / CONFIG).write_bytes(text.encode(errors="surrogateescape"))
    assert "damaged" in refused(bare(), saved)


@pytest.mark.parametrize("key", ["config", "base_model", "sha256"])
def test_missing_entries(saved: Path, key: str) -> None:
    edit(saved, **{key: None})
    assert "save the routers again" in refused(bare(), saved)


NO_POINTS = {"points": [], "n_sequences": 1}
NO_QUANTILES = {"points": [{"keep": 0.5, "quantiles": []}], "n_sequences": 1}


@pytest.mark.parametrize(
    "calibration", [{}, {"points": [{"keep": "x"}], "n_sequences": 1}, NO_POINTS, NO_QUANTILES, 3], ids=str
)
def test_a_damaged_calibration(saved: Path, calibration: Any) -> None:
    edit(saved, calibration=calibration)
    assert "does not fit its own configuration" in refused(bare(), saved)


def test_a_newer_format_says_to_upgrade(saved: Path) -> None:
    edit(saved, format=FORMAT + 1, config={"method": "of the future"})
    message = refused(bare(), saved)
    assert f"format {FORMAT + 1}" in message
    assert "pip install -U dynadepth" in message


@pytest.mark.parametrize("changes", [{"budget": "x"}, {"control": []}, {"provenance": [1]}], ids=str)
def test_damaged_facts(saved: Path, changes: dict[str, Any]) -> None:
    edit(saved, **changes)
    assert "does not fit its own configuration" in refused(bare(), saved)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path: Path, number: float) -> None:
    model = routed()
    with torch.no_grad():
        routing_of(model).routers()[Site(2, "attention")].weight[0] = number
    assert "router of 2.attention is not finite" in refused(bare(), save(model, tmp_path))


def test_thresholds_may_be_infinite(tmp_path: Path) -> None:
    model = routed()
    for number, router in zip((math.inf, -math.inf), routing_of(model).routers().values(), strict=False):
        router.threshold.fill_(number)
    assert torch.equal(load(bare(), save(model, tmp_path))(**BATCH).logits, model(**BATCH).logits)
    routing_of(model).routers()[Site(1, "attention")].threshold.fill_(math.nan)
    assert "router of 1.attention is not finite" in refused(bare(), save(model, tmp_path))


def test_routers_without_provenance_load(saved: Path) -> None:
    edit(saved, provenance=None)
    assert routing_of(load(bare(), saved)).provenance == {}


# ---- values of the configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "mindskp"}, "Unknown .*'mindskp'.*Did you mean 'mindskip'"),
        ({"capasity": 0.5}, "no setting 'capasity'.*Did you mean 'capacity'"),
        ({"capacity": 0}, "capacity must be above 0 and at most 1, not 0"),
        ({"capacity": 1.5}, "capacity .*1.5"),
        ({"capacity": math.nan}, "capacity .*nan"),
        ({"capacity": "half"}, "capacity .*'half'"),
        ({"penalty": -1}, "penalty .*-1"),
        ({"penalty": math.nan}, "penalty .*nan"),
        ({"layers": [0, 0]}, "layers must be distinct whole numbers"),
        ({"layers": []}, "at least one layer"),
        ({"layers": ["1"]}, "layers must be distinct whole numbers"),
        ({"layers": 3}, "layers must be distinct whole numbers"),
        ({"layers": "some"}, "layers must be distinct whole numbers"),
        ({"layers": [4]}, r"layers \[4\] do not exist.*4 layers, 0 to 3"),
        ({"layers": [-1]}, r"layers \[-1\] do not exist"),
        ({"kv_policy": "keep"}, "kv_policy must be one of project, drop, not 'keep'"),
        ({"target": "atention"}, "Unknown target 'atention'.*Did you mean 'attention'"),
        ({"granularity": "tokens"}, "Unknown granularity 'tokens'.*Did you mean 'token'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_values(saved: Path, changes: dict[str, Any], message: str) -> None:
    data = json.loads((saved / CONFIG).read_text())
    edit(saved, config={**data["config"], **changes})
    model = bare()
    with pytest.raises(DynadepthError, match=message):
        load(model, saved)
    assert not is_attached(model)
    if "method" not in changes and "capasity" not in changes:  # the same from Python
        with pytest.raises(ConfigError, match=message):
            attach(bare(), MindSkipConfig(**changes))


@pytest.mark.parametrize("skip", [(0, 0), ("1",), 2, (1, 9)])
def test_bad_static_routes(skip: Any) -> None:
    with pytest.raises(ConfigError, match=r"skip|\[9\] do not exist"):
        attach(bare(), StaticConfig(skip=skip))


# ---- failures while writing


@pytest.mark.parametrize("failing", [WEIGHTS, CONFIG])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_failed_write_leaves_the_old_routers(
    saved: Path, monkeypatch: pytest.MonkeyPatch, failing: str, number: int
) -> None:
    before = content(saved)
    for method in ("write_bytes", "write_text"):
        original = getattr(Path, method)

        def write(self: Path, data: Any, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            if failing in self.name:
                original(self, data[: len(data) // 2], *args, **kwargs)
                raise OSError(number, "the disk says no")
            return original(self, data, *args, **kwargs)

        monkeypatch.setattr(Path, method, write)
    with pytest.raises(AdapterError, match="No space left" if number == errno.ENOSPC else "the disk says no"):
        save(routed(layers=(1,)), saved)
    monkeypatch.undo()
    assert content(saved) == before
    assert len(routing_of(load(bare(), saved)).sites) == 4


def test_an_interrupt_while_writing_leaves_the_old_routers(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(saved)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(routed(layers=(1,)), saved)
    assert content(saved) == before


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(AdapterError, match=r"cannot be saved in .*taken"):
        save(routed(), tmp_path / "taken")
