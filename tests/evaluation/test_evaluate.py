"""`evaluate`: the shape of the JSON, and what the dense comparison is made of."""

import json

import pytest
from eval_models import route_by_content

from dynadepth import StaticConfig, attach, disabled, recording
from dynadepth.errors import ConfigError, DataError
from dynadepth.evaluation import evaluate, paired_bootstrap, perplexity
from dynadepth.evaluation.lm_eval import DynadepthLM
from dynadepth.evaluation.tasks import load_tasks, run_tasks

KEYS = {"tasks", "average", "perplexity", "dense", "kl", "agreement", "keep_ratio", "depth", "flops_share",
        "flops_share_target", "kv_share"}  # fmt: skip
TASK_KEYS = {"metric", "acc", "acc_norm", "perplexity", "stderr", "n"}


@pytest.fixture
def folder(tmp_path):
    rows = [
        {"id": str(i), "query": f"What is {i} + {i}?", "choices": [str(2 * i), str(3 * i + 1), "a lot"], "gold": 0}
        for i in range(12)
    ]
    for name in ("arc_easy", "sums"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [{"id": str(i), "context": f"{i} and {i} make", "continuation": str(2 * i)} for i in range(6)]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in words))
    (tmp_path / "text.txt").write_text("One and one are two, and two and two are four. " * 60)
    return tmp_path


def test_everything_at_once(routed, tokenizer, folder):
    text = str(folder / "text.txt")
    lines = []
    with pytest.warns(UserWarning, match="windows of 512 tokens"):
        found = evaluate(
            routed,
            tokenizer,
            tasks=["arc_easy", "sums"],
            task_data=folder,
            limit=10,
            perplexity=[text],
            compare_dense=True,
            batch_size=4,
            max_windows=2,
            progress=lines.append,
        )
    assert json.loads(json.dumps(found)) == found
    assert set(found) == KEYS
    assert set(found["tasks"]["arc_easy"]) == TASK_KEYS | {"diff_vs_dense", "acc_diff_vs_dense"}
    assert set(found["dense"]) == {"tasks", "average", "perplexity"}
    assert set(found["dense"]["tasks"]["sums"]) == TASK_KEYS
    assert set(found["perplexity"][text]) == {"ppl", "nll", "n_tokens"}
    assert found["dense"]["perplexity"][text]["n_tokens"] == found["perplexity"][text]["n_tokens"] == 2 * 384
    assert found["average"] == (found["tasks"]["arc_easy"]["acc_norm"] + found["tasks"]["sums"]["acc"]) / 2
    assert found["kl"] > 0
    assert 0 <= found["agreement"] < 1
    assert 0 < found["keep_ratio"]["routed"] < found["keep_ratio"]["all"] < 1
    assert 0 < found["flops_share_target"] < found["flops_share"] < 1
    assert found["kv_share"] == pytest.approx(found["keep_ratio"]["all"])
    assert f"{text}: 2 of 2 windows" in lines
    assert any(line.startswith("arc_easy, sums: ") for line in lines)


def test_the_last_quarter_of_windows_of_the_length_in_a_texts_name_is_scored(routed, tokenizer, folder):
    text = f"{folder / 'text.txt'}@256"
    found = evaluate(routed, tokenizer, perplexity=[text], max_windows=3)["perplexity"][text]
    by_hand = perplexity(routed, tokenizer, (folder / "text.txt").read_text(), window=256, prompt=192, max_windows=3)
    assert found == by_hand.as_dict()
    assert found["n_tokens"] == 3 * 64
    with pytest.raises(ConfigError, match="windows of 4 tokens are too short"):
        evaluate(routed, tokenizer, perplexity=[f"{folder / 'text.txt'}@4"])


