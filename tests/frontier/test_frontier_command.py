"""`dynadepth frontier` and `report` as commands: the table, the files, and one sentence for every mistake."""

from __future__ import annotations

import json

import pytest

from dynadepth.errors import BudgetError, ConfigError
from dynadepth.frontier import rows
from dynadepth.frontier import run as running
from dynadepth.frontier.settings import parse_budgets, parse_data


@pytest.fixture
def words(model_folder, data, tmp_path):
    """A whole command, without its `--methods` and `--budgets`."""
    return [
        "frontier", model_folder, "--out", tmp_path / "out", "--perplexity", data["perplexity"][0], "--max-windows", 1,
        "--data", data["data"], "--max-samples", 12, "--no-bench",
    ]  # fmt: skip


def test_the_command_and_its_page(run, words, tmp_path):
    result = run(*words, "--methods", "static,random", "--budgets", "0.75,0.5")
    assert result.exit_code == 0, result.output
    for part in ("static-", "quality", "perplexity", "75.0 %"):
        assert (part in result.stdout) == (part != "static-")
    assert "[2/5] static@0.75: perplexity" in result.stderr
    assert "next: dynadepth report" in result.stderr
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["cells", "frontier.json", "quality-keep.png", "quality-keep.svg", "scores", "table.md"]
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert lines[0].startswith("| method | budget | executed | FLOPs | of target | KV | perplexity |")
    assert [row.split(" | ")[:2] for row in lines[2:]] == [
        ["| dense", "-"], ["| static", "0.75"], ["| static", "0.5"], ["| random", "0.75"], ["| random", "0.5"],
    ]  # fmt: skip
    page = run("report", tmp_path / "out")
    assert page.exit_code == 0
    assert page.stderr == ""
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000


def test_ctrl_c_says_what_is_kept(run, words, monkeypatch):
    monkeypatch.setattr(running, "_measure", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    result = run(*words, "--methods", "static")
    assert result.exit_code == 130
    assert "the same command goes on from there" in result.stderr


def test_without_methods_one_whose_data_cannot_be_had_is_left_out(run, refused, words, monkeypatch):
    """The published recipe's data is on the hub, and tests are offline."""
    monkeypatch.setattr(rows, "ROWS", tuple(r for r in rows.ROWS if r.name in ("dense", "random", "mindskip-paper")))
    at = words.index("--data")
    words = [*words[:at], *words[at + 2 :], "--budgets", "0.5"]
    assert "--data mindskip-paper=FILE" in refused(*words, "--methods", "random,mindskip-paper")
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert "mindskip-paper is left out: " in " ".join(result.stderr.split())
    assert "[2/2] random@0.5: perplexity" in result.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--methods", "statik"], "Did you mean 'static'"),
        (["--methods", "static", "--budgets", "1.2"], "above 0 and at most 1, not 1.2"),
        (["--methods", "static", "--budgets", "0.5,half"], "not '0.5,half'"),
        (["--methods", "static-deepest", "--budgets", "0.1"], "cannot be reached by static-deepest"),
        (["--methods", "static", "--data", "self"], "two sources for every method"),
        (["--methods", "static", "--perplexity", "none.txt"], "no file none.txt"),
        (
            ["--methods", "random-per-input", "--data", "random-per-input=a"],
            "random-per-input reads no data of its own.",
        ),
        (["--methods", "default-static", "--data", "default-static=a"], "by that of default, --data default=FILE"),
        (["--methods", "static", "--context", "0"], "--context must be at least 1"),
        (["--methods", "static", "--tasks", "beta", "--task-data", "none"], "no task data folder none"),
    ],
)
def test_bad_options(refused, words, options, said):
    assert said in refused(*words, *options)


def test_another_folder_or_the_same_settings(run, refused, words, tmp_path):
    assert run(*words, "--methods", "random", "--budgets", "0.5").exit_code == 0
    sentence = refused(*words, "--methods", "random", "--budgets", "0.5", "--seed", 1)
    assert "made with other settings (seed is 0 there and 1 here)" in sentence
    cell = json.loads((tmp_path / "out" / "cells" / "random@0.5.json").read_text())
    assert cell["settings"]["texts"].keys() == {"text.txt"}


def test_data_of_one_method():
    assert parse_data(["self", "default=a.jsonl"], ["default"]) == ("self", {"default": "a.jsonl"})
    assert parse_data(["a=b.jsonl"], ["default"]) == ("a=b.jsonl", {})
    assert parse_data([], []) == (None, {})
    with pytest.raises(ConfigError, match="two sources"):
        parse_data(["a", "b"], [])


def test_budgets_are_read_in_their_order():
    assert parse_budgets("0.5,0.75,0.5") == (0.5, 0.75)
    assert parse_budgets("0.67,0.6700001,0.66666667") == (0.67, 0.666667), "cells are named by six digits"
    with pytest.raises(BudgetError, match="keeps its own budget by itself"):
        parse_budgets("0.5,own")
