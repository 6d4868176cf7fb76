"""Task files: their formats, their prompts, their scores through the harness, and what is said about bad ones."""

import json
import math
import sys
from typing import ClassVar

import pytest
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

from dynadepth.errors import DataError, DynadepthError
from dynadepth.evaluation.formats import FORMATS, QUERY, QUESTION, format_of, usual_metric
from dynadepth.evaluation.lm_eval import DynadepthLM
from dynadepth.evaluation.tasks import QUESTIONS, Tasks, load_tasks, run_tasks

CHOICES = {"choices": ["a star", "a moon"], "gold": 1}
ROWS = {
    "arc_easy": {"id": "0", "query": "What is it?", **CHOICES},
    "hellaswag": {"id": "0", "query": "Cooking: a man", **CHOICES},
    "mmlu": {"id": "0", "subject": "sky", "query": "What is it?", **CHOICES},
    "boolq": {"id": "0", "passage": "P.", "question": "is it so", "choices": ["no", "yes"], "gold": 0},
    "rte": {"id": "0", "premise": "P.", "hypothesis": "H.", "choices": ["True", "False"], "gold": 0},
    "winogrande": {"id": "0", "context_options": ["A so A", "A so B"], "continuation": "left.", "gold": 1},
    "lambada_openai": {"id": "0", "context": "once upon a", "continuation": "time"},
    "gsm8k_test": {"id": "0", "question": "1 + 1?", "answer": "It is 2.\n#### 2", "final": "2"},
}


def write(folder, name, rows):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def folder(tmp_path):
    for name, row in ROWS.items():
        write(tmp_path, name, [row | {"id": str(i)} for i in range(3)])
    return tmp_path


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("arc_easy", [("Question: What is it?\nAnswer:", " a star"), ("Question: What is it?\nAnswer:", " a moon")]),
        ("hellaswag", [("Cooking: a man", " a star"), ("Cooking: a man", " a moon")]),
        ("mmlu", [("What is it?\nA. a star\nB. a moon\nAnswer:", f" {letter}") for letter in "AB"]),
        ("boolq", [("P.\nQuestion: is it so?\nAnswer:", " no"), ("P.\nQuestion: is it so?\nAnswer:", " yes")]),
        ("rte", [("P.\nQuestion: H. True or False?\nAnswer:", f" {answer}") for answer in ("True", "False")]),
        ("winogrande", [("A so A", " left."), ("A so B", " left.")]),
        ("lambada_openai", [("once upon a", " time")]),
    ],
)
def test_prompts_are_the_usual_zero_shot_ones(folder, name, arguments):
    task = load_tasks([name], folder).leaves[name]
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests(limit=1)
    assert [request.args for request in task.instances] == arguments


def test_generation_stops_at_the_next_question(folder):
    task = load_tasks(["gsm8k_test"], folder).leaves["gsm8k_test"]
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests(limit=1)
    ((prompt, options),) = (request.args for request in task.instances)
    assert prompt == "Question: 1 + 1?\nAnswer:"
    assert options["until"] == ["Question:", "</s>", "<|im_end|>"]
    assert not options["do_sample"]


def test_fields_decide_the_format_and_names_where_they_cannot():
    assert format_of("mine", [ROWS["arc_easy"]]) is QUESTION
    assert format_of("hellaswag_train", [ROWS["hellaswag"]]) is QUERY
    assert format_of("my-openbookqa", [ROWS["hellaswag"]]) is QUERY
    assert format_of("mine", [ROWS["arc_easy"] | {"topic": "sky"}]) is QUESTION
    assert len({id(format_of(name, [row])) for name, row in ROWS.items()}) == len(FORMATS) + 1


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("arc_challenge", "acc_norm"),
        ("ai2_arc", "acc_norm"),
        ("piqa", "acc_norm"),
        ("openbookqa", "acc_norm"),
        ("hellaswag", "acc_norm"),
        ("archive", "acc"),
        ("mmlu", "acc"),
        ("questions", "acc"),
    ],
)
def test_the_usual_metric(name, metric):
    assert usual_metric(name) == metric


class Oracle(DynadepthLM):
    """Knows each continuation's log-probability by its text."""

    table: ClassVar = {
        " a star": -3.0,
        " a moon": -3.2,
        " no": -1.0,
        " yes": -2.0,
        " A": -2.0,
        " B": -1.0,
        " time": -0.5,
    }

    def loglikelihood(self, requests, disable_tqdm=False):
        told = (self.table.get(request.args[1], -len(request.args[0])) for request in requests)
        return [(value, value > -1.0) for value in told]

    def generate_until(self, requests, disable_tqdm=False):
        return [" 1 and 1 are 1,002. So: $2." for _ in requests]


@pytest.fixture
def oracle(llama, tokenizer):
    return Oracle(llama, tokenizer=tokenizer)


def test_scores_come_from_the_harness(oracle, folder):
    longer = {"id": "3", "query": "What is it?", "choices": ["a star", "a moon"], "gold": 0}
    write(folder, "arc_easy", [ROWS["arc_easy"], ROWS["arc_easy"] | {"id": "1"}, longer])
    found = run_tasks(oracle, load_tasks(list(ROWS), folder))
    assert found["arc_easy"].as_dict() == {
        "metric": "acc_norm",
        "acc": pytest.approx(1 / 3),
        "acc_norm": pytest.approx(1 / 3),
        "perplexity": None,
        "stderr": pytest.approx(1 / 3),
        "n": 3,
    }
    assert found["arc_easy"].rows == (0.0, 0.0, 1.0)
    assert (found["mmlu"].metric, found["mmlu"].acc) == ("acc", 1.0)
    assert found["boolq"].value == 1.0
    assert found["winogrande"].acc_norm is None
    assert found["lambada_openai"].perplexity == pytest.approx(math.exp(0.5))
    assert (found["lambada_openai"].acc, found["lambada_openai"].acc_norm) == (1.0, None)
    assert (found["gsm8k_test"].metric, found["gsm8k_test"].acc, found["gsm8k_test"].n) == ("acc", 1.0, 3)


