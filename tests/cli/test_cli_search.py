"""`dynadepth search` as a user meets it."""

import json

import pytest

from dynadepth import route_file

ROWS = [
    {"id": n, "query": f"why is the {word}", "choices": ["blue", "sky of", "Python"], "gold": n % 3}
    for n, word in enumerate(["sky", "object", "class", "function"])
]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "arc_tiny.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_search(answered, model_folder, data, tmp_path):
    out = tmp_path / "routes.jsonl.gz"
    words = ["search", model_folder, "--data", data, "--out", out, "--simulations", 10, "--margin", 0.0]
    document, result = answered(*words, "--limit", 3)
    file = route_file.read(out)
    assert len(file.prompts) == document["all"]["prompts"] == document["new_prompts"] == 3
    assert file.header.provenance["model"]["fingerprint"] == file.header.model["fingerprint"]
    assert document["all"]["times_fewer"] > 1
    assert "control" in result.stdout
    assert "arc_tiny" in result.stdout
    assert f"wrote {out}" in result.stderr
    document, _ = answered(*words, "--resume")
    assert (document["all"]["prompts"], document["new_prompts"]) == (4, 1)
    document, result = answered(*words, "--resume")
    assert (document["new_prompts"], document["prompts_per_minute"]) == (0, None)


def test_two_options_have_no_control(answered, model_folder, tmp_path):
    path = tmp_path / "two.jsonl"
    rows = [{**row, "choices": ["blue", "sky of"], "gold": n % 2} for n, row in enumerate(ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    document, result = answered(
        "search", model_folder, "--data", path, "--out", tmp_path / "r.jsonl", "--simulations", 3
    )
    wrong = document["all"]["dense_wrong"]
    assert wrong > 0, "this test needs a prompt that dense answers wrongly"
    assert f"{wrong} of them have no control, as between two options alone." in " ".join(result.stdout.split())


def test_nothing_kept_is_said(run, model_folder, data, tmp_path):
    result = run("search", model_folder, "--data", data, "--out", tmp_path / "routes.jsonl", "--margin", 1e6)
    assert result.exit_code == 0
    assert "no route was kept for any prompt" in result.stderr


def test_prompts_longer_than_the_context(answered, refused, model_folder, tmp_path):
    long = {"id": "long", "query": "why " * 9000, "choices": ["blue", "sky"], "gold": 0}
    mixed, alone = tmp_path / "arc_mixed.jsonl", tmp_path / "arc_long.jsonl"
    mixed.write_text("".join(json.dumps(row) + "\n" for row in (ROWS[0], long)))
    alone.write_text(json.dumps(long) + "\n")
    words = ["search", model_folder, "--simulations", 3, "--out"]
    document, result = answered(*words, tmp_path / "mixed.jsonl", "--data", mixed)
    assert document["all"]["prompts"] == 1
    assert "warning: 1 of 2 prompts of " in result.stderr
    assert "(the first is long, " in " ".join(result.stderr.split())
    said = refused(*words, tmp_path / "alone.jsonl", "--data", alone)
    assert "there is no prompt to search routes for" in said
    assert not (tmp_path / "alone.jsonl").exists()


def test_bad_input(refused, model_folder, data, tmp_path):
    out = tmp_path / "routes.jsonl.gz"

    def sentence(*words, data=data, out=out):
        return refused("search", model_folder, "--data", data, "--out", out, *words)

    assert "no route can meet the budget 0.1" in sentence("--budget", 0.1)
    assert "--budget must be above 0 and at most 2" in sentence("--budget", 3)
    assert "--simulations must be at least 1" in sentence("--simulations", 0)
    assert "--max-consecutive-skips must be at least 0" in sentence("--max-consecutive-skips", -1)
    assert "--repeats must be at least 0" in sentence("--repeats", -1)
    for margin in ("inf", "nan", "-1"):
        assert f"--margin must be a number of nats from 0, not {margin}" in sentence("--margin", margin)
    assert "--workers must be at least 1" in sentence("--workers", 0)
    assert "must end in .jsonl" in sentence(out=tmp_path / "routes.txt")
    assert "no folder" in sentence(out=tmp_path / "none" / "routes.jsonl")
    assert "There is no file" in sentence(data=tmp_path / "none.jsonl")
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"id": 1, "query": "why", "choices": ["a", "b"]}\n')
    assert "no answer at row 1" in sentence(data=bare)
    assert not out.exists()
    out.write_bytes(b"mine")
    assert "exists: give another name, or go on by --resume if it holds routes." in sentence()
    assert "no file of routes" in sentence("--resume")
    assert out.read_bytes() == b"mine"
