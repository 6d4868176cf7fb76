"""Bad input ends as one sentence that names the value, with exit code 2 and without a traceback; Ctrl-C with 130."""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from pathlib import Path

import pytest

from dynadepth import adapter
from dynadepth.cli.session import one_line_warnings
from saved_model import save_model


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("abcx", "'abcx'"),
        ("0.9x", "at least 1x, such as 1.3x, not 0.9x"),
        ("0x", "not 0x"),
        ("nanx", "not nanx"),
        ("infx", "not infx"),
        ("1.3x@2048", "1.3x@2048+64 (prompt + new tokens), not '1.3x@2048'"),
        ("1.3x@0+64", "not '1.3x@0+64'"),
        ("0.75@2048+64", "not '0.75@2048+64'"),
        ("abc", "'abc'"),
        ("0", "not 0"),
        ("1.5", "not 1.5; a speed-up is written 1.3x"),
        ("-1", "not -1"),
        ("nan", "nan"),
    ],
)
@pytest.mark.parametrize("verb", ["eval", "generate", "bench", "tune"])
def test_budgets_are_checked_before_anything_is_loaded(refused, verb, text, named):
    extra = ["--out", "nowhere"] if verb == "tune" else []
    assert named in refused(verb, "no-such-model", *extra, "--budget", text)


def test_budget_without_routers(refused, model_folder):
    for budget in ("0.5", "1.3x"):
        sentence = refused("generate", model_folder, "--budget", budget, "--prompt", "why")
        assert f"--budget {budget} needs --routers" in sentence


def test_budget_that_the_sites_cannot_reach(refused, model_folder, tmp_path):
    import dynadepth
    from dynadepth import hub

    model = dynadepth.attach(hub.load_model(model_folder), dynadepth.MindSkipConfig(layers=(3,)))
    dynadepth.save(model, tmp_path / "one")
    sentence = refused("generate", model_folder, "--routers", tmp_path / "one", "--budget", "0.5", "--prompt", "why")
    assert "0.5 cannot be reached" in sentence
    assert "1 of 4" in sentence


def test_unknown_model_names_the_near_ones(refused):
    assert "'smollm2-135m'" in refused("info", "smollm2-135")


def test_unsupported_architecture(refused, tmp_path):
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=32, hidden_size=8, n_layer=2, n_head=2))
    shutil.copytree(
        save_model(tmp_path / "llama"),
        tmp_path / "bloom",
        ignore=shutil.ignore_patterns("config.json", "*.safetensors"),
    )
    model.save_pretrained(tmp_path / "bloom")
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "why", "completion": " the sky"}\n' * 4, encoding="utf-8")
    assert "Bloom" in refused("tune", tmp_path / "bloom", "--out", tmp_path / "out", "--data", data)


def test_routers_of_another_model_name_both(refused, routers_folder, tmp_path):
    import torch
    from transformers import LlamaForCausalLM

    other = save_model(tmp_path / "other-model")
    model = LlamaForCausalLM.from_pretrained(other)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.neg_()
    model.save_pretrained(other)
    sentence = refused("generate", other, "--routers", routers_folder, "--prompt", "why")
    assert "tiny" in sentence
    assert "other-model" in sentence
    assert "fingerprint" in sentence


@pytest.mark.parametrize("how", ["truncated", "tampered", "newer", "missing"])
def test_damaged_routers(refused, routers_folder, tmp_path, how):
    folder = tmp_path / "damaged"
    shutil.copytree(routers_folder, folder)
    weights, config = folder / "routers.safetensors", folder / "routing_config.json"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif how == "tampered":
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    elif how == "missing":
        weights.unlink()
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | {"format": 99}), encoding="utf-8")
    expected = {"newer": "format 99", "missing": "routers.safetensors is missing"}.get(how, "truncated or was changed")
    # Said before the model is looked for: a large one takes long to load.
    assert expected in refused("generate", "no/such-model", "--routers", folder, "--prompt", "why")
    described = refused("info", folder)
    assert expected in described
    assert "routing_config.json is damaged" not in described, "it is not"


