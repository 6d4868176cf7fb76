"""`dynadepth calibrate`: budgets on one's own prompts, and what is said where they cannot be measured."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from dynadepth import adapter, lora
from saved_model import WORDS


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    draw = random.Random(0)
    rows = [{"text": " ".join(draw.choices(WORDS[:9], k=20))} for _ in range(60)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def files(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_routers_get_other_thresholds_and_nothing_else(
    answered: Callable[..., Any], run: Callable[..., Result], model_folder: str, routers_folder: str, prompts: Path
) -> None:
    before, out = files(routers_folder), prompts.parent / "mine"
    document, result = answered("calibrate", model_folder, "--routers", routers_folder, "--data", prompts, "--out", out)
    assert files(routers_folder) == before, "the routers that were read are written to"
    assert (document["n_calibrated"], document["n_held_back"]) == (45, 15)
    assert [one["budget"] for one in document["checked"]] == [0.875, 0.75, 0.625, 0.5]
    assert "Calibrated on 45 prompts" in result.stdout
    old, new = (json.loads((Path(folder) / "routing_config.json").read_text()) for folder in (routers_folder, out))
    assert old["calibration"]["n_sequences"] == 16
    assert new["calibration"]["n_sequences"] == 45
    assert new["budget"] == old["budget"] == 0.5
    assert new["provenance"]["calibrated"]["data"] == str(prompts)
    assert str(prompts) in run("info", out).stdout.replace("\n", "").replace(" ", "")
    told = run("generate", model_folder, "--routers", out, "--budget", "0.7", "--prompt", "why is the sky blue")
    assert told.exit_code == 0, told.output


def test_too_few_prompts_and_missing_files(
    refused: Callable[..., str], model_folder: str, routers_folder: str, prompts: Path
) -> None:
    out = prompts.parent / "mine"
    words = ("calibrate", model_folder, "--routers", routers_folder, "--out", out)
    assert "too few to calibrate" in refused(*words, "--data", prompts, "--max-samples", 8)
    assert "There is no file" in refused(*words, "--data", prompts.parent / "nothing.jsonl")
    assert "would replace a file of --data" in refused(*words, "--data", prompts, "--json", prompts)
    for name in (*(adapter.CONFIG, adapter.WEIGHTS), *(lora.CONFIG, lora.WEIGHTS)):  # there or not
        assert "would replace a file of --out" in refused(*words, "--data", prompts, "--json", out / name)
    assert not list(out.iterdir())
