"""GSM8K from a local file as a task of the frontier: answers are written in batches under each row's routes."""

from __future__ import annotations

import json

import pytest
from runs import settings_for

from dynadepth.evaluation import evaluate
from dynadepth.evaluation.lm_eval import DynadepthLM
from dynadepth.frontier.run import run_frontier
from dynadepth.frontier.workbench import Workbench
from saved_model import save_routers

QUESTIONS = ("why is the sky", "what is a class of you", "who are you and me", "how blue is it", "give me three")


@pytest.fixture
def gsm8k(tmp_path):
    """A file of GSM8K's form, as settings: every answer but the last is two."""
    (tmp_path / "tasks").mkdir()
    rows = [{"question": q, "answer": "It is.\n#### 2", "final": "2"} for q in QUESTIONS[:-1]]
    rows.append({"question": QUESTIONS[-1], "answer": "#### 3", "final": "3"})
    (tmp_path / "tasks" / "gsm8k_test.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return {"tasks": ("gsm8k_test",), "task_data": str(tmp_path / "tasks")}


@pytest.fixture
def written(monkeypatch):
    """Every answer is 7, then what the model wrote, then 2: what stands last counts. The sizes of the batches
    that were written together."""
    batches = []
    generate, until = DynadepthLM._model_generate, DynadepthLM.generate_until

    def model_generate(self, context, *args, **kwargs):
        batches.append(len(context))
        return generate(self, context, *args, **kwargs)

    monkeypatch.setattr(DynadepthLM, "_model_generate", model_generate)
    monkeypatch.setattr(
        DynadepthLM, "generate_until", lambda self, *a, **k: [f"7 {text}, so 2." for text in until(self, *a, **k)]
    )
    return batches


def test_cells_hold_exact_matches_of_written_answers(opened, data, gsm8k, written, model_folder, tmp_path, monkeypatch):
    routers = save_routers(tmp_path / "random", model_folder, order=[2, 0, 1, 3])
    monkeypatch.setattr(Workbench, "routers", lambda *_: routers)
    methods = ("default", "default-static", "default-shuffled", "random-per-input")
    settings = settings_for(model_folder, data, methods=methods, budgets=(0.6,), limit=4, **gsm8k)
    found = run_frontier(*opened, settings, tmp_path / "out")
    assert set(written) == {4}, "the limit's questions are answered in one batch"
    for cells in found.cells.values():
        for cell in cells.values():
            task = cell["tasks"]["tasks"]["gsm8k_test"]
            assert (task["metric"], task["acc"], task["n"]) == ("acc", 1.0, 4)
            assert cell["rows"]["tasks"]["gsm8k_test"] == [1.0] * 4
    routed = found.cells["default"][0.6]
    assert 0 < routed["tasks"]["keep_ratio"]["all"] < 1
    assert routed["against_dense"]["tasks"]["gsm8k_test"]["value"] == 0
    assert found.cells["default-shuffled"][0.6]["shuffled"]["tasks"]["inputs"] == 4


def test_a_wrong_number_is_wrong(opened, gsm8k, written):
    result = evaluate(*opened, **gsm8k, batch_size=2)["tasks"]["gsm8k_test"]
    assert (result["acc"], result["n"]) == (0.8, 5)
    assert written == [2, 2, 1]
