"""Files of routes: what is written is read, a kill at any byte costs one prompt at most, foreign files are refused."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from dynadepth.errors import DataError
from dynadepth.route_file import (
    Answer,
    Header,
    PromptRoutes,
    Route,
    RouteFile,
    RouteWriter,
    read,
    recover,
    write_header,
)

IDENTITY = {
    "name": "tiny",
    "model_type": "llama",
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "vocab_size": 11,
    "fingerprint": "abc",
}
HEADER = Header(IDENTITY, 3, {"simulations": 50}, {"seed": 0})


def prompt(number: int) -> PromptRoutes:
    return PromptRoutes(
        id=f"arc/{number}",
        source="arc",
        prompt="Question: why?\nAnswer:",
        options=(" é", " no"),
        gold=0,
        completion=" é",
        dense=Answer(False, -0.1),
        routes=(Route(True, 0.3, (1, 0, 2)), Route(True, 0.2, (1, 1, 1))),
        control=1.5,
        executions=40,
        naive_executions=100,
        apart_executions=150,
        control_routes=(Route(False, 1.5, (0, 2, 1)),),
        tried=(Route(True, 0.3, (1, 0, 2)), Route(False, -0.7, (0, 1, 1)), Route(True, 0.2, (1, 1, 1))),
    )


SHORT = replace(prompt(9), options=None, gold=None, routes=(), control=None, control_routes=())


@pytest.fixture(params=["routes.jsonl", "routes.jsonl.gz"])
def path(request, tmp_path):
    return tmp_path / request.param


def write(path, *prompts):
    with RouteWriter(path) as writer:
        writer.start(HEADER)
        writer.append(prompts)
    return path


def lines(path):
    opened = gzip.open if path.name.endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8") as file:
        return file.read().splitlines()


def rewrite(path, changed):
    opened = gzip.open if path.name.endswith(".gz") else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.write("".join(line + "\n" for line in changed))


def test_what_is_written_is_read(path):
    found = read(write(path, prompt(0), SHORT), IDENTITY)
    assert (found.header, found.prompts) == (HEADER, [prompt(0), SHORT])
    document = json.loads(lines(path)[1])
    assert document["tried"][1] == ["011", -0.7]
    assert document["routes"][0] == {"counts": [1, 0, 2], "correct": True, "margin": 0.3, "layers": 3}
    assert json.loads(lines(path)[0])["kind"] == "dynadepth-routes"


def test_a_prompt_counts_once(path):
    with RouteWriter(path) as writer:
        writer.start(HEADER)
        writer.append([prompt(1), prompt(2), replace(prompt(1), completion="another")])
    assert read(path).prompts == [prompt(1), prompt(2)]


def test_lines_are_on_the_disk_one_by_one(path):
    with RouteWriter(path) as writer:
        writer.start(HEADER)
        assert read(path).prompts == []
        writer.append([prompt(0)])
        assert read(path).prompts == [prompt(0)]


def test_a_kill_at_any_byte_costs_the_last_line_alone(path):
    one = write(path, prompt(0)).read_bytes()
    path.unlink()
    header = write(path).read_bytes()
    path.unlink()
    whole = write(path, prompt(0), prompt(1)).read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        found = recover(path)
        kept = [length for length in (len(header), len(one), len(whole)) if length <= size]
        if not kept:
            assert found is None
            assert path.read_bytes() == b""
            continue
        assert path.read_bytes() == whole[: kept[-1]]
        assert found.prompts == [prompt(0), prompt(1)][: len(kept) - 1]
    path.write_bytes(whole[:-3])
    recover(path)
    with RouteWriter(path) as writer:
        writer.append([prompt(2)])
    assert read(path).prompts == [prompt(0), prompt(2)]


def test_a_reader_refuses_a_line_that_was_cut_off(path):
    write(path, prompt(0), prompt(1))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"damaged at line 3 .*--resume"):
        read(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("name", "other", None),
        ("fingerprint", "xyz", r"'tiny', not for 'tiny': fingerprint is 'abc' there and 'xyz' here"),
        ("num_hidden_layers", 4, "they have 3 layers and the model has 4"),
        ("hidden_size", 9, "hidden_size is 8 there and 9 here"),
    ],
)
def test_another_model_or_depth_is_refused(path, key, value, message):
    write(path, prompt(0))
    if message is None:  # the same weights from another folder
        read(path, {**IDENTITY, key: value})
        return
    with pytest.raises(DataError, match=message):
        read(path, {**IDENTITY, key: value})


def test_a_newer_format_is_refused(path):
    header, *rest = lines(write(path, prompt(0)))
    rewrite(path, [json.dumps({**json.loads(header), "format": 3}), *rest])
    with pytest.raises(DataError, match=r"format 3, this version reads up to 2: upgrade"):
        read(path)


def test_an_older_format_is_refused(path):
    header, *rest = lines(write(path, prompt(0)))
    rewrite(path, [json.dumps({**json.loads(header), "format": 1}), *rest])
    with pytest.raises(DataError, match=r"format 1, of an older version, .*: search again into another file"):
        read(path)


@pytest.mark.parametrize("packed", [False, True], ids=["members", "one member"])
def test_a_new_header_leaves_the_prompts(path, packed):
    write(path, prompt(0), prompt(1))
    if packed:
        rewrite(path, lines(path))
    header = replace(HEADER, search={"simulations": 50, "data": {"arc": "0123"}})
    write_header(path, header)
    assert read(path) == RouteFile(header, [prompt(0), prompt(1)])
    with RouteWriter(path) as writer:
        writer.append([prompt(2)])
    assert recover(path).prompts == [prompt(0), prompt(1), prompt(2)]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"routes": [{"counts": [1, 1], "correct": True, "margin": 0.1}]}, "a route of 2 layers in a file for 3"),
        ({"routes": [{"counts": [1, -1, 1], "correct": True, "margin": 0.1}]}, "counts"),
        ({"routes": [{"counts": [1, 1, 1], "correct": True, "margin": float("nan")}]}, "margin nan"),
        ({"tried": [["111", 0.1], ["11", 0.1]]}, "a route of 2 layers in a file for 3"),
        ({"tried": [["1x1", 0.1]]}, "invalid literal"),
        ({"tried": [["111", None]]}, "TypeError"),
        ({"gold": 2}, "gold 2 of 2 options"),
        ({"gold": None}, "options and gold go together"),
        ({"dense": 3}, "TypeError"),
        ({"prompt": None, "options": 5}, "TypeError"),
    ],
)
def test_a_damaged_line_is_named(path, change, why):
    header, first, second = lines(write(path, prompt(0), prompt(1)))
    rewrite(path, [header, first, json.dumps({**json.loads(second), **change})])
    with pytest.raises(DataError, match=r"damaged at line 3") as caught:
        read(path)
    assert why in str(caught.value)
    rewrite(path, [header, "{", second])
    with pytest.raises(DataError, match=r"damaged at line 2"):
        recover(path)


def test_other_files_are_refused(path, tmp_path):
    rewrite(path, ['{"id": 1}', '{"id": 2}'])
    for function in (read, recover):
        with pytest.raises(DataError, match="its first line is not the header"):
            function(path)
    path.write_bytes(b"something else")
    with pytest.raises(DataError, match="no file of routes"):
        recover(path)
    assert path.read_bytes() == b"something else"
    path.write_bytes(b"")
    assert recover(path) is None
    with pytest.raises(DataError, match="empty"):
        read(path)
    with pytest.raises(DataError, match=r"no file of routes .*rutes"):
        read(tmp_path / "rutes.jsonl")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_one_sentence():
    said = r"/dev/full could not be written \(No space left on device\): make room"
    with pytest.raises(DataError, match=said), RouteWriter("/dev/full") as writer:
        writer.start(HEADER)