def test_the_dense_block_is_the_bare_model(llama, tokenizer, folder):
    options = {"tasks": ["sums", "words"], "task_data": folder, "perplexity": [folder / "text.txt"], "max_windows": 2}
    with pytest.warns(UserWarning, match="windows of 512 tokens"):
        bare = evaluate(llama, tokenizer, **options)
    assert bare["keep_ratio"] is bare["flops_share"] is bare["kv_share"] is bare["dense"] is bare["kl"] is None
    with pytest.warns(UserWarning, match="windows of 512 tokens"):
        found = evaluate(route_by_content(llama), tokenizer, **options, compare_dense=True)
    assert found["dense"]["tasks"]["sums"] == bare["tasks"]["sums"]
    assert found["dense"]["tasks"]["words"] == pytest.approx(bare["tasks"]["words"])
    assert found["tasks"]["words"]["perplexity"] != pytest.approx(bare["tasks"]["words"]["perplexity"], rel=0.01)
    (dense,), (alone,) = found["dense"]["perplexity"].values(), bare["perplexity"].values()
    assert dense == pytest.approx(alone)
    assert found["perplexity"] != bare["perplexity"]


def test_a_bare_model_is_its_own_dense_model(llama, tokenizer, folder):
    found = evaluate(llama, tokenizer, tasks=["sums"], task_data=folder, compare_dense=True)
    assert found["dense"]["tasks"]["sums"].items() <= found["tasks"]["sums"].items()
    assert found["tasks"]["sums"]["diff_vs_dense"] == [0.0, 0.0]
    assert found["kl"] is None, "no text was given"


def test_differences_are_paired_by_row(routed, tokenizer, folder):
    names = ["sums", "arc_easy"]
    found = evaluate(routed, tokenizer, tasks=names, task_data=folder, compare_dense=True, seed=5)
    lm, tasks = DynadepthLM(routed, tokenizer=tokenizer), load_tasks(names, folder)
    own = run_tasks(lm, tasks)
    with disabled(routed):
        dense = run_tasks(lm, tasks)
    for name in names:
        scored, before, after = found["tasks"][name], dense[name], own[name]
        assert scored["diff_vs_dense"] == list(paired_bootstrap(after.rows, before.rows, seed=5))
        assert scored["acc_diff_vs_dense"] == list(paired_bootstrap(after.acc_rows, before.acc_rows, seed=5))
        assert sum(after.acc_rows) / after.n == after.acc
    assert own["arc_easy"].rows != own["arc_easy"].acc_rows, "this test needs rows on which the two metrics differ"


def test_a_static_route_has_the_ratio_that_it_asks_for(llama, tokenizer, folder):
    attach(llama, StaticConfig(target="attention", skip=(1,)))
    found = evaluate(llama, tokenizer, tasks=["sums"], task_data=folder, limit=3, compare_dense=True)
    assert found["keep_ratio"] == {"routed": 0.0, "all": 0.75}
    assert found["kv_share"] == 0.75


def test_keep_ratio_counts_each_prompt_once_and_no_dense_forward(routed, tokenizer, folder):
    with recording() as record:
        found = evaluate(routed, tokenizer, tasks=["sums"], task_data=folder, limit=5, compare_dense=True)
    assert len(record.sequences) == 5
    assert found["keep_ratio"]["routed"] == pytest.approx(record.keep_ratio("prefill").routed)


@pytest.mark.parametrize("granularity", ["sequence", "token"])
def test_batches_change_nothing(make_routed, tokenizer, folder, granularity):
    model = make_routed(granularity)
    one, many = (evaluate(model, tokenizer, tasks=["arc_easy"], task_data=folder, batch_size=size) for size in (1, 8))
    assert one["tasks"] == many["tasks"]
    assert one["keep_ratio"] == pytest.approx(many["keep_ratio"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ConfigError, "nothing to score"),
        ({"tasks": ["sums"], "limit": 0}, ConfigError, "limit must be at least 1"),
        ({"tasks": ["summs"]}, DataError, "Did you mean 'sums'"),
        ({"perplexity": ["none.txt"]}, DataError, r"no file none\.txt"),
    ],
)
def test_bad_input_is_refused_before_work(llama, tokenizer, folder, options, error, message):
    with pytest.raises(error, match=message):
        evaluate(llama, tokenizer, task_data=folder, **options)
