"""The head applied apart from the backbone gives the model's own log-probabilities."""

import threading

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from dynadepth import vocabulary
from dynadepth.evaluation.scoring import Scorer, log_prob_chunks, pair_log_probs

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


def gemma2():
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, final_logit_softcapping=3.0))


def granite():
    return GraniteForCausalLM(GraniteConfig(**SIZES, num_key_value_heads=2, logits_scaling=4.0))


def gpt_neox():
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES))


def unknown_head():
    model = granite()
    head_forward = model.forward
    model.forward = lambda **inputs: (lambda out: out.__setitem__("logits", out.logits**3) or out)(
        head_forward(**inputs)
    )
    return model


def inputs(vocabulary=64):
    ids = torch.randint(0, vocabulary, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(12) < torch.tensor([12, 7, 9])[:, None]
    return ids, mask, mask


@pytest.mark.parametrize("make", [gemma2, granite, gpt_neox, unknown_head])
def test_logits_are_the_models_own(make):
    torch.manual_seed(0)
    model = make().eval()
    ids, mask, prompt = inputs()
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask.long()).logits
    scorer = Scorer(model, takes_prompt_mask=False)
    for _ in range(2):  # the first forward finds out what the head's output goes through
        states = scorer(ids, mask, prompt)
        torch.testing.assert_close(states.to_logits(states.states_BTD), expected)
    assert (states.states_BTD.shape[-1] == 64) == (make is unknown_head)


def test_a_declared_soft_cap_is_applied_though_small_logits_hide_it():
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(
        Gemma2Config(**SIZES | {"initializer_range": 1e-5}, num_key_value_heads=2, head_dim=8)
    ).eval()
    scorer = Scorer(model, takes_prompt_mask=False)
    states = scorer(*inputs())
    assert scorer._finish(torch.tensor([1000.0])).item() == pytest.approx(30.0)
    assert states.states_BTD.shape[-1] == 32


def test_the_head_sees_one_position_a_row_and_no_hook_stays(llama):
    seen = []
    handle = llama.lm_head.register_forward_hook(lambda _, args, __: seen.append(args[0].shape))
    ids, mask, prompt = inputs()
    Scorer(llama, takes_prompt_mask=False)(ids, mask, prompt)
    assert seen == [(3, 1, 32)]
    handle.remove()
    assert not llama.lm_head._forward_pre_hooks
    assert not llama.lm_head._forward_hooks


def test_another_thread_gets_whole_logits_meanwhile(llama):
    ids, mask, prompt = inputs()
    shapes = []

    def other(*_):
        if threading.current_thread() is threading.main_thread() and not shapes:
            shapes.append(None)
            thread = threading.Thread(target=lambda: shapes.append(llama(input_ids=ids).logits.shape))
            thread.start()
            thread.join()

    llama.model.norm.register_forward_hook(other)
    Scorer(llama, takes_prompt_mask=False)(ids, mask, prompt)
    assert shapes[1] == (3, 12, 258)


def test_pairs_are_looked_up_in_any_order_and_across_chunks(monkeypatch):
    states = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(11, 5, generator=torch.Generator().manual_seed(1))
    calls = []

    def head(x):
        calls.append(len(x))
        return x @ weight.T

    monkeypatch.setattr(vocabulary, "CHUNK_ELEMENTS", 33)  # three positions a chunk
    positions, tokens = torch.tensor([6, 0, 6, 3, 0]), torch.tensor([1, 2, 3, 4, 10])
    log_probs, top = pair_log_probs(states, head, positions, tokens)
    expected = (states @ weight.T).log_softmax(-1)
    torch.testing.assert_close(log_probs, expected[positions, tokens])
    assert torch.equal(top, expected.argmax(-1)[positions] == tokens)
    assert calls == [1, 3, 3, 1]
    assert [start for start, _ in log_prob_chunks(states, head)] == [0, 3, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pairs_and_whole_rows_have_the_same_log_probabilities(dtype):
    """A dense model has one perplexity, scored alone or beside a routed one."""
    states = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = torch.randn(9001, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    tokens = torch.arange(64) * 140
    pairs, _ = pair_log_probs(states, lambda x: x @ weight.T, torch.arange(64), tokens)
    rows = torch.cat([chunk for _, chunk in log_prob_chunks(states, lambda x: x @ weight.T)])
    assert torch.equal(pairs, rows[torch.arange(64), tokens])


def test_half_precision_logits_become_float32_before_the_softmax():
    states = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.randn(32, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    log_probs, _ = pair_log_probs(states, lambda x: x @ weight.T, torch.arange(4), torch.tensor([1, 2, 3, 4]))
    expected = (states @ weight.T).float().log_softmax(-1)
    assert torch.equal(log_probs, expected[torch.arange(4), torch.tensor([1, 2, 3, 4])])


def test_the_head_is_given_states_that_fold():
    """A head whose weight is frozen copies it once a row for a slice of the states: several times a whole prefill."""
    model = gpt_neox().eval().requires_grad_(False)
    given = []
    scorer = Scorer(model, False)
    model.get_output_embeddings().register_forward_hook(lambda head, args, output: given.append(args[0]))
    ids, mask, _ = inputs()
    scorer(ids, mask, None)
    assert [tuple(states.shape) for states in given] == [(3, 1, 32)]
    assert all(states.is_contiguous() for states in given)
