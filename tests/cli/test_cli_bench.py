"""`dynadepth bench` over a grid: what is compared, written, resumed, drawn, and refused."""

import importlib
import json

import pytest

FEW = ("--new-tokens", 2, "--repeats", 1)


def test_compared_without_routers(run, model_folder, tmp_path):
    file, figure = tmp_path / "grid.json", tmp_path / "grid.svg"
    result = run(
        "bench", model_folder, "--compare", "sequence,mixed@0.5", "--batch", "1,2", "--context", "4,8,16", *FEW,
        "--json", file, "--figure", figure,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    document = json.loads(file.read_text(encoding="utf-8"))
    assert set(document) == {"cells", "provenance"}
    assert {(c["variant"], c["batch"]) for c in document["cells"]} == {
        ("sequence@0.5", 1), ("sequence@0.5", 2), ("mixed@0.5", 2)
    }  # fmt: skip
    assert document["provenance"]["bench"]["compare"] == ["sequence@0.5", "mixed@0.5"]
    for part in ("mixed@0.5", "Growth", "ideal:", "nominal"):
        assert part in result.stdout
    assert "<svg" in figure.read_text(encoding="utf-8")


def test_resumed_where_it_was(run, model_folder, tmp_path):
    file = tmp_path / "grid.json"
    words = ["bench", model_folder, "--compare", "static", *FEW, "--json", file, "--context"]
    assert run(*words, "8").exit_code == 0
    first = json.loads(file.read_text(encoding="utf-8"))["cells"]
    assert run(*words, "8,4", "--resume").exit_code == 0
    both = json.loads(file.read_text(encoding="utf-8"))["cells"]
    assert [c["context"] for c in both] == [4, 4, 8, 8]
    assert both[2:] == first, "not measured again"
    assert run(*words, "8").exit_code == 0
    assert [c["context"] for c in json.loads(file.read_text(encoding="utf-8"))["cells"]] == [8, 8]


def test_an_interrupted_grid_keeps_its_points(run, model_folder, tmp_path, monkeypatch):
    from dynadepth.benchmark import latency

    file, real, calls = tmp_path / "grid.json", latency.measure, []

    def measure(*args, **options):
        calls.append(args)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(latency, "measure", measure)
    result = run("bench", model_folder, "--compare", "static", "--context", "4,8", *FEW, "--json", file)
    assert result.exit_code == 130
    assert "--resume goes on from there" in result.stderr
    assert {c["context"] for c in json.loads(file.read_text(encoding="utf-8"))["cells"]} == {4}


def test_refusals(refused, model_folder, tmp_path):
    bench = ("bench", model_folder)
    assert "static, sequence, route, mixed" in refused(*bench, "--compare", "nonsense")
    assert "--resume needs --json" in refused(*bench, "--resume")
    assert "--seconds must be more than 0" in refused(*bench, "--seconds", "0")
    assert "nothing to draw" in refused(*bench, "--figure", tmp_path / "a.svg")
    assert ".svg or .png" in refused(*bench, "--compare", "static", "--figure", tmp_path / "a.gif")
    assert "nothing is compared" in refused(*bench, "--skip-path", "linear")
    assert "skip path 'cubic'" in refused(*bench, "--compare", "static", "--skip-path", "cubic")
    file = tmp_path / "other.json"
    file.write_text("{}", encoding="utf-8")
    words = (*bench, "--compare", "static", "--context", "4", *FEW, "--json", file)
    assert "holds no cells" in refused(*words, "--resume")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--compare", "mixed"), "mixed@0.5 needs a --batch of 2 or more, not 1"),
        (("--compare", "static,mixed@0.25", "--figure", "a.svg"), "mixed@0.25 needs a --batch of 2 or more"),
        (("--compare", ""), "--compare '' names nothing"),
        (("--compare", ","), "--compare ',' names nothing"),
        (("--compare", "static", "--skip-path", "cubic"), "skip path 'cubic'"),
        (("--compare", "sequence@2"), "sequence@2 has a keep ratio outside 0 to 1: write sequence@0.75"),
    ],
)
def test_what_cannot_be_compared_is_said_before_the_model_is_loaded(refused, words, message):
    assert message in refused("bench", "no/such-model", *words)


def test_what_one_row_cannot_show_is_said(run):
    result = run("bench", "no/such-model", "--compare", "static,mixed", "--batch", "1,2")
    assert "mixed@0.5 is left out at a batch of 1" in result.stderr


@pytest.mark.parametrize("seconds", ["1e-9", "60"])
def test_three_rounds_run_however_long_they_take(answered, model_folder, seconds):
    document, _ = answered(
        "bench", model_folder, "--compare", "static", "--context", 4, "--new-tokens", 2, "--repeats", 5,
        "--seconds", seconds,
    )  # fmt: skip
    rounds = {"1e-9": 3, "60": 5}[seconds]
    assert [c["samples"]["dense"] for c in document["cells"]] == [rounds, 2 * rounds]


def test_tables_fit_a_pipe():
    """120 columns, numbers of a large grid: nothing is cut."""
    from rich.console import Console

    bench = importlib.import_module("dynadepth.cli.bench")
    cell = {
        "variant": "token-project@0.75", "batch": 16, "context": 4096, "phase": "prefill", "dtype": "bfloat16",
        "dense_s": 45.4567, "routed_s": 45.4567, "pruned_s": 45.4567, "plain_s": 45.4567,
        "spread": 0.123, "speedup": 12.345,
        "ideal_saving": 0.9, "skip_efficiency": None, "nominal_efficiency": -12.345, "beyond_positions": True,
        "tokens_per_s": {"plain": 23456.7, "dense": 12345.6, "token-project@0.75": 12345.6}, "kv_bytes_dense": 2**34,
        "kv_bytes_routed": 2**34, "peak_bytes": {"dense": 2**34, "token-project@0.75": 2**34},
    }  # fmt: skip
    console = Console(width=120, highlight=False, record=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "out", lambda: console)
        bench.show([cell])
    text = console.export_text()
    for part in (
        "token-project@0.75",
        "16×4096",
        "45,456.70",
        "(-12.35)",
        "12,345.6",
        "23,456.7",
        "16,384.0",
        "100.0 %",
    ):
        assert part in text
    assert "…" not in text