def test_a_folder_of_routers_is_no_model(refused, routers_folder):
    assert "saved routers" in refused("generate", routers_folder, "--prompt", "why")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "no file"),
        ("", "empty"),
        ('{"prompt": "why", "completion": "sky"}\nnot json\n', "line 2"),
        ('{"colour": 1}\n', "colour"),
    ],
)
def test_tuning_data(refused, model_folder, tmp_path, content, named):
    data = tmp_path / "data.jsonl"
    if content is not None:
        data.write_text(content, encoding="utf-8")
    sentence = refused("tune", model_folder, "--out", tmp_path / "out", "--data", data)
    assert named in sentence.lower()
    assert "data.jsonl" in sentence


def test_samples_that_are_all_too_long(refused, model_folder, tmp_path):
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"prompt": "the sky " * 4000, "completion": "blue"}) + "\n", encoding="utf-8")
    assert "long.jsonl" in refused("tune", model_folder, "--out", tmp_path / "out", "--data", data)


@pytest.mark.parametrize(
    "changes",
    [
        {"sites": 5},
        {"sites": ["x"]},
        {"provenance": 3},
        {"provenance": {"result": 7}},
        {"provenance": {"recipe": "x"}},
        {"calibration": 7},
        {"budget": "x"},
    ],
    ids=str,
)
def test_routers_with_damaged_facts_are_described_as_such(refused, routers_folder, tmp_path, changes):
    folder = tmp_path / "damaged"
    shutil.copytree(routers_folder, folder)
    config = folder / "routing_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes), encoding="utf-8")
    assert "routing_config.json is damaged" in refused("info", folder)


def test_a_lora_into_the_models_own_folder(refused, model_folder):
    assert "is a model's folder" in refused("tune", model_folder, "--out", model_folder, "--lora", "2")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--recipe", "defualt"], "'default'"),
        (["--method", "mindskp"], "'mindskip'"),
        (["--target", "atention"], "'attention'"),
        (["--granularity", "word"], "'word'"),
        (["--kv-policy", "keep"], "'keep'"),
        (["--method", "auto", "--recipe", "mindskip-paper"], "'mindskip-paper' cannot choose"),
        (["--method", "static", "--recipe", "mindskip-paper"], "A static route needs an order"),
        (["--max-samples", "0"], "--max-samples must be at least 1, not 0"),
        (["--lora", "0"], "--lora must be at least 1, not 0"),
    ],
)
def test_tuning_options_are_checked_before_the_model(refused, tmp_path, options, named):
    assert named in refused("tune", "no/such-model", "--out", tmp_path / "out", *options)


@pytest.mark.parametrize("seed", [-1, 2**32, 10**23])
@pytest.mark.parametrize(
    "words",
    [
        ("tune", "no/such-model", "--data", "x.jsonl"),
        ("tune", "no/such-model", "--routes", "x.jsonl"),
        ("search", "no/such-model", "--data", "x.jsonl"),
        ("frontier", "no/such-model"),
        ("demo",),
    ],
)
def test_seeds_are_checked_before_anything_is_loaded(refused, tmp_path, words, seed):
    out = tmp_path / ("out.jsonl" if words[0] == "search" else "out")
    sentence = refused(*words, "--out", out, "--seed", seed)
    assert f"--seed must be a whole number from 0 to 4294967295, not {seed}." in sentence
    assert not out.exists()


def test_a_lora_that_does_not_fit_the_model_is_said_before_data_is_read(refused, model_folder, tmp_path):
    words = ("tune", model_folder, "--out", tmp_path / "out", "--data", tmp_path / "none.jsonl", "--lora", 100000)
    assert "rank 100000 is more than any of the adapted layers" in refused(*words)


def test_output_that_cannot_be_written_is_said_first(refused, model_folder, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("", encoding="utf-8")
    assert "file" in refused("tune", "no/such-model", "--out", blocked / "routers")
    assert "no folder" in refused(
        "generate", "no/such-model", "--prompt", "a", "--json", tmp_path / "nowhere" / "x.json"
    )
    assert "is a folder" in refused("bench", "no/such-model", "--json", tmp_path)
    assert "a device or a pipe" in refused("bench", "no/such-model", "--json", "/dev/null")
    assert Path("/dev/null").is_char_device()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "x.json")
    assert "no folder" in refused("bench", "no/such-model", "--json", tmp_path / "dangling")
    assert "no home folder" in refused("bench", "~nobody-of-that-name/model")