def test_acc_norm_divides_by_bytes(oracle, tmp_path):
    # 4 characters of 8 bytes against 6 of 6: by characters the first would win less.
    row = {"id": "0", "query": "?", "choices": ["ÄÖÜß", "abcdef"], "gold": 0}
    write(tmp_path, "arc_easy", [row])
    oracle.table = {" ÄÖÜß": -8.0, " abcdef": -7.0}
    found = run_tasks(oracle, load_tasks(["arc_easy"], tmp_path))["arc_easy"]
    assert (found.acc, found.acc_norm) == (0.0, 1.0)


def test_limit_takes_the_first_rows(oracle, tmp_path):
    rows = [ROWS["arc_easy"] | {"id": str(i), "gold": 0 if i < 2 else 1} for i in range(5)]
    found = run_tasks(oracle, load_tasks(["mine"], write(tmp_path, "mine", rows)), limit=2)["mine"]
    assert (found.n, found.acc) == (2, 1.0)


def test_a_task_runs_again_with_the_same_numbers(routed, tokenizer, folder):
    lm = DynadepthLM(routed, tokenizer=tokenizer, batch_size=4)
    loaded = load_tasks(["arc_easy", "winogrande", "gsm8k_test"], folder)
    assert run_tasks(lm, loaded, limit=2) == run_tasks(lm, loaded, limit=2)


def test_every_run_sees_the_same_examples(oracle, monkeypatch):
    rows = [ROWS["arc_easy"] | {"query": f"What is {i}?"} for i in range(9)]
    config = QUESTION.config("shots") | {"num_fewshot": 2, "fewshot_split": "test"}
    config["custom_dataset"] = lambda **_: {
        "test": Dataset.from_list([{k: r[k] for k in QUESTION.fields} for r in rows])
    }
    loaded = Tasks({"shots": ConfigurableTask(config=config)}, {"shots": ["shots"]})
    asked = []
    score = oracle.loglikelihood
    monkeypatch.setattr(
        oracle, "loglikelihood", lambda requests: asked.append([r.args for r in requests]) or score(requests)
    )
    run_tasks(oracle, loaded)
    run_tasks(oracle, loaded)
    assert asked[0] == asked[1]
    assert asked[0][0][0].count("Question:") == 3


def test_the_bundled_questions_need_no_folder(oracle, tmp_path):
    assert QUESTIONS.is_file()
    found = run_tasks(oracle, load_tasks(["questions"]), limit=3)
    assert found["questions"].n == 3
    assert "questions" in load_tasks(["questions"], write(tmp_path, "mine", [ROWS["arc_easy"]])).leaves


def test_a_folders_own_questions_come_first(tmp_path):
    task = load_tasks(["questions"], write(tmp_path, "questions", [ROWS["boolq"]])).leaves["questions"]
    assert len(task.eval_docs) == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "0", "text": "long"}], "score it as --perplexity FILE"),
        ([{"id": "0", "prompt": "?"}], "has the fields id, prompt, which no task has"),
        ([ROWS["arc_easy"], {"id": "1", "query": "?", "gold": 0}], "Row 2 of 'mine' has no field choices"),
        ([ROWS["arc_easy"] | {"gold": 2}], "gold = 2, which is no index of its 2 choices"),
        ([ROWS["arc_easy"] | {"gold": "A"}], "gold = 'A'"),
        ([ROWS["arc_easy"] | {"choices": ["one"]}], "two or more texts to choose from"),
        ([ROWS["lambada_openai"] | {"context": ""}], "needs text in the field 'context'"),
    ],
)
def test_rows_that_cannot_be_scored_say_why(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        load_tasks(["mine"], write(tmp_path, "mine", rows))


def test_a_task_that_does_not_exist_names_near_ones(folder):
    with pytest.raises(DataError, match=r"no task 'arc_esy' .* Did you mean 'arc_easy'"):
        load_tasks(["arc_easy", "arc_esy"], folder)


def test_a_folder_that_does_not_exist_or_holds_nothing(tmp_path):
    with pytest.raises(DataError, match="no task data folder"):
        load_tasks(["arc_easy"], tmp_path / "none")
    with pytest.raises(DataError, match="holds no"):
        load_tasks(["arc_easy"], tmp_path)


class Manager:
    """The harness's task manager, without the seconds that its index takes."""

    all_tasks = ("hellaswag", "arc_easy", "arc_challenge", "sciq")

    def load(self, names):
        raise ConnectionError(f"Couldn't reach '{names[0]}' on the Hub (offline mode is enabled).\nMore.")


def test_names_of_the_harness_are_checked(monkeypatch):
    monkeypatch.setattr("lm_eval.tasks.TaskManager", Manager)
    with pytest.raises(DataError, match=r"no task 'hellaswg'\. Did you mean 'hellaswag'"):
        load_tasks(["hellaswg"])
    with pytest.raises(DataError, match=r"data of task 'sciq' could not be loaded .*go online once, or give files"):
        load_tasks(["sciq"])


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(DynadepthError, match=r"pip install 'dynadepth\[eval\]'"):
        load_tasks(["questions"])
