"""What every test shares: no hub access, one thread a worker, and the embedded model."""

import os

# Before any import of transformers, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import Result

from commands import invoke, refusal
from dynadepth import hub

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two workers with all cores each would run slower than one after the other.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """Folder of SmolLM2-135M-Instruct in bfloat16; made at the first use, then read from the cache."""
    return hub.fetch("smollm2-135m")


@pytest.fixture
def run() -> Callable[..., Result]:
    """`run("eval", folder, "--limit", 3)`: exit code, stdout and stderr apart; unexpected exceptions are raised."""
    return invoke


@pytest.fixture
def refused() -> Callable[..., str]:
    """Runs a command that must end as one sentence and exit code 2; returns the sentence."""
    return refusal
