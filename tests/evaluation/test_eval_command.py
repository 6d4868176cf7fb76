"""`python -m dynadepth.evaluation.lm_eval`: the harness's own command line, offline, with a routed model."""

import json
import os
import subprocess
import sys

import pytest

from dynadepth import save
from dynadepth.errors import AdapterError
from dynadepth.evaluation import lm_eval


def test_what_the_user_can_change_is_one_sentence(monkeypatch, capsys):
    def refuse():
        raise AdapterError("routers/ was made for another model.")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", refuse)
    with pytest.raises(SystemExit) as stop:
        lm_eval.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: routers/ was made for another model.\n"


@pytest.mark.slow  # the harness reads its thousands of task files first
def test_a_task_of_the_users_runs_end_to_end(routed, tokenizer, tmp_path):
    routed.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    save(routed, tmp_path / "routers")
    rows = [{"question": f"{i} + 1?", "options": [str(i + 1), "none"], "answer": 0} for i in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "plus.yaml").write_text(
        "task: plus_one\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        "doc_to_text: '{{question}}'\n"
        "doc_to_target: answer\n"
        "doc_to_choice: options\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    arguments = f"pretrained={tmp_path / 'model'},routers={tmp_path / 'routers'},budget=1.0,dtype=float32"
    command = [sys.executable, "-m", "dynadepth.evaluation.lm_eval", "--model", "dynadepth", "--model_args", arguments]
    done = subprocess.run(
        [*command, "--tasks", "plus_one", "--include_path", str(tasks), "--output_path", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "out").rglob("results_*.json")
    assert 0 <= json.loads(file.read_text())["results"]["plus_one"]["acc,none"] <= 1
