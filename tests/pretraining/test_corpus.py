"""Text as tokens: what is held out, what is refused, and that bytes are counted exactly."""

import gzip
import json
from dataclasses import replace

import pytest

from dynadepth import hub
from dynadepth.errors import DataError
from dynadepth.pretraining.corpus import prepare
from pretraining_runs import DENSE, write_text

BPE = replace(DENSE, tokenizer="bpe", vocab_size=300)


def table(path, rows):
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
    return path


@pytest.mark.parametrize("recipe", [DENSE, BPE], ids=["bytes", "bpe"])
def test_tokens_stand_for_the_bytes_of_the_text(tmp_path, recipe):
    text = "Été: 3 naïve\n\n  cafés — 漢字 🐟\n" * 20
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    held = write_text(tmp_path, 50, "held.txt")
    corpus = prepare(recipe, [tmp_path / "a.txt"], [held], tmp_path / "corpus")
    assert corpus.byte_lengths[corpus.train].sum() == len(text.encode())
    assert corpus.tokenizer.decode(corpus.train[:-1]) == text
    assert corpus.train[-1] == corpus.tokenizer.eos_token_id
    assert corpus.byte_lengths[corpus.valid].sum() == len(held.read_bytes())
    if recipe is DENSE:
        assert len(corpus.byte_lengths) == 257
        assert len(corpus.train) == len(text.encode()) + 1
    else:
        assert len(corpus.train) < len(text.encode())


def test_rows_marked_valid_are_held_out_and_ids_choose_among_them(tmp_path):
    rows = [
        {"id": f"b/{i}", "split": split, "text": f"{i}" * 40} for i, split in enumerate(["train", "valid", "valid"])
    ]
    path = table(tmp_path / "books.jsonl.gz", rows)
    corpus = prepare(DENSE, [path], [], tmp_path / "all")
    assert corpus.tokenizer.decode(corpus.train).startswith("0" * 40)
    assert (len(corpus.train), len(corpus.valid)) == (41, 82)
    corpus = prepare(replace(DENSE, validation_ids=("b/2",)), [path], [], tmp_path / "one")
    assert (len(corpus.train), len(corpus.valid)) == (41, 41)  # the other marked row is in neither
    assert corpus.tokenizer.decode(corpus.valid[:2]) == "22"
    with pytest.raises(DataError, match="validation_ids names 'b/9'"):
        prepare(replace(DENSE, validation_ids=("b/9",)), [path], [], tmp_path / "none")


def test_the_end_of_the_text_is_held_out_where_nothing_says_otherwise(tmp_path):
    path = write_text(tmp_path, 600)
    text = path.read_text()
    corpus = prepare(replace(DENSE, holdout=0.1), [path], [], tmp_path / "corpus")
    held = corpus.tokenizer.decode(corpus.valid[:-1])
    assert text.endswith(held)
    assert len(held) == round(0.1 * len(text))
    assert corpus.tokenizer.decode(corpus.train[:-1]) == text[: -len(held)]


def test_what_was_made_is_used_again_by_the_same_settings_and_files_alone(tmp_path):
    path = write_text(tmp_path)
    told = []
    prepare(DENSE, [path], [], tmp_path / "corpus", told.append)
    assert told
    told.clear()
    prepare(replace(DENSE, learning_rate=0.5), [path], [], tmp_path / "corpus", told.append)
    assert not told
    prepare(DENSE, [write_text(tmp_path, 700)], [], tmp_path / "corpus", told.append)
    assert told


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt is empty"),
        ("a.txt", b" \n \n", r"a\.txt is empty"),
        ("a.jsonl", b'{"text": "  "}\n', r"a\.jsonl is empty"),
        ("a.txt", b"ab\x00cd", r"a\.txt is binary \(it holds a zero byte\)"),
        ("a.txt", b"\xff\xfe\x00 \x81", r"a\.txt is not UTF-8 at line 1"),
        ("a.jsonl", b'{"body": "x"}\n', r"Row 1 of .*a\.jsonl has no text in 'text'; its columns are 'body'"),
        ("a.jsonl", b"plain\n", r"a\.jsonl is not JSON at line 1"),
    ],
)
def test_files_without_text_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare(DENSE, [tmp_path / name], [], tmp_path / "corpus")


def test_missing_and_too_small_texts_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"There is no file .*txet\.txt. Did you mean 'text\.txt'"):
        prepare(DENSE, [write_text(tmp_path).with_name("txet.txt")], [], tmp_path / "corpus")
    corpus = prepare(DENSE, [write_text(tmp_path, 10)], [], tmp_path / "corpus")
    with pytest.raises(DataError, match=r"has \d+ tokens, and one batch takes 64 \(4 sequences of 16\)"):
        corpus.check_size(16, 4)
    with pytest.raises(DataError, match=r"held-out text has \d tokens, less than one window of 16"):
        corpus.check_size(16, 1)


@pytest.mark.parametrize("copied", [False, True])
def test_text_that_is_trained_on_is_not_held_out(tmp_path, copied):
    text = write_text(tmp_path)
    valid = write_text(tmp_path, name="copy.txt") if copied else text
    with pytest.raises(DataError, match=f"--valid {valid.name} holds the same text as --data {text.name}"):
        prepare(DENSE, [text], [valid], tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


def test_a_start_by_an_embedded_name_reads_its_own_tokenizer(tmp_path, monkeypatch):
    asked = []

    def named(name):
        asked.append(name)
        return prepare(DENSE, [write_text(tmp_path, 80, "own.txt")], [], tmp_path / "own").tokenizer

    monkeypatch.setattr(hub, "load_tokenizer", named)
    corpus = prepare(
        replace(DENSE, model={}, start="smollm2-135m"), [write_text(tmp_path, 80)], [], tmp_path / "corpus"
    )
    assert set(asked) == {"smollm2-135m"}
    assert corpus.tokenizer.eos_token == "<|endoftext|>"


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": "0" * 400}).encode() + b"\n")
    corpus = prepare(DENSE, [path], [], tmp_path / "corpus")
    assert corpus.tokenizer.decode(corpus.train[:4]) == "0000"
