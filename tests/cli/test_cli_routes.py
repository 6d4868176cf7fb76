"""`tune --routes`, and what the other verbs make of routers that repeat layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from commands import invoke
from dynadepth import adapter
from saved_model import N_LAYERS
from searched_routes import save_routes, text

RECIPE = """
name: small
source: test
method: {method: drllm, hidden: 8, windows: 2}
learning_rate: 0.05
warmup_steps: 2
epochs: 20
patience: 20
validation: 0.25
holdout: 0.25
"""


@pytest.fixture(scope="module")
def routes_file(model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every prompt skips layer 1 and repeats layer 2."""
    return save_routes(tmp_path_factory.mktemp("routes") / "routes.jsonl.gz", model_folder)


@pytest.fixture(scope="module")
def tuned(model_folder: str, routes_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("tuned")
    (folder / "small.yaml").write_text(RECIPE, encoding="utf-8")
    words = ("tune", model_folder, "--method", "drllm", "--routes", routes_file, "--recipe", folder / "small.yaml")
    result = invoke(*words, "--out", folder / "routers", "--json", folder / "result.json")
    assert result.exit_code == 0, result.output
    return folder / "routers", result.stdout


def test_tuning_prints_scores_beside_predictors_that_see_no_prompt(tuned):
    folder, said = tuned
    for words in ("macro-F1", "always execute", "commonest of the layer", "skip: precision", "repeat: recall"):
        assert words in said
    assert "4.00 layers in the held-out routes" in said
    assert "its control reached another wrong answer of" in said
    assert "--show-route" in said
    document, _ = adapter.read(folder)
    assert document["config"]["method"] == "drllm"
    assert document["provenance"]["run"]["command"]
    assert document["provenance"]["result"]["scores"]["macro_f1"] > 0.9
    written = json.loads((folder.parent / "result.json").read_text(encoding="utf-8"))
    assert {key: written[key] for key in document["provenance"]["result"]} == document["provenance"]["result"]
    assert written["provenance"]["routers"]["folder"] == str(folder)


def test_routes_are_shown_with_their_repeats(answered, model_folder, tuned):
    document, result = answered(
        "generate", model_folder, "--routers", tuned[0], "--prompt", text(3), "--max-new-tokens", 3,
        "--show-route",
    )  # fmt: skip
    assert document["outputs"][0]["route"] == {"0.block": 1.0, "1.block": 0.0, "2.block": 2.0, "3.block": 1.0}
    assert document["outputs"][0]["keep_ratio"] == {"routed": 0.75, "all": 0.75}
    assert "■□▣■" in result.stdout
    assert "4 executions for 4 layers" in result.stdout
    assert "▣ executed twice" in result.stdout


def test_a_control_of_minus_one_skips_nothing(answered, model_folder, tuned, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("why is the sky blue and what is a class " * 250, encoding="utf-8")
    own, _ = answered("eval", model_folder, "--routers", tuned[0], "--perplexity", file)
    full, _ = answered("eval", model_folder, "--routers", tuned[0], "--perplexity", file, "--control", "-1")
    assert own["depth"] < full["depth"]
    assert full["keep_ratio"]["all"] == 1.0
    assert full["kv_share"] == pytest.approx(full["depth"] / N_LAYERS)
    assert full["provenance"]["routers"]["control"] == -1


def test_the_bench_has_the_repeated_block_twice(answered, model_folder, tuned):
    document, _ = answered(
        "bench", model_folder, "--routers", tuned[0], "--context", 12, "--new-tokens", 2, "--repeats", 2
    )
    routed = [cell for cell in document["cells"] if cell["variant"] == "routed"]
    for cell in routed:
        assert cell["pruned_s"] is not None
        assert cell["keep_ratio"] == 0.75
        assert cell["kv_bytes_routed"] == cell["kv_bytes_dense"]  # one layer less, one twice


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "drllm"), "learns from searched routes"),
        (("--recipe", "drllm-paper"), "tune it with --routes FILE"),
        (("--routes", "ROUTES", "--method", "mindskip"), "'mindskip'"),
        (("--routes", "ROUTES", "--method", "mod"), "Method 'mod' does not learn from routes"),
        (("--routes", "ROUTES", "--method", "drlm"), "Unknown method 'drlm'"),
        (("--routes", "ROUTES", "--recipe", "default"), "method 'mindskip' does not learn from routes: leave --routes"),
        (("--routes", "ROUTES", "--budget", "0.5"), "--budget cannot be set together with --routes"),
        (("--routes", "ROUTES", "--lora", "4"), "--lora cannot be set together"),
        (("--routes", "nothing.jsonl.gz"), "no file of routes"),
    ],
)
def test_what_does_not_go_together(refused, model_folder, routes_file, tmp_path, words, message):
    given = [str(routes_file) if word == "ROUTES" else word for word in words]
    assert message in refused("tune", model_folder, "--out", tmp_path / "out", *given)


@pytest.mark.parametrize("budget", ["0.5", "1.2x"])
def test_budgets_of_routers_without_thresholds_in_common(refused, model_folder, tuned, budget):
    sentence = refused("generate", model_folder, "--prompt", "why", "--routers", tuned[0], "--budget", budget)
    assert "shift their own choice with --control P" in sentence
    assert "tune them" not in sentence


def test_controls_that_cannot_be(refused, model_folder, tuned):
    common = ("generate", model_folder, "--prompt", "why", "--control", "0.5")
    assert "--control 0.5 needs --routers" in refused(*common)
    assert "give one of them" in refused(*common, "--routers", tuned[0], "--budget", "0.5")
    wrong = refused("generate", model_folder, "--prompt", "why", "--routers", tuned[0], "--control", "2")
    assert "--control must be between -1 and 1, not 2" in wrong
