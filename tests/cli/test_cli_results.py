"""What the verbs write: the JSON of the contract, and tables on a clean stdout."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from saved_model import N_LAYERS

PROVENANCE = {"dynadepth", "commit", "python", "torch", "transformers", "hardware", "seed", "dtype", "model", "command"}
CELL = {
    "variant", "granularity", "dtype", "batch", "context", "phase", "unit", "dense_s", "routed_s", "pruned_s", "spread",
    "speedup", "skip_efficiency", "kv_bytes_dense", "kv_bytes_routed",
}  # fmt: skip


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("why is the sky blue and what is a class " * 250, encoding="utf-8")
    return file


@pytest.fixture
def task_data(tmp_path: Path) -> Path:
    rows = [{"query": f"what is {n}", "choices": ["blue", "sky", "the", "a"], "gold": n % 4} for n in range(6)]
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name in ("alpha", "beta"):
        lines = "\n".join(json.dumps(row) for row in rows)
        (folder / f"{name}.jsonl").write_text(lines + "\n", encoding="utf-8")
    return folder


def test_help_lists_every_verb_and_needs_no_torch():
    code = (
        "import sys, dynadepth.cli; sys.argv = ['dynadepth', '--help']\n"
        "try: dynadepth.cli.main()\n"
        "finally: assert 'torch' not in sys.modules"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in ("demo", "tune", "eval", "generate", "bench", "info", "frontier"))
    assert seconds < 10  # it takes 0.3 s on an idle machine; what matters is that torch stays out


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        (
            "tune",
            "--out --data --routes --recipe --method --budget --target --granularity --kv-policy --lora --max-samples",
        ),
        ("eval", "--routers --budget --control --tasks --task-data --limit --perplexity --compare-dense --json"),
        ("generate", "--routers --budget --prompt --prompts --max-new-tokens --show-route --compile --json"),
        (
            "bench",
            "--routers --budget --batch --context --compare --seconds --new-tokens --compile --json --resume --figure",
        ),
        ("calibrate", "--routers --data --out --max-samples --max-length --seed --json"),
        ("demo", "--out --seed"),
        (
            "frontier",
            "--methods --budgets --out --perplexity --tasks --task-data --limit --seed --data --bench --context",
        ),
    ],
)
def test_every_option_of_the_contract_exists(run, verb, options):
    listed = run(verb, "--help").stdout
    assert [option for option in options.split() if option not in listed] == []


def test_eval_json(answered, model_folder, routers_folder, text_file, task_data):
    document, result = answered(
        "eval", model_folder, "--routers", routers_folder, "--budget", "0.75", "--tasks", "alpha,beta",
        "--task-data", task_data, "--limit", 4, "--perplexity", text_file, "--compare-dense",
    )  # fmt: skip
    assert set(document) == {
        "tasks", "average", "perplexity", "dense", "kl", "agreement", "keep_ratio", "depth", "flops_share",
        "flops_share_target", "kv_share", "provenance",
    }  # fmt: skip
    for part in (document, document["dense"]):
        assert set(part["tasks"]) == {"alpha", "beta"}
        assert set(part["tasks"]["alpha"]) >= {"metric", "acc", "acc_norm", "perplexity", "stderr", "n"}
        assert part["tasks"]["alpha"]["n"] == 4
        assert set(part["perplexity"]) == {str(text_file)}
        assert set(part["perplexity"][str(text_file)]) == {"ppl", "nll", "n_tokens"}
        assert 0 <= part["average"] <= 1
    assert set(document["dense"]) == {"tasks", "average", "perplexity"}
    assert set(document["keep_ratio"]) == {"routed", "all"}
    assert document["kl"] >= 0
    assert 0 <= document["agreement"] <= 1
    assert set(document["provenance"]) >= PROVENANCE
    assert document["provenance"]["model"]["fingerprint"]
    assert document["provenance"]["routers"]["budget"] == 0.75
    assert "alpha" in result.stdout
    assert "perplexity" in result.stdout
    assert "KL" in result.stdout
    assert "loading" in result.stderr
    assert "loading" not in result.stdout


def test_eval_of_a_dense_model_has_nulls(answered, model_folder, text_file):
    document, _ = answered("eval", model_folder, "--perplexity", text_file)
    for key in ("average", "dense", "kl", "agreement", "keep_ratio", "depth", "flops_share", "kv_share"):
        assert document[key] is None
    assert document["tasks"] == {}
    assert document["provenance"]["routers"] is None


@pytest.mark.slow
def test_generate_compiled_answers_the_same(answered, model_folder, routers_folder):
    words = "generate", model_folder, "--routers", routers_folder, "--prompt", "why is the sky blue"
    plain, _ = answered(*words, "--max-new-tokens", 5)
    compiled, _ = answered(*words, "--max-new-tokens", 5, "--compile")
    assert compiled["outputs"] == plain["outputs"]


@pytest.mark.slow
def test_bench_compiled_stands_beside_plain(answered, model_folder, routers_folder):
    document, result = answered(
        "bench",
        model_folder,
        "--routers",
        routers_folder,
        "--context",
        4,
        "--new-tokens",
        2,
        "--repeats",
        2,
        "--compile",
    )
    assert all(cell["plain_s"] > 0 for cell in document["cells"])
    assert document["provenance"]["bench"]["compile"] is True
    assert "plain: the dense model, not compiled" in result.stdout


def test_generate_json(answered, model_folder, routers_folder):
    document, result = answered(
        "generate", model_folder, "--routers", routers_folder, "--prompt", "why is the sky blue",
        "--prompt", "who are you", "--max-new-tokens", 5, "--show-route",
    )  # fmt: skip
    assert set(document) == {"outputs", "provenance"}
    assert [output["prompt"] for output in document["outputs"]] == ["why is the sky blue", "who are you"]
    for output in document["outputs"]:
        assert set(output) == {"prompt", "text", "tokens", "route", "keep_ratio"}
        assert 1 <= len(output["tokens"]) <= 5
        assert set(output["route"]) == {f"{layer}.attention" for layer in range(N_LAYERS)}
        assert set(output["route"].values()) <= {0.0, 1.0}
        share = sum(output["route"].values()) / N_LAYERS
        assert output["keep_ratio"] == {"routed": share, "all": share}
        strip = "".join("■" if output["route"][f"{layer}.attention"] else "□" for layer in range(N_LAYERS))
        assert strip in result.stdout
    assert "executed" in result.stdout  # the legend


def test_several_prompts_give_what_each_gives_alone(answered, model_folder, routers_folder):
    prompts = ["why is the sky blue", "who", "give me three of the blue object class and a function"]
    options = ["--routers", routers_folder, "--max-new-tokens", 6]
    together, _ = answered("generate", model_folder, *options, *(w for p in prompts for w in ("--prompt", p)))
    for prompt, output in zip(prompts, together["outputs"], strict=True):
        alone, _ = answered("generate", model_folder, *options, "--prompt", prompt)
        assert alone["outputs"][0] == output


def test_generate_dense_from_a_file(answered, model_folder, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("why is the sky\n\n  \nwho are you\n", encoding="utf-8")
    document, result = answered("generate", model_folder, "--prompts", file, "--max-new-tokens", 2, "--show-route")
    assert [output["prompt"] for output in document["outputs"]] == ["why is the sky", "who are you"]
    assert all(output["route"] is None and output["keep_ratio"] is None for output in document["outputs"])
    assert "dense" in result.stdout


def test_bench_json(answered, model_folder, routers_folder):
    document, result = answered(
        "bench", model_folder, "--routers", routers_folder, "--batch", "1,2", "--context", "8", "--new-tokens", 2,
        "--repeats", 1,
    )  # fmt: skip
    assert set(document) == {"cells", "provenance"}
    assert all(set(cell) >= CELL for cell in document["cells"])
    routed = [cell for cell in document["cells"] if cell["variant"] == "routed"]
    assert {(cell["batch"], cell["phase"]) for cell in routed} == {
        (b, p) for b in (1, 2) for p in ("prefill", "decode")
    }
    assert "routed" in result.stdout


def test_info_of_a_model(run, model_folder):
    result = run("info", model_folder)
    assert result.exit_code == 0
    assert "LlamaForCausalLM" in result.stdout
    assert f"{N_LAYERS} sites" in result.stdout


def test_info_of_routers(run, routers_folder):
    result = run("info", routers_folder)
    assert result.exit_code == 0
    for part in ("mindskip", "4 of 4: layers 0-3", "router parameters", "50.0 %", "calibrated budgets", "16 prompts"):
        assert part in result.stdout


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "data.jsonl"
    rows = [
        {"prompt": f"why is the {word}", "completion": " the sky is blue"}
        for word in ("sky", "class", "object", "function") * 8
    ]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


def test_tune_saves_routers_and_names_the_next_command(run, answered, model_folder, data, tmp_path):
    out = tmp_path / "routers"
    document, result = answered(
        "tune", model_folder, "--out", out, "--data", data, "--budget", "0.75", "--max-samples", 24, "--seed", 3
    )
    assert document["keep_after"]["all"] == pytest.approx(0.75, abs=0.26)
    assert document["steps"] == len(document["losses"]) > 0
    assert set(document["provenance"]) == PROVENANCE | {"routers"} | (
        set(document["provenance"]) & {"platform", "date"}
    )
    saved = json.loads((out / "routing_config.json").read_text(encoding="utf-8"))
    assert saved["provenance"]["seed"] == 3
    assert saved["provenance"]["run"]["model"]["fingerprint"] == saved["base_model"]["fingerprint"]
    assert f"dynadepth generate {model_folder} --routers {out}" in " ".join(result.stdout.split())
    assert "KL" in result.stdout
    again = run("info", out)
    assert again.exit_code == 0
    assert "default" in again.stdout


def test_a_lora_is_tuned_scored_timed_and_described(run, answered, model_folder, data, text_file, tmp_path):
    out = tmp_path / "routers"
    result = run(
        "tune", model_folder, "--out", out, "--data", data, "--method", "static", "--budget", "0.5", "--lora", 2,
        "--max-samples", 12,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in out.iterdir()}
    saved = json.loads((out / "routing_config.json").read_text(encoding="utf-8"))
    assert saved["provenance"]["recipe"]["lora"] == {"rank": 2}
    scored = ("--perplexity", text_file, "--compare-dense")
    dense, _ = answered("eval", model_folder, *scored)
    document, _ = answered("eval", model_folder, "--routers", out, *scored)
    (bare,), (teacher,) = (found["perplexity"].values() for found in (dense, document["dense"]))
    assert teacher == bare, "the dense model has no LoRA"
    assert document["provenance"]["routers"]["lora"]["rank"] == 2
    document, _ = answered("generate", model_folder, "--routers", out, "--prompt", "why is", "--max-new-tokens", 2)
    assert document["outputs"][0]["route"]
    document, _ = answered(
        "bench", model_folder, "--routers", out, "--context", 16, "--new-tokens", 2, "--repeats", 1
    )  # fmt: skip
    assert document["cells"][0]["variant"] == "routed"
    words = " ".join(run("info", out).stdout.split())
    assert "LoRA rank 2 on down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj; 1,856 parameters" in words


@pytest.fixture
def route_folder(run, model_folder, data, tmp_path) -> Path:
    """A static route tuned by the command."""
    out = tmp_path / "route"
    result = run(
        "tune", model_folder, "--out", out, "--data", data, "--method", "static", "--budget", "0.75",
        "--max-samples", 12,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return out


def test_a_static_route_is_tuned_scored_and_described_like_routers(
    run, answered, model_folder, route_folder, text_file, tmp_path
):
    saved = json.loads((route_folder / "routing_config.json").read_text(encoding="utf-8"))
    assert saved["config"]["method"] == "static"
    assert (saved["config"]["skip_path"], saved["config"]["skip_rank"]) == ("linear", 64)  # the recipe's
    order = saved["config"]["order"]
    assert sorted(order) == list(range(N_LAYERS))
    assert (saved["budget"], saved["calibration"]) == (0.75, None)
    with_routers = (model_folder, "--routers", route_folder)
    for budget, skipped in (("0.75", 1), ("0.5", 2), (None, 1)):
        options = [] if budget is None else ["--budget", budget]
        document, _ = answered("generate", *with_routers, *options, "--prompt", "why is", "--max-new-tokens", 2)
        route = document["outputs"][0]["route"]
        assert {site for site, on in route.items() if not on} == {f"{layer}.attention" for layer in order[:skipped]}
    document, _ = answered("eval", *with_routers, "--budget", "0.25", "--perplexity", text_file)
    assert document["keep_ratio"]["all"] == 0.25
    document, _ = answered(
        "bench", *with_routers, "--budget", "0.5", "--context", 16, "--new-tokens", 2, "--repeats", 1
    )  # fmt: skip
    cell = document["cells"][0]
    assert (cell["variant"], cell["keep_ratio"]) == ("routed", 0.5)
    assert cell["pruned_s"] is not None
    described = run("info", route_folder).stdout
    words = " ".join(described.split())
    for part in (
        "method static", "router parameters 0", "skip path parameters", "budget 75.0 %", f"skips layers {order[0]}",
        f"order {', '.join(map(str, order))} (skipped first to last)", "budgets from 0.0 % on",
    ):  # fmt: skip
        assert part in words, part


def test_info_of_a_bare_route(run, model_folder, tmp_path):
    import dynadepth
    from dynadepth import hub

    dynadepth.save(dynadepth.attach(hub.load_model(model_folder), dynadepth.StaticConfig(skip=(2,))), tmp_path / "one")
    words = " ".join(run("info", tmp_path / "one").stdout.split())
    assert "budget a route as it was given skips layers 2 budgets none can be set: the route has no order" in words


def test_tune_can_choose(run, model_folder, data, tmp_path):
    out = tmp_path / "chosen"
    result = run("tune", model_folder, "--out", out, "--data", data, "--method", "auto", "--max-samples", 24)
    assert result.exit_code == 0, result.output
    saved = json.loads((out / "routing_config.json").read_text(encoding="utf-8"))
    choice = saved["provenance"]["result"]["choice"]
    assert [row["budget"] for row in choice["by_budget"]] == [0.875, 0.75, 0.625, 0.5]
    assert saved["config"]["method"] == {"static": "static", "routers": "mindskip"}[choice["chosen"]]
    assert saved["provenance"]["recipe"]["order"] == "auto", "the order is chosen, too"
    sentence = f"chosen: {choice['chosen']} ({choice['why']})"
    assert sentence in " ".join(result.stdout.split())
    assert "4 budgets, 8 held-out texts)" in sentence
    assert f"chosen {choice['chosen']} ({choice['why']})" in " ".join(run("info", out).stdout.split())
