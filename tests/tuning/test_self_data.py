"""The model's own tuning set: drawn from the dense model, the same in any batch, balanced, resumed where it stopped."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example as with_example
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from dynadepth.dial import set_threshold
from dynadepth.errors import ConfigError, DataError, TuningError
from dynadepth.methods import MindSkipConfig
from dynadepth.model import attach
from dynadepth.routed import routing_of
from dynadepth.routing import roomy
from dynadepth.tuning import Recipe, examples_for, self_data
from dynadepth.tuning.data import Example
from dynadepth.tuning.formats import encode_chat
from dynadepth.tuning.sampling import _draw, sample
from dynadepth.tuning.self_data import fingerprint, plain_passages, self_examples, self_prompts, shipped_passages

WORDS = ["<pad>", "</s>", "<unk>", "user", "assistant", ":", *(f"w{i}" for i in range(58))]
PROMPTS = [
    {"id": f"p{i}", "domain": f"d{i % 3}", "prompt": " ".join(f"w{(i + k) % 58}" for k in range(1 + i % 7))}
    for i in range(12)
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "model" in request.fixturenames:
        monkeypatch.setattr(self_data, "self_prompts", lambda: PROMPTS)


SETTINGS: dict[str, Any] = {"n": 10, "max_new_tokens": 12, "batch_size": 4, "temperature": 1.0}


def count_forwards(model: torch.nn.Module) -> list[int]:
    """A list that grows by the batch size of each forward."""
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True)
    return sizes


def test_prompts_that_ship() -> None:
    rows = self_prompts()
    assert len(rows) >= 200
    assert all(set(row) == {"id", "domain", "prompt"} for row in rows)


def test_examples(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    examples = self_examples(model, tokenizer, **SETTINGS)
    by_prompt = {tuple(encode_chat(tokenizer, row["prompt"])): row for row in PROMPTS}
    assert len(examples) == 10
    for example in examples:
        prompt, answer = example.input_ids[: example.prompt_length], example.input_ids[example.prompt_length :]
        assert tuple(prompt) in by_prompt
        assert 1 <= len(answer) <= 12
        assert 1 not in answer[:-1]  # nothing behind the end of sequence
        assert len(answer) == 12 or answer[-1] == 1


def test_the_batch_never_matters(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    options = {**SETTINGS, "n": 12}
    whole = self_examples(model, tokenizer, **{**options, "batch_size": 12})
    assert len({len(e.input_ids) for e in whole}) > 3  # padded, and rows leave early
    assert self_examples(model, tokenizer, **{**options, "batch_size": 1}) == whole
    assert self_examples(model, tokenizer, **{**options, "batch_size": 5}) == whole


def absolute_positions() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=len(WORDS),
        n_embd=32,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("absolute", [False, True])
def test_rows_that_leave_the_batch_take_nothing_with_them(
    model: LlamaForCausalLM, absolute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roomy, "CHUNK", 3)  # the cache grows on the way
    chosen = absolute_positions() if absolute else model
    prompts = [[6 + (5 * i + k) % 58 for k in range(1 + 7 * i % 12)] for i in range(12)]
    draws = torch.rand(12, 10, generator=torch.Generator().manual_seed(0))
    ends = set(range(0, len(WORDS), 6))  # rows leave at many steps
    together = sample(chosen, prompts, draws, 1.0, ends, 0)
    assert len({len(ids) for ids in together}) > 4
    assert together == [
        sample(chosen, [ids], draw[None], 1.0, ends, 0)[0] for ids, draw in zip(prompts, draws, strict=True)
    ]


def test_seed_and_nothing_else(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(1)
    first = self_examples(model, tokenizer, seed=3, **SETTINGS)
    state = torch.get_rng_state()
    assert self_examples(model, tokenizer, seed=3, **SETTINGS) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert self_examples(model, tokenizer, seed=4, **SETTINGS) != first


def test_cold_sampling_is_greedy_generation(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    for example in self_examples(model, tokenizer, **{**SETTINGS, "temperature": 1e-6}):
        prompt = torch.tensor([example.input_ids[: example.prompt_length]])
        mask = torch.ones_like(prompt)
        expected = model.generate(input_ids=prompt, attention_mask=mask, max_new_tokens=12, do_sample=False)
        assert expected[0].tolist() == example.input_ids


def test_sampling_follows_the_distribution(model: LlamaForCausalLM) -> None:
    n, prompt = 4000, torch.tensor([[7, 8, 9]])
    draws = (torch.arange(n) / n).unsqueeze(1)  # every quantile once
    counts = Counter(ids[0] for ids in sample(model, [[7, 8, 9]] * n, draws, 2.0, {1}, 0))
    with torch.no_grad():
        expected = (model(prompt).logits[0, -1] / 2).softmax(-1)
    for token in range(len(WORDS)):
        assert abs(counts[token] / n - expected[token].item()) < 2 / n


@settings(deadline=None, max_examples=100)
@with_example([-8, 3], 0.0)
@given(st.lists(st.integers(-8, 8), min_size=2, max_size=40), st.floats(0, 1, exclude_max=True, width=32))
def test_draw_inverts_the_distribution(weights: list[int], uniform: float) -> None:
    logits = torch.tensor([[float("-inf") if w == -8 else float(w) for w in weights] + [0.0]])
    (token,) = _draw(logits, torch.tensor([uniform]), 1.0)
    mass = logits.double().softmax(-1)[0]
    assert mass[token] > 0
    assert mass[:token].sum() <= uniform + 1e-5
    assert mass[: token + 1].sum() >= uniform - 1e-5


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(1, 80), st.randoms(use_true_random=False))
def test_domains_are_balanced(domains: list[int], n: int, rng: Any) -> None:
    rows = [{"id": str(i), "domain": f"d{domain}", "prompt": str(i)} for i, domain in enumerate(domains)]
    chosen = self_data._balanced(rows, n, rng)
    assert len({key for key, _ in chosen}) == len(chosen) == n
    for start in range(0, n, len(rows)):
        turn = [int(prompt) for _, prompt in chosen[start : start + len(rows)]]
        assert len(set(turn)) == len(turn)  # all prompts once before any comes again
        for stop in range(1, len(turn) + 1):
            taken = Counter(domains[i] for i in turn[:stop])
            left = [d for d in set(domains) if taken[d] < domains.count(d)]
            assert all(taken[other] <= taken[d] + 1 for d in left for other in taken)


def test_more_examples_than_prompts(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    examples = self_examples(model, tokenizer, **{**SETTINGS, "n": 36})
    by_prompt: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for example in examples:
        by_prompt.setdefault(tuple(example.input_ids[: example.prompt_length]), set()).add(tuple(example.input_ids))
    assert len(by_prompt) == 12
    assert all(len(answers) == 3 for answers in by_prompt.values())


def test_resumes(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    expected = self_examples(model, tokenizer, **SETTINGS)
    sizes = count_forwards(model)

    def stop(done: int, total: int) -> None:
        assert (done, total) == (3, 10)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        self_examples(model, tokenizer, progress=stop, cache_dir=tmp_path, **SETTINGS)
    assert max(sizes) == 3
    sizes.clear()
    seen: list[tuple[int, int]] = []
    resumed = self_examples(model, tokenizer, progress=lambda *p: seen.append(p), cache_dir=tmp_path, **SETTINGS)
    assert resumed == expected
    assert seen == [(3, 10), (6, 10), (10, 10)]
    sizes.clear()
    assert self_examples(model, tokenizer, cache_dir=tmp_path, **SETTINGS) == expected
    assert sizes == []  # nothing left to write


def test_resumes_behind_a_torn_line(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    expected = self_examples(model, tokenizer, cache_dir=tmp_path, **SETTINGS)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    sizes = count_forwards(model)
    assert self_examples(model, tokenizer, cache_dir=tmp_path, **SETTINGS) == expected
    assert sizes
    sizes.clear()
    assert self_examples(model, tokenizer, cache_dir=tmp_path, **SETTINGS) == expected
    assert sizes == []


def test_what_is_kept_belongs_to_model_and_settings(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def files_after(**options: Any) -> int:
        self_examples(model, tokenizer, cache_dir=tmp_path, **{**SETTINGS, **options})
        return len(list(tmp_path.iterdir()))

    assert files_after() == 1
    assert files_after(seed=1) == 2
    assert files_after(max_new_tokens=5) == 3
    assert files_after() == 3
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    assert files_after() == 4


def test_another_prompt_text_is_answered_anew(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    self_examples(model, tokenizer, cache_dir=tmp_path, **SETTINGS)
    changed = [{**row, "prompt": row["prompt"] + " w1"} for row in PROMPTS]
    monkeypatch.setattr(self_data, "self_prompts", lambda: changed)
    expected = self_examples(model, tokenizer, **SETTINGS)
    assert self_examples(model, tokenizer, cache_dir=tmp_path, **SETTINGS) == expected


def test_routing_and_dropout_are_off(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    expected, mark = self_examples(model, tokenizer, **SETTINGS), fingerprint(model)
    attach(model, MindSkipConfig(layers=(1, 2)))
    set_threshold(routing_of(model).routers().values(), float("inf"))  # every routed attention would be skipped
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    assert self_examples(model, tokenizer, **SETTINGS) == expected
    assert [module.training for module in model.modules()] == modes
    assert fingerprint(model) == mark  # routers are no part of it


def test_passages_that_ship() -> None:
    rows = shipped_passages()
    assert len(rows) >= 300
    assert len({row["id"] for row in rows}) == len({row["text"] for row in rows}) == len(rows)
    assert min(len(row["text"].split()) for row in rows) > 200
    assert len({row["kind"] for row in rows}) >= 5


def test_plain_passages(tokenizer: PreTrainedTokenizerFast) -> None:
    passages = plain_passages(tokenizer, n=50, max_length=60)
    assert len(passages) == 50
    assert all(passage.prompt_length == 0 and len(passage.input_ids) <= 60 for passage in passages)
    assert passages == plain_passages(tokenizer, n=50, max_length=60)
    orders = [[len(p.input_ids) for p in plain_passages(tokenizer, n=50, max_length=999, seed=s)] for s in (0, 1)]
    assert orders[0] != orders[1]
    assert len(plain_passages(tokenizer, n=10_000)) == len(shipped_passages())
    with pytest.raises(ConfigError, match="n=0 and max_length=512 must be at least 1"):
        plain_passages(tokenizer, n=0)


@pytest.mark.parametrize(("passages", "plain"), [(0.0, 0), (0.25, 3), (0.5, 6), (1.0, 12)])
def test_a_recipes_mix(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, passages: float, plain: int
) -> None:
    recipe = Recipe("mix", "test", {"method": "mindskip"}, answer_tokens=5, passages=passages, max_length=9)
    examples = examples_for("self", model, tokenizer, recipe, max_samples=12)
    is_plain = [example.prompt_length == 0 for example in examples]
    assert len(examples) == 12
    assert sum(is_plain) == plain
    assert abs(sum(is_plain[:6]) - plain / 2) <= 0.5  # as many in either half
    assert all(len(e.input_ids) - e.prompt_length <= 5 for e in examples if e.prompt_length)
    assert all(len(e.input_ids) <= 9 for e in examples if not e.prompt_length)


@pytest.mark.parametrize("option", [{"n": 0}, {"max_new_tokens": 0}, {"batch_size": 0}, {"temperature": 0.0}])
def test_arguments_out_of_range(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, option: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(option))}="):
        self_examples(model, tokenizer, **{**SETTINGS, **option})


def test_folder_that_cannot_be_written(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(TuningError, match=r"cannot be kept in .*taken"):
        self_examples(model, tokenizer, cache_dir=tmp_path / "taken", **SETTINGS)


@pytest.mark.model
def test_embedded_model_answers(smollm2_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    model = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.bfloat16)
    examples = self_examples(model, tokenizer, n=4, max_new_tokens=8)
    assert all(isinstance(example, Example) for example in examples)
    prompt = tokenizer.decode(examples[0].input_ids[: examples[0].prompt_length])
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_answers_are_cut_to_the_longest_length(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    whole = self_examples(model, tokenizer, **SETTINGS)
    longest = max(example.prompt_length for example in whole)
    cut = self_examples(model, tokenizer, max_length=longest + 1, **SETTINGS)
    assert cut == [Example(e.input_ids[: longest + 1], e.prompt_length) for e in whole]
    assert any(len(a.input_ids) < len(b.input_ids) for a, b in zip(cut, whole, strict=True))
    lengths = {example.prompt_length for example in whole}
    assert len(lengths) > 1, "this test needs prompts of several lengths"
    with pytest.warns(UserWarning, match=f"leave no room for an answer within max_length={longest}"):
        fewer = self_examples(model, tokenizer, max_length=longest, **SETTINGS)
    assert fewer == [Example(e.input_ids[:longest], e.prompt_length) for e in whole if e.prompt_length < longest]
    with pytest.raises(DataError, match="None of the 10 prompts leaves room"):
        self_examples(model, tokenizer, max_length=1, **SETTINGS)


@pytest.mark.parametrize("source", ["self", "file"])
def test_examples_are_no_longer_than_the_model_reads(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, source: str
) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "why is the sky blue " * 200}) + "\n", encoding="utf-8")
    recipe = Recipe(name="t", source="t", method={"method": "mindskip"}, max_length=10_000, answer_tokens=8)
    given = "self" if source == "self" else tmp_path / "long.jsonl"
    longest = max(len(e.input_ids) for e in examples_for(given, model, tokenizer, recipe, max_samples=4))
    model.config.max_position_embeddings = longest - 1
    found = examples_for(given, model, tokenizer, recipe, max_samples=4)
    assert max(len(e.input_ids) for e in found) == longest - 1