def test_task_and_text_files(refused, model_folder, tmp_path):
    (tmp_path / "arc_easy.jsonl").write_text('{"query": "why", "choices": ["a", "b"], "gold": 0}\n', encoding="utf-8")
    assert "'arc_easy'" in refused("eval", model_folder, "--tasks", "arc_esy", "--task-data", tmp_path)
    assert "no-such.txt" in refused("eval", model_folder, "--perplexity", tmp_path / "no-such.txt")
    assert "at least one task" in refused("eval", model_folder)
    assert "--limit" in refused("eval", model_folder, "--tasks", "questions", "--limit", 0)


def test_prompts(refused, model_folder, tmp_path):
    empty = tmp_path / "prompts.jsonl"
    empty.write_text("", encoding="utf-8")
    assert "--prompt" in refused("generate", model_folder)
    assert "--prompt" in refused("generate", model_folder, "--prompt", "why", "--prompts", empty)
    assert "prompts.jsonl" in refused("generate", model_folder, "--prompts", empty)
    assert "Prompt 2 is empty" in refused("generate", model_folder, "--prompt", "why", "--prompt", "")
    assert "--max-new-tokens" in refused("generate", model_folder, "--prompt", "why", "--max-new-tokens", 0)


@pytest.mark.parametrize("counts", ["0", "1,x", "", "1,,2", "1.5", "-3"])
def test_counts(refused, counts):
    assert repr(counts) in refused("bench", "no/such-model", f"--batch={counts}")
    assert "--context" in refused("bench", "no/such-model", f"--context={counts}")


@pytest.mark.parametrize("words", [("eval", "--tasks"), ("frontier", "--methods"), ("frontier", "--tasks")])
def test_lists_that_name_nothing(refused, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    assert f"{words[1]} ',' names nothing" in refused(words[0], "no/such-model", words[1], ",")


def test_unknown_dtype(refused, model_folder):
    for name in ("float31", "float8_e4m3fn", "int8"):  # the last two are of torch, and no model computes in them
        assert repr(name) in refused("generate", model_folder, "--dtype", name, "--prompt", "why")


@pytest.mark.parametrize(
    "words", [["generate"], ["nope"], ["tune", "m"], ["eval", "m", "--limit", "many"], ["info", "a", "b"]]
)
def test_usage_errors_leave_with_2(run, words):
    result = run(*words)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_ctrl_c_says_what_is_left(run, monkeypatch, model_folder, tmp_path):
    from dynadepth.report import samples

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(samples, "answers", interrupt)
    result = run("generate", model_folder, "--prompt", "why", "--json", tmp_path / "x.json")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "interrupted: nothing was written."
    assert not (tmp_path / "x.json").exists()


def test_ctrl_c_while_tuning(run, monkeypatch, model_folder, tmp_path):
    from dynadepth.tuning.trainer import RouterTrainer

    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text('{"prompt": "why is the", "completion": " sky blue"}\n' * 24, encoding="utf-8")

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(RouterTrainer, "training_step", interrupt)
    result = run("tune", model_folder, "--out", out, "--data", data)
    assert result.exit_code == 130
    assert str(out) in result.stderr.splitlines()[-1]
    assert "the same command goes on" in result.stderr


def test_a_bug_keeps_its_traceback(run, monkeypatch, model_folder):
    from dynadepth.report import samples

    monkeypatch.setattr(samples, "answers", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("generate", model_folder, "--prompt", "why")


def test_no_space_left_for_the_results(run, monkeypatch, model_folder, tmp_path):
    def full(path, write_to):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(adapter, "atomically", full)
    file = tmp_path / "x.json"
    file.write_text("before", encoding="utf-8")
    result = run("generate", model_folder, "--prompt", "why", "--max-new-tokens", 1, "--json", file)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == f"error: {file} cannot be written: No space left on device."
    assert file.read_text(encoding="utf-8") == "before"


def test_warnings_are_one_line(capsys, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # put back afterwards
    one_line_warnings()
    warnings.showwarning("two\nlines", UserWarning, "file", 1)
    assert capsys.readouterr().err == "warning: two lines\n"
