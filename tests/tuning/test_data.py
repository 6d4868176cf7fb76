"""Tuning data: every set of columns becomes the right ids, every bad file one clear sentence; batches are algebra."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dynadepth.errors import ConfigError, DataError
from dynadepth.tuning.data import IGNORED, Collator, Example, load_examples

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}</s>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
THINKING_TEMPLATE = CHAT_TEMPLATE.replace("<assistant>{% endif %}", "<assistant>(thinks){% endif %}")


def make_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """One token a character, and one merge: `ab`."""
    characters = [*map(chr, range(32, 127)), "\n", "é"]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *characters, "ab"])}
    core = Tokenizer(models.BPE(vocabulary, [("a", "b")], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64, **options
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="module")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(chat_template=CHAT_TEMPLATE)


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def parts(tokenizer: PreTrainedTokenizerFast, example: Example) -> tuple[str, str]:
    """The text of the prompt and of what follows."""
    ids, length = example.input_ids, example.prompt_length
    return tokenizer.decode(ids[:length]), tokenizer.decode(ids[length:])


USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
ALPACA = "Below is an instruction that describes a task"
WRITE = "Write a response that appropriately completes the request.\n\n### Instruction:\n"


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"prompt": "2+2", "completion": "=4"}, "2+2", "=4</s>"),
        ({"prompt": "", "completion": "all"}, "", "all</s>"),
        ({"question": "Why?", "answer": "So."}, "Question: Why?\nAnswer:", " So.</s>"),
        (
            {"instruction": "Add.", "input": "1, 2", "output": "3"},
            f"{ALPACA}, paired with an input that provides further context. {WRITE}Add."
            "\n\n### Input:\n1, 2\n\n### Response:\n",
            "3</s>",
        ),
        ({"instruction": "Go.", "input": "", "output": "No"}, f"{ALPACA}. {WRITE}Go.\n\n### Response:\n", "No</s>"),
        ({"instruction": "Go.", "output": "No"}, f"{ALPACA}. {WRITE}Go.\n\n### Response:\n", "No</s>"),
        ({"text": "Once upon"}, "", "Once upon"),
        ({"messages": [USER, ANSWER]}, "user: Hi\nassistant:", " Yo</s>"),
        ({"messages": [USER, ANSWER, USER]}, "user: Hi\nassistant:", " Yo</s>"),
    ],
)
def test_columns(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], prompt: str, answer: str
) -> None:
    (example,) = load_examples(write(tmp_path / "x.jsonl", {"id": 7, **row}), tokenizer)
    assert parts(tokenizer, example) == (prompt, answer)


def test_order_of_formats(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    row = {
        "text": "t",
        "question": "q",
        "answer": "a",
        "instruction": "i",
        "output": "o",
        "prompt": "p",
        "completion": "c",
    }
    (example,) = load_examples(write(tmp_path / "x.jsonl", row), tokenizer)
    assert parts(tokenizer, example) == ("p", "c</s>")


def test_chat_template(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "x.jsonl", {"messages": [USER, ANSWER, USER, {**ANSWER, "content": "Bye"}]})
    (example,) = load_examples(path, chat_tokenizer)
    assert parts(chat_tokenizer, example) == ("<user>Hi</s>\n<assistant>Yo</s>\n<user>Hi</s>\n<assistant>", "Bye</s>")
    assert example.input_ids.count(chat_tokenizer.eos_token_id) == 4  # the template's own ends, none added


def test_chat_template_that_writes_past_turns_differently(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template=THINKING_TEMPLATE)
    (example,) = load_examples(write(tmp_path / "x.jsonl", {"messages": [USER, ANSWER]}), tokenizer)
    assert parts(tokenizer, example) == ("<user>Hi</s>\n<assistant>(thinks)", "Yo</s>")


def test_prompt_ids_are_those_of_the_prompt_alone(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (example,) = load_examples(write(tmp_path / "x.jsonl", {"prompt": "xa", "completion": "by"}), tokenizer)
    assert example.prompt_length == 2
    assert tokenizer.convert_ids_to_tokens(example.input_ids) == ["x", "a", "b", "y", "</s>"]  # not "ab"


def test_runs_over(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "x.jsonl", {"prompt": "1234", "completion": "5" * 100})
    (example,) = load_examples(path, tokenizer, max_length=10)
    assert parts(tokenizer, example) == ("1234", "555555")  # no end of sequence behind a cut answer
    (example,) = load_examples(write(tmp_path / "x.jsonl", {"text": "ab" * 10_000}), tokenizer, max_length=10)
    assert example == Example([tokenizer.convert_tokens_to_ids("ab")] * 10, 0)


def test_long_prompts_are_dropped_and_replaced(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "p" * n, "completion": c} for n, c in ((10, "x"), (3, " "), (9, "y"), (1, "z"), (50, "z"))]
    path = write(tmp_path / "x.jsonl", *rows)
    with pytest.warns(
        UserWarning,
        match=r"2 of 4 samples of .*x.jsonl were dropped: 1 whose .* max_length=10 tokens or more and 1 with nothing",
    ):
        examples = load_examples(path, tokenizer, max_length=10, max_samples=2, shuffle=False)
    assert [parts(tokenizer, example) for example in examples] == [("p" * 9, "y"), ("p", "z</s>")]


def test_order_and_max_samples(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "x.jsonl", *({"text": f"text {i}"} for i in range(40)))

    def load(**options: Any) -> list[str]:
        return [parts(tokenizer, example)[1] for example in load_examples(path, tokenizer, **options)]

    assert load(shuffle=False, max_samples=3) == ["text 0", "text 1", "text 2"]
    assert load(seed=1) == load(seed=1) != load(seed=2)
    assert sorted(load(seed=1)) == sorted(load(shuffle=False))
    assert load(seed=1, max_samples=5) == load(seed=1)[:5]


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl"])
def test_gzip_is_known_by_name_and_content(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress('\ufeff{"text": "café"}\r\n\n{"text": "a b"}'.encode()))
    examples = load_examples(tmp_path / name, tokenizer, shuffle=False)
    assert [parts(tokenizer, example)[1] for example in examples] == ["café", "a b"]


PACKED = gzip.compress(b'{"text": "some words to pack"}\n' * 50, mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b"", "x.jsonl is empty"),
        ("x.jsonl", b" \n\n", "x.jsonl is empty"),
        ("x.jsonl", b'{"text": "a"}\n\n{"text": \n', r"not JSON at line 3 \(Expecting value"),
        ("x.jsonl", b'[{"text": "a"},\n', "not JSON at line 1"),
        ("x.jsonl", b'{"text": "a"}\n["b"]\n', "no JSON object at line 2 but"),
        ("x.jsonl", b'{"n": ' + b"1" * 5000 + b"}", "not JSON at line 1"),
        ("x.jsonl", b"[" * 100_000, "not JSON at line 1"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', r"not UTF-8 at line 2 \(byte 0xe9\)"),
        ("x.jsonl", '{"text": "a"}'.encode("utf-16"), "not UTF-8 at line 1"),
        ("x.jsonl.gz", b'{"text": "a"}\n', "x.jsonl.gz cannot be read beyond line 0: Not a gzipped file"),
        ("x.jsonl.gz", PACKED[:-12], "x.jsonl.gz cannot be read beyond line"),
        ("x.jsonl.gz", PACKED[:30] + b"\0\0\0\0" + PACKED[34:], "x.jsonl.gz cannot be read beyond line"),
        (
            "x.jsonl",
            b'{"id": 1, "query": "q"}\n',
            r"none of the known sets of columns \(messages; prompt \+ completion; instruction \+ output; "
            r"question \+ answer; text\): its columns are 'id', 'query'",
        ),
        (
            "x.jsonl",
            b'{"question": "q", "answer": "a"}\n\n{"question": "q", "text": "t"}\n',
            r"Line 3 of .*x.jsonl lacks 'answer': the file is read as question \+ answer",
        ),
        (
            "x.jsonl",
            b'{"text": "a b"}\n{"text": 5}\n',
            "Line 2 of .* cannot be read as text: 'text' must be text, it is int",
        ),
        ("x.jsonl", b'{"text": "a \\ud800"}\n', "half of a character"),
        ("x.jsonl", b'{"messages": "hi"}\n', "Line 1 of .*: 'messages' must be a list of objects"),
        ("x.jsonl", b'{"messages": [{"role": "user", "content": null}]}\n', "'content' must be text, it is NoneType"),
        ("x.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}\n', "no turn with the role 'assistant'"),
        ("x.jsonl", b'{"text": "a"}\n{"text": " "}\n', "None of the 2 samples of .* has anything to learn from"),
        (
            "x.jsonl",
            b'{"prompt": "%s", "completion": "a"}\n{"prompt": "%s", "completion": "a"}\n' % (b"x" * 80, b"x" * 70),
            "No sample of .* fits into max_length=32: the shortest prompt takes 70 tokens",
        ),
    ],
)
def test_bad_files(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_examples(tmp_path / name, tokenizer, max_length=32, shuffle=False)
    assert "\n" not in str(caught.value)


def test_template_refuses(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "x.jsonl", {"messages": [{"role": "system", "content": "s"}, USER, ANSWER]})
    with pytest.raises(DataError, match=r"Line 1 of .*: the chat template refuses it \(no system turns\)"):
        load_examples(path, chat_tokenizer)


def test_missing_file(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    write(tmp_path / "alpaca.jsonl", {"text": "a b"})
    with pytest.raises(DataError, match=r"no file .*alpacca.jsonl. Did you mean 'alpaca.jsonl'\?"):
        load_examples(str(tmp_path / "alpacca.jsonl"), tokenizer)
    with pytest.raises(DataError, match=r"The folder .*nowhere does not exist"):
        load_examples(tmp_path / "nowhere" / "alpaca.jsonl", tokenizer)


def test_arguments_out_of_range(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "x.jsonl", {"text": "a b"})
    for options in ({"max_samples": 0}, {"max_length": 1}):
        with pytest.raises(ConfigError, match="nothing to tune on"):
            load_examples(path, tokenizer, **options)


def test_dataset_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl", *({"prompt": f"p{i}", "completion": "c"} for i in range(5)))
    examples = load_examples(tmp_path / "data", tokenizer, shuffle=False, max_samples=2)
    assert [parts(tokenizer, example) for example in examples] == [("p0", "c</s>"), ("p1", "c</s>")]


def test_dataset_out_of_reach(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "alpaca", {"text": "a b"})
    with pytest.raises(
        DataError, match=r"no file 'alpacca'. Did you mean 'alpaca'\? As a data set .* or 'self', which"
    ) as caught:
        load_examples("alpacca", tokenizer)
    assert "\n" not in str(caught.value)


# ---- batches

ids_of_rows = st.lists(st.integers(1, 300), min_size=1, max_size=70)


@st.composite
def an_example(draw: st.DrawFn) -> Example:
    ids = draw(ids_of_rows)
    return Example(ids, draw(st.integers(0, len(ids) - 1)))


batches = st.lists(an_example(), min_size=1, max_size=6)
quick = settings(deadline=None, max_examples=60)


@quick
@given(batches, st.sampled_from([1, 8, 64]), st.integers(0, 3))
def test_every_token_is_prompt_or_label(examples: list[Example], multiple: int, seed: int) -> None:
    batch = Collator(0, pad_to_multiple_of=multiple, seed=seed)(examples)
    attended, labelled, prompt = batch["attention_mask"].bool(), batch["labels"] != IGNORED, batch["prompt_mask"]
    assert torch.equal(prompt | labelled, attended)
    assert not (prompt & labelled).any()
    assert torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])
    everywhere = Collator(0, pad_to_multiple_of=multiple, seed=seed, score_prompts=True)(examples)
    assert torch.equal(everywhere["labels"] != IGNORED, attended)
    assert torch.equal(everywhere["prompt_mask"], prompt)
    assert (batch["input_ids"][~attended] == 0).all()
    assert attended.sum(1).tolist() == [len(example.input_ids) for example in examples]
    assert (attended.long().diff(dim=1) <= 0).all()  # padding on the right
    assert (prompt.long().diff(dim=1) <= 0).all()
    width = batch["input_ids"].shape[1]
    assert width % multiple == 0
    assert width - max(len(example.input_ids) for example in examples) < multiple
    assert batch["prompt_mask"].dtype == torch.bool
    assert {batch[name].dtype for name in ("input_ids", "attention_mask", "labels")} == {torch.int64}


@quick
@given(batches)
def test_prompt_lengths(examples: list[Example]) -> None:
    lengths = Collator(0)(examples)["prompt_mask"].sum(1).tolist()
    for example, length in zip(examples, lengths, strict=True):
        total = len(example.input_ids)
        if example.prompt_length:
            assert length == example.prompt_length
        else:
            assert length >= 1
            assert total // 8 <= length
            assert length <= max(1, 3 * total / 4)


@quick
@given(batches, st.randoms(use_true_random=False))
def test_the_batch_never_matters(examples: list[Example], rng: Any) -> None:
    collate = Collator(0, seed=5)
    together = collate(examples)
    order = rng.sample(range(len(examples)), len(examples))
    shuffled = collate([examples[i] for i in order])
    for place, row in enumerate(order):
        alone = Collator(0, seed=5)([examples[row]])
        for name, tensor in alone.items():
            n = len(examples[row].input_ids)
            assert torch.equal(together[name][row, :n], tensor[0, :n])
            assert torch.equal(shuffled[name][place], together[name][row])


def test_prefixes_vary_with_content_and_seed() -> None:
    rng = random.Random(0)
    texts = [rng.choices(range(1000), k=100) for _ in range(100)]
    first, second = ([Collator(0, seed=seed).prefix_length(ids) for ids in texts] for seed in (0, 1))
    assert len(set(first)) > 30  # of 64
    assert first != second


def test_pad_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert Collator(tokenizer).pad_token_id == tokenizer.pad_token_id == 0
    unpadded = make_tokenizer()
    unpadded.pad_token = None
    assert Collator(unpadded).pad_token_id == unpadded.eos_token_id


@pytest.mark.model
def test_chat_of_the_embedded_model(tmp_path: Path, smollm2_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    (example,) = load_examples(write(tmp_path / "x.jsonl", {"messages": [USER, ANSWER]}), tokenizer)
    prompt, answer = parts(tokenizer, example)
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert answer == "Yo<|im_end|>"
