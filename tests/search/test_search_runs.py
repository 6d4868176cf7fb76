"""Whole searches: resumed after a kill with nothing lost or repeated, in several processes, one of which dies."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dynadepth import hub, route_file
from dynadepth.errors import ConfigError, DataError, SearchError
from dynadepth.search import pool, search_files
from dynadepth.search import run as search_run
from dynadepth.search.figures import figures_of, summarise
from dynadepth.search.run import header_for
from dynadepth.search.searcher import Searcher, SearchSettings
from dynadepth.search.tree import TreeSettings
from saved_model import save_model

SETTINGS = SearchSettings(TreeSettings(simulations=12), margin=0.01)
HERE = Path(__file__).resolve().parent


def load(folder):
    return hub.load_model(folder, dtype="float32")


def load_and_die_at(folder, flag, deaths, at_forward):
    """A model in whose first `deaths` processes the given forward of layer 0 ends the process."""
    model = load(folder)
    seen = [0]

    def hook(*_):
        seen[0] += 1
        marks = len(list(Path(flag).iterdir()))
        if seen[0] == at_forward and marks < deaths:
            (Path(flag) / str(os.getpid())).touch()
            os._exit(9)

    model.model.layers[0].register_forward_hook(hook)
    return model


def load_and_fail_at_rows(folder, rows):
    """A model whose layers fail once they are given so many prompts at once."""
    model = load(folder)
    embed = model.model.embed_tokens

    def hook(_, args):
        if args[0].shape[0] == rows and args[0].min() != args[0].max():
            raise RuntimeError(f"no memory for {rows} rows")

    embed.register_forward_pre_hook(hook)
    return model


def run(folder, files, out, settings=SETTINGS, **options):
    model, tokenizer = load(folder), hub.load_tokenizer(folder)
    return search_files(model, tokenizer, files, out, settings, **options)


def sorted_prompts(path):
    return sorted(route_file.read(path).prompts, key=lambda prompt: (prompt.source, prompt.id))


def same(one, other):
    """Equal but for the last bits of margins."""
    assert [prompt.id for prompt in one] == [prompt.id for prompt in other]
    for a, b in zip(one, other, strict=True):
        assert [route.counts for route in a.routes] == [route.counts for route in b.routes]
        assert a.executions == b.executions
        assert a.dense.margin == pytest.approx(b.dense.margin, abs=1e-4)


@pytest.fixture
def whole(model_folder, arc, tmp_path):
    """What an uninterrupted search finds."""
    run(model_folder, [arc(20)], tmp_path / "whole.jsonl.gz")
    return sorted_prompts(tmp_path / "whole.jsonl.gz")


def test_resumed_at_any_cut(model_folder, arc, tmp_path, whole):
    out = tmp_path / "cut.jsonl.gz"
    lines = []
    found = run(model_folder, [arc(20)], out, progress=lines.append)
    assert found.new == 20
    assert lines[-1].startswith("20 of 20 prompts, ")
    assert lines[-1].endswith(" 0:00 left")
    data = out.read_bytes()
    for size in (0, 40, len(data) // 3, 2 * len(data) // 3, len(data) - 2, len(data)):
        out.write_bytes(data[:size])
        before = route_file.recover(out)
        n = len(before.prompts) if before else 0
        out.write_bytes(data[:size])
        again = run(model_folder, [arc(20)], out, resume=True)
        assert again.new == 20 - n
        assert len(route_file.read(out).prompts) == 20
        same(sorted_prompts(out), whole)


def test_groups_stay_together_after_an_interruption(model_folder, arc, tmp_path, monkeypatch):
    """What is computed together moves leads in bfloat16: an interrupted search must not group anew."""
    searched, stops = [], [2]

    class Watching(Searcher):
        def search(self, questions):
            searched.append([question.id for question in questions])
            if len(searched) in stops:
                raise KeyboardInterrupt
            return super().search(questions)

    monkeypatch.setattr(search_run, "Searcher", Watching)
    out = tmp_path / "stopped.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(model_folder, [arc(20)], out)
    second = searched.pop()
    stops.clear()
    run(model_folder, [arc(20)], out, resume=True)
    assert searched[1] == second
    groups = list(searched)
    del searched[:]
    run(model_folder, [arc(20)], tmp_path / "whole.jsonl")
    assert searched == groups
    assert sorted(map(len, groups))[-1] > 1


def test_a_larger_limit_goes_on(model_folder, arc, tmp_path, whole):
    out = tmp_path / "few.jsonl"
    assert run(model_folder, [arc(20)], out, limit=5).new == 5
    assert run(model_folder, [arc(20)], out, limit=9, resume=True).new == 4
    same(sorted_prompts(out), [prompt for prompt in whole if int(prompt.id[1:]) < 9])


def test_killed_for_real(model_folder, arc, tmp_path, whole):
    """SIGKILL while it writes; then --resume."""
    out, data = tmp_path / "killed.jsonl.gz", arc(20)
    slow = (
        f"import sys, time; sys.path[:0] = [{str(HERE.parent)!r}, {str(HERE)!r}]\n"
        "import test_search_runs as t\n"
        f"t.run({model_folder!r}, [{str(data)!r}], {str(out)!r}, progress=lambda line: time.sleep(0.3))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", slow], env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        for _ in range(600):
            if out.exists() and out.read_bytes().count(b"\x1f\x8b\x08") > 8:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    n = len(route_file.recover(out).prompts)
    assert 0 < n < 20
    assert run(model_folder, [data], out, resume=True).new == 20 - n
    same(sorted_prompts(out), whole)


@pytest.mark.slow
def test_workers_and_one_that_dies(model_folder, arc, tmp_path, whole, monkeypatch):
    flag, said = tmp_path / "flag", []
    flag.mkdir()
    out = tmp_path / "workers.jsonl.gz"
    dying = functools.partial(load_and_die_at, model_folder, str(flag), 1, 3)
    run(model_folder, [arc(20)], out, workers=2, load=dying, warn=said.append)
    assert len(list(flag.iterdir())) == 1
    assert len(said) == 1
    assert "a worker died (exit code 9)" in said[0]
    same(sorted_prompts(out), whole)

    out = tmp_path / "hopeless.jsonl.gz"
    monkeypatch.setattr(pool, "MOST_DEATHS", 1)
    dying = functools.partial(load_and_die_at, model_folder, str(flag), 99, 3)
    with pytest.raises(SearchError, match=r"the last of 1 times: .*--resume and fewer --workers than 2"):
        run(model_folder, [arc(20)], out, workers=2, load=dying)
    assert route_file.read(out).prompts == []


@pytest.mark.slow
@pytest.mark.parametrize("first", [False, True], ids=["last", "first"])
def test_a_group_that_no_worker_survives_is_left_out(model_folder, arc, tmp_path, whole, first, monkeypatch):
    """One that raises, wherever it stands; the others are searched, and --resume gets it done."""
    workers, ordered = 2, search_run.grouped
    monkeypatch.setattr(search_run, "grouped", lambda *a: sorted(ordered(*a), key=len, reverse=not first))
    out, said = tmp_path / "left.jsonl.gz", []
    failing = functools.partial(load_and_fail_at_rows, model_folder, 4)
    assert run(model_folder, [arc(20)], out, workers=workers, load=failing, warn=said.append).left_out == 4
    assert len(said) == pool.MOST_DEATHS
    assert "a worker died (RuntimeError: no memory for 4 rows) at the 4 prompts from " in said[0]
    assert said[0].endswith("; they are searched again.")
    assert f"They are left out after 3 times: --resume and fewer --workers than {workers} may" in said[-1]
    assert len(route_file.read(out).prompts) == 16
    assert run(model_folder, [arc(20)], out, resume=True).new == 4
    same(sorted_prompts(out), whole)


@pytest.mark.parametrize("name", ["grown.jsonl.gz", "grown.jsonl"])
def test_other_data_joins_a_file(model_folder, arc, tmp_path, name):
    """The prompts of one file, then of two: as if both had been given at once."""
    out, both = tmp_path / name, tmp_path / "both.jsonl"
    first, second = arc(6), arc(5, "openbookqa_tiny.jsonl")
    run(model_folder, [first], out)
    before = route_file.read(out)
    said = []
    assert run(model_folder, [first, second], out, resume=True, warn=said.append).new == 5
    assert [line for line in said if "join" in line] == [
        f"{out} has no prompts of openbookqa_tiny yet: they join those of arc_tiny."
    ]
    run(model_folder, [first, second], both)
    found, at_once = route_file.read(out), route_file.read(both)
    assert found.prompts[:6] == before.prompts
    assert list(found.header.search["data"]) == ["arc_tiny", "openbookqa_tiny"]
    assert found.header.search == at_once.header.search
    same(sorted_prompts(out), sorted_prompts(both))
    assert run(model_folder, [second], out, resume=True).new == 0  # what was there stays
    assert route_file.read(out) == found


def test_two_searches_do_not_write_one_file(model_folder, arc, tmp_path):
    out = tmp_path / "routes.jsonl"
    run(model_folder, [arc(4)], out, limit=1)
    before = out.read_bytes()
    with search_run.alone(out), pytest.raises(ConfigError, match=r"another search is adding to .*routes\.jsonl: wait"):
        run(model_folder, [arc(4)], out, resume=True)
    assert out.read_bytes() == before
    assert run(model_folder, [arc(4)], out, resume=True).new == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["arc_tiny.jsonl", "routes.jsonl"]


def test_what_a_file_is_not_mixed_with(model_folder, arc, tmp_path):
    out, data = tmp_path / "routes.jsonl.gz", arc(4)
    run(model_folder, [data], out)
    before = out.read_bytes()
    with pytest.raises(ConfigError, match=r"exists: give another name, or go on by --resume"):
        run(model_folder, [data], out)
    other = SearchSettings(TreeSettings(simulations=13), margin=0.01)
    with pytest.raises(ConfigError, match=r"was begun with simulations = 12, not 13"):
        run(model_folder, [data], out, other, resume=True)
    data.write_text(data.read_text().replace("sky", "blue"))
    with pytest.raises(ConfigError, match=r"was begun with another file arc_tiny \(digest \w+, now \w+\)"):
        run(model_folder, [data], out, resume=True)
    deeper = str(save_model(tmp_path / "deep", num_hidden_layers=5))
    with pytest.raises(DataError, match=r"they have 4 layers and the model has 5"):
        run(deeper, [data], out, resume=True)
    with pytest.raises(DataError, match=r"two data files have the same name .* Rename one\."):
        run(model_folder, [data, tmp_path / "arc_tiny.jsonl.gz"], tmp_path / "new.jsonl")
    assert out.read_bytes() == before


def test_figures(model_folder, arc, tmp_path):
    out = tmp_path / "routes.jsonl"
    found = run(model_folder, [arc(12), arc(7, "openbookqa_tiny.jsonl")], out)
    summary = summarise(route_file.read(out))
    assert set(summary["sources"]) == {"arc_tiny", "openbookqa_tiny"}
    all_ = summary["all"]
    assert all_["prompts"] == found.new == 19
    right = [p.dense.correct for p in found.file.prompts]
    assert all_["dense"] == pytest.approx(sum(right) / 19)
    assert all_["oracle"] >= all_["dense"]
    assert all_["dense_wrong"] == 19 - sum(right)
    assert all_["times_fewer"] == pytest.approx(all_["naive_executions"] / all_["executions"])
    assert all_["times_fewer_apart"] > all_["times_fewer"] > 1.2
    assert all_["control_routes"] == sum(len(prompt.control_routes) for prompt in found.file.prompts) > 0
    assert sum(all_["actions"].values()) == 4 * sum(bool(prompt.routes) for prompt in found.file.prompts)
    curve = [(all_["corrected"], all_["control_corrected"])]
    curve += [(row["corrected"], row["control_corrected"]) for row in all_["by_margin"]]
    assert len(curve) == 4
    assert curve == sorted(curve, reverse=True)
    empty = figures_of([], 4, 0.1)
    assert (empty["oracle"], empty["times_fewer"], empty["prompts"]) == (None, None, 0)


def test_the_control_counts_by_the_same_margin(model_folder, arc, tmp_path):
    found = run(model_folder, [arc(12)], tmp_path / "routes.jsonl")
    values = sorted(prompt.control for prompt in found.file.prompts)
    for margin in (0.0, 0.01, 1e9):
        share = figures_of(found.file.prompts, 4, margin)["control"]
        assert share == pytest.approx(sum(value > 0 and value >= margin for value in values) / 12)


def test_the_header_says_what_was_searched(model_folder):
    header = header_for(load(model_folder), SETTINGS, {"arc": "0123"}, {"seed": 0})
    assert header.search["simulations"] == 12
    assert header.search["exploration"] == 1.8
    assert header.search["data"] == {"arc": "0123"}
    assert header.search["dtype"] == "float32"
    assert header.model["num_hidden_layers"] == header.n_layers == 4
