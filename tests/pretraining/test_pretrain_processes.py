"""Several processes share every batch: the losses are those of one, at the same global batch."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest

from pretraining_runs import MOD, STEP, to_yaml, write_text

RECIPE = replace(MOD, batch_size=8)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    recipe, text = to_yaml(RECIPE, tmp_path / "r.yaml"), write_text(tmp_path)
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port()),
              "-m"]  # fmt: skip
    found = {}
    for n, launcher in ((1, []), (2, launch)):
        out = tmp_path / str(n)
        words = [*launcher, "dynadepth", "pretrain", "--recipe", recipe, "--data", text, "--out", out]
        done = subprocess.run(
            [sys.executable, "-m", *map(str, words), "--flops", str(12 * STEP)],
            capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("Model saved in") == 1
        found[n] = json.loads((out / "run.json").read_text())["result"]
    assert found[2]["losses"] == pytest.approx(found[1]["losses"], abs=1e-4)
    assert found[2]["flops"] == found[1]["flops"]
    for name, loss in found[1]["valid"].items():
        assert found[2]["valid"][name]["nats"] == pytest.approx(loss["nats"], abs=1e-4)
