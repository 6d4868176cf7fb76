"""A model some of whose layers have no attention: those that have one are routed, scored, counted and pruned."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer, Qwen3NextConfig, Qwen3NextForCausalLM

import dynadepth
from commands import invoke
from dynadepth import MindSkipConfig, Site, StaticConfig, cost
from dynadepth.benchmark.pruned import bare_twin, pruned_twin
from dynadepth.benchmark.timing import Work, measure
from dynadepth.budget import importance
from dynadepth.errors import UnsupportedModelError
from saved_model import SPECIAL, WORDS, save_model

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
}  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=len(SPECIAL) + len(WORDS), pad_token_id=0, bos_token_id=1, eos_token_id=2, **SIZES
    )
    return Qwen3NextForCausalLM(config).eval()


def test_a_layer_without_attention_is_refused_by_name(model):
    with pytest.raises(UnsupportedModelError, match=r"cannot be routed at layer 0: its .* has no 'self_attn'"):
        dynadepth.attach(model, MindSkipConfig(layers="all"))


def test_scores_and_costs(model):
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    scores = importance(model, [batch], "attention")
    assert list(scores) == [Site(3, "attention"), Site(7, "attention")]
    assert scores[Site(3, "attention")] > 0
    mixer = model.model.layers[0].linear_attn
    matrices = sum(p.numel() for p in mixer.parameters() if p.dim() > 1)
    assert cost.flops(model, "attention", 0, 1) == 2 * matrices
    dynadepth.attach(model, StaticConfig(layers=(3,), skip=(3,)))
    share = cost.flops_share(model, {Site(3, "attention"): 0.0}, tokens=8)
    assert 0 < share.model < 1
    twin = pruned_twin(model, [Site(3, "attention")])
    with torch.no_grad():
        torch.testing.assert_close(twin(**batch).logits, model(**batch).logits)


def test_it_is_tuned_and_evaluated(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(save_model(tmp_path / "words")).save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"why is the {word}", "completion": " the sky is blue"} for word in WORDS * 2]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "text.txt").write_text("why is the sky blue and what is a class " * 110, encoding="utf-8")
    method = "{method: mindskip, layers: [3, 7], bias: true}"
    recipe = f"name: hybrid\nsource: test\nmethod: {method}\ninit: importance\nmax_steps: 1\ncalibrate: true\n"
    (tmp_path / "hybrid.yaml").write_text(recipe, encoding="utf-8")
    words = ["--recipe", tmp_path / "hybrid.yaml", "--data", tmp_path / "data.jsonl", "--out", tmp_path / "routers"]
    result = invoke("tune", tmp_path / "model", *words, "--budget", "0.875")
    assert result.exit_code == 0, result.output
    told = ["--perplexity", tmp_path / "text.txt", "--compare-dense", "--json", tmp_path / "eval.json"]
    result = invoke("eval", tmp_path / "model", "--routers", tmp_path / "routers", *told)
    assert result.exit_code == 0, result.output
    assert 0 < json.loads((tmp_path / "eval.json").read_text())["flops_share"] <= 1.1


def test_it_is_timed(model):
    dynadepth.attach(model, StaticConfig(layers=(3,), skip=(3,)))
    found = measure({"dense": bare_twin(model), "routed": model}, Work(torch.full((1, 12), 5), 8), repeats=1)
    held = {name: samples.kv_bytes["prefill"] for name, samples in found.items()}
    assert 2 * held["routed"] == held["dense"] > 0, "one of two attentions is skipped"
