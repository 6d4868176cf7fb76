"""No file that an option names is replaced by the results of another."""

from __future__ import annotations

import json

import pytest


@pytest.mark.parametrize(
    "words",
    [
        ("search", "MODEL", "--data", "D", "--out", "routes.jsonl"),
        ("pretrain", "--recipe", "mod-small", "--data", "D", "--out", "out"),
        ("tune", "MODEL", "--routes", "D", "--out", "out"),
        ("generate", "MODEL", "--prompts", "D"),
    ],
)
def test_a_folder_is_no_file(refused, model_folder, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "D").mkdir()
    assert refused(*(model_folder if word == "MODEL" else word for word in words)) == "D is a folder: give a file."


@pytest.mark.parametrize(
    ("words", "option", "kept"),
    [
        (("search", "m", "--data", "D/a.jsonl", "--out", "D/r.jsonl", "--json", "D/r.jsonl"), "--out", None),
        (("search", "m", "--data", "D/a.jsonl", "--out", "D/r.jsonl", "--json", "D/a.jsonl"), "--data", "a.jsonl"),
        (("search", "m", "--data", "D/a.jsonl", "--out", "D/a.jsonl", "--resume"), "--data", "a.jsonl"),
        (("search", "m", "--data", "D/a.jsonl", "--out", "D/linked.jsonl", "--resume"), "--data", "linked.jsonl"),
        (("eval", "m", "--perplexity", "D/book.txt", "--json", "D/book.txt"), "--perplexity", "book.txt"),
        (("eval", "m", "--perplexity", "D/book.txt@4096", "--json", "D/book.txt"), "--perplexity", "book.txt"),
        (("eval", "m", "--tasks", "a", "--task-data", "D", "--json", "D/a.jsonl"), "--task-data", "a.jsonl"),
        (("eval", "m", "--routers", "D", "--json", "D/routing_config.json"), "--routers", "routing_config.json"),
        (("generate", "m", "--prompts", "D/book.txt", "--json", "D/book.txt"), "--prompts", "book.txt"),
        (("tune", "m", "--routes", "D/a.jsonl", "--out", "D/o", "--json", "D/a.jsonl"), "--routes", "a.jsonl"),
        (("tune", "m", "--data", "D/a.jsonl", "--out", "D/o", "--json", "D/a.jsonl"), "--data", "a.jsonl"),
        (("tune", "m", "--out", "D", "--json", "D/routing_config.json"), "--out", "routing_config.json"),
        (("bench", "m", "--compare", "static", "--json", "D/new.svg", "--figure", "D/new.svg"), "--json", None),
    ],
)
def test_results_replace_no_file_of_another_option(refused, tmp_path, words, option, kept):
    for name in ("a.jsonl", "book.txt", "routing_config.json"):
        (tmp_path / name).write_text("mine", encoding="utf-8")
    (tmp_path / "linked.jsonl").symlink_to(tmp_path / "a.jsonl")
    sentence = refused(*(str(tmp_path) if word == "D" else word.replace("D/", f"{tmp_path}/") for word in words))
    assert f"would replace a file of {option}: give another name" in sentence
    if kept:
        assert (tmp_path / kept).read_text(encoding="utf-8") == "mine"


def test_a_link_to_a_file_stays_one(answered, model_folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "kept.json"
    (tmp_path / "out.json").symlink_to(target)
    document, _ = answered("generate", model_folder, "--prompt", "why")
    assert (tmp_path / "out.json").is_symlink()
    assert json.loads(target.read_text(encoding="utf-8")) == document
