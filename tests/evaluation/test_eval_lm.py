"""`DynadepthLM`: the harness's numbers, one route a question, whatever the batch."""

import pytest
import torch
from eval_models import BOS
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GPTNeoXConfig, GPTNeoXForCausalLM

from dynadepth import disabled, recording, routing_of
from dynadepth.errors import ConfigError, DataError
from dynadepth.evaluation import continuations
from dynadepth.evaluation.lm_eval import DynadepthLM

CONTEXTS = [
    "Question: why is grass green?\nAnswer:",
    "The dog",
    "A much longer context, which is about nothing at all: so",
]
OPTIONS = [[" yes", " no", " perhaps it is"], [" barks", " barked at it"], [" a", " b", " c", " d"]]


def question(doc, pairs, kind="loglikelihood"):
    return [Instance(kind, {}, pair, i, ("task", doc, 1)) for i, pair in enumerate(pairs)]


def multiple_choice():
    return [
        request
        for doc, (context, options) in enumerate(zip(CONTEXTS, OPTIONS, strict=True))
        for request in question(doc, [(context, option) for option in options])
    ]


def winogrande():
    filled = [f"Sarah was a better surgeon than Maria so {name}" for name in ("Sarah", "Maria")]
    return question(7, [(context, " always got the easier cases.") for context in filled])


def sums(answers):
    return torch.tensor([total for total, _ in answers])


def make_lm(model, tokenizer, batch_size=8, **options):
    return DynadepthLM(model, tokenizer=tokenizer, batch_size=batch_size, **options)


def gemma3():
    torch.manual_seed(0)
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=258,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"] * 2,
            initializer_range=0.3,
            pad_token_id=0,
        )
    ).eval()


def gpt_neox():
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, num_attention_heads=4, initializer_range=0.3)).eval()


@pytest.mark.parametrize("requests", [multiple_choice(), winogrande()], ids=["choices", "winogrande"])
@pytest.mark.parametrize("make", [None, gemma3, gpt_neox], ids=["llama", "gemma3", "gpt_neox"])
def test_a_bare_model_scores_as_in_the_harness(make, requests, llama, tokenizer):
    model = make() if make else llama
    expected = HFLM(model, tokenizer=tokenizer, batch_size=1).loglikelihood(requests, disable_tqdm=True)
    for batch_size in (1, 8):
        found = make_lm(model, tokenizer, batch_size).loglikelihood(requests)
        torch.testing.assert_close(sums(found), sums(expected), rtol=1e-4, atol=1e-3)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("granularity", ["sequence", "token"])
def test_batches_equal_single_requests(make_routed, tokenizer, granularity):
    model = make_routed(granularity)
    requests = multiple_choice() + winogrande()
    many = make_lm(model, tokenizer, 8).loglikelihood(requests)
    one = make_lm(model, tokenizer, 1).loglikelihood(requests)
    torch.testing.assert_close(sums(many), sums(one), rtol=1e-4, atol=1e-3)
    assert [greedy for _, greedy in many] == [greedy for _, greedy in one]


def test_routing_changes_the_scores_and_disabled_does_not(routed, llama, tokenizer):
    lm, requests = make_lm(routed, tokenizer), multiple_choice()
    dense = make_lm(llama, tokenizer).loglikelihood(requests)
    assert (sums(lm.loglikelihood(requests)) - sums(dense)).abs().max() > 0.1
    with disabled(routed):
        torch.testing.assert_close(sums(lm.loglikelihood(requests)), sums(dense))


def reference(model, tokenizer, requests, prompts):
    """One plain forward a request, the router shown the given number of tokens."""
    out = []
    for request, prompt in zip(requests, prompts, strict=True):
        context, continuation = (tokenizer(text)["input_ids"] for text in request.args)
        ids = torch.tensor([context + continuation])
        mask = (torch.arange(ids.shape[1]) < prompt)[None]
        with torch.no_grad():
            logits = model(input_ids=ids, prompt_mask=mask, use_cache=False).logits[0, len(context) - 1 : -1]
        log_probs = logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None])
        out.append(log_probs.sum())
    return torch.stack(out)


def test_the_context_alone_decides_the_route(routed, tokenizer):
    alone = [(context, " and this is all that there is to it") for context in CONTEXTS]
    requests = multiple_choice() + [r for doc, pair in enumerate(alone, 20) for r in question(doc, [pair])]
    expected = reference(routed, tokenizer, requests, [len(r.args[0]) for r in requests])
    torch.testing.assert_close(sums(make_lm(routed, tokenizer).loglikelihood(requests)), expected, rtol=1e-4, atol=1e-3)


def test_contexts_that_differ_are_routed_by_what_they_share(routed, tokenizer):
    requests = winogrande()
    shared = len("Sarah was a better surgeon than Maria so ")
    expected = reference(routed, tokenizer, requests, [shared] * 2)
    with recording() as record:
        found = make_lm(routed, tokenizer).loglikelihood(requests)
    torch.testing.assert_close(sums(found), expected, rtol=1e-4, atol=1e-3)
    assert len(record.sequences) == 1


def test_one_route_a_question_and_more_than_one_among_them(routed, tokenizer):
    with recording() as record:
        make_lm(routed, tokenizer).loglikelihood(multiple_choice())
    assert len(record.sequences) == len(CONTEXTS)
    assert len({str(route) for route in record.sequences}) > 1


def test_each_prompt_is_read_once(llama, tokenizer):
    read = []
    llama.register_forward_pre_hook(lambda _, __, inputs: read.append(inputs["input_ids"].shape), with_kwargs=True)
    make_lm(llama, tokenizer).loglikelihood(multiple_choice())
    # The letters of the third question read the same tokens; the other two are read as contexts, then as options.
    assert read == [(1, len(CONTEXTS[2] + " ")), (2, len(CONTEXTS[0])), (5, len(" perhaps it i"))]


def test_many_continuations_of_one_prompt_are_read_in_parts(llama, tokenizer):
    read = []
    handle = llama.register_forward_pre_hook(lambda _, __, x: read.append(x["input_ids"].shape), with_kwargs=True)
    pairs = [("The dog", f" barks {i} times") for i in range(20)]
    found = make_lm(llama, tokenizer, 1).loglikelihood(question(0, pairs))
    rows = [rows for rows, _ in read]
    assert sorted(zip(rows[::2], rows[1::2], strict=True)) == [(1, 4), (1, 8), (1, 8)]
    handle.remove()
    expected = HFLM(llama, tokenizer=tokenizer).loglikelihood(question(0, pairs), disable_tqdm=True)
    torch.testing.assert_close(sums(found), sums(expected), rtol=1e-4, atol=1e-3)


def test_prompts_whose_rests_are_about_as_long_share_a_batch(llama, tokenizer):
    read = []
    handle = llama.register_forward_pre_hook(lambda _, __, x: read.append(x["input_ids"].shape), with_kwargs=True)
    long, short = " barks at anything that moves", " barks"
    requests = [
        r for i in range(6) for r in question(i, [(f"Dog {i}", f"{(long, short)[i % 2]} {o}") for o in ("ab", "cd")])
    ]
    found = make_lm(llama, tokenizer, 3).loglikelihood(requests)
    assert [shape for shape in read if shape[0] == 6] == [(6, len(f"{long} a")), (6, len(f"{short} a"))]
    handle.remove()
    expected = HFLM(llama, tokenizer=tokenizer).loglikelihood(requests, disable_tqdm=True)
    torch.testing.assert_close(sums(found), sums(expected), rtol=1e-4, atol=1e-3)


def test_where_it_pads_less_prompts_as_long_share_a_batch(llama, tokenizer):
    """Long prompts of two lengths, with short rests."""
    read = []
    llama.register_forward_pre_hook(lambda _, __, x: read.append(x["input_ids"].shape), with_kwargs=True)
    requests = [
        r
        for i, rest in enumerate(("ab", "abc", "abcd", "abcde"))
        for r in question(i, [(f"Dog {i}" * (8 if i % 2 else 2), f" {rest}{o}") for o in ("xy", "zw")])
    ]
    make_lm(llama, tokenizer, 2).loglikelihood(requests)
    assert [shape for shape in read if shape[0] == 2] == [(2, 40), (2, 10)]


def test_models_without_positions_or_caches_to_select_are_read_row_by_row(llama, tokenizer, monkeypatch):
    lm, requests = make_lm(llama, tokenizer), multiple_choice()
    expected = sums(lm.loglikelihood(requests))
    monkeypatch.setattr(continuations, "_selectable", lambda cache: False)
    torch.testing.assert_close(sums(lm.loglikelihood(requests)), expected, rtol=1e-4, atol=1e-3)
    assert not lm.scorer.shares
    torch.testing.assert_close(sums(lm.loglikelihood(requests)), expected, rtol=1e-4, atol=1e-3)


def test_letters_cost_one_row(llama, tokenizer):
    rows = []
    llama.register_forward_pre_hook(lambda _, __, inputs: rows.append(len(inputs["input_ids"])), with_kwargs=True)
    # The space goes to the continuation, so ":" + letter would be two tokens; a context that ends in one is not.
    make_lm(llama, tokenizer).loglikelihood(question(0, [("Answer:", letter) for letter in "ABCD"]))
    assert rows == [1]


def test_no_common_prefix_starts_with_the_harness_prefix(routed, tokenizer):
    requests = question(0, [("Anna", " left early today"), ("Bob", " left early today")])
    lm = make_lm(routed, tokenizer)
    found = lm.loglikelihood(requests)
    eos = tokenizer.decode([lm.prefix_token_id])
    expected = lm.loglikelihood(question(1, [(eos + c, o) for c, o in (r.args for r in requests)]))
    torch.testing.assert_close(sums(found), sums(expected), rtol=1e-4, atol=1e-3)


def test_empty_contexts_are_no_options_of_the_question(llama, tokenizer):
    pairs = [("The dog", " barks"), ("The dog", " sings"), ("", " barks"), ("", " sings")]
    found = make_lm(llama, tokenizer).loglikelihood(question(0, pairs))
    expected = HFLM(llama, tokenizer=tokenizer).loglikelihood(question(0, pairs), disable_tqdm=True)
    torch.testing.assert_close(sums(found), sums(expected), rtol=1e-4, atol=1e-3)


def test_long_contexts_lose_the_same_start_for_all_options(make_routed, tokenizer, caplog):
    model = make_routed(max_position_embeddings=32)
    options = [" yes", " no, not at all"]
    with recording() as record, caplog.at_level("WARNING"):
        make_lm(model, tokenizer).loglikelihood(question(0, [(CONTEXTS[2], option) for option in options]))
    assert len(record.sequences) == 1
    assert "its start is cut" in caplog.text
    with pytest.raises(DataError, match="a continuation has 40 tokens"):
        make_lm(model, tokenizer).loglikelihood(question(0, [("The dog", "x" * 40)]))


def test_rolling_text_is_routed_by_its_first_quarter(routed, tokenizer):
    text = CONTEXTS[2] * 2
    lm = make_lm(routed, tokenizer, max_length=512)
    (found,) = lm.loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, (text,), 0, ("task", 0, 1))], disable_tqdm=True
    )
    ids = torch.tensor([[lm.prefix_token_id, *tokenizer(text)["input_ids"]]])
    mask = torch.zeros_like(ids[:, :-1], dtype=torch.bool)
    mask[:, : mask.shape[1] // 4] = True
    with torch.no_grad():
        log_probs = routed(input_ids=ids[:, :-1], prompt_mask=mask).logits.log_softmax(-1)
    assert found == pytest.approx(log_probs.gather(2, ids[:, 1:, None]).sum().item(), rel=1e-4)


def test_rolling_over_several_windows_scores_every_token(llama, tokenizer):
    request = Instance("loglikelihood_rolling", {}, (CONTEXTS[2] * 4,), 0, ("task", 0, 1))
    expected = HFLM(llama, tokenizer=tokenizer, max_length=64).loglikelihood_rolling([request], disable_tqdm=True)
    found = make_lm(llama, tokenizer, 3, max_length=64).loglikelihood_rolling([request], disable_tqdm=True)
    assert found == pytest.approx(expected, rel=1e-4)


def test_generation_in_batches_equals_single_prompts(routed, tokenizer):
    requests = [
        Instance("generate_until", {}, (c, {"until": ["~"], "max_gen_toks": 12, "do_sample": False}), 0, ("task", i, 1))
        for i, c in enumerate(CONTEXTS)
    ]
    many = make_lm(routed, tokenizer, 8).generate_until(requests, disable_tqdm=True)
    one = make_lm(routed, tokenizer, 1).generate_until(requests, disable_tqdm=True)
    assert many == one
    assert any(many)


def test_tokenizers_with_a_bos_are_not_given_two(llama, bos_tokenizer):
    read = []
    llama.register_forward_pre_hook(lambda _, __, inputs: read.append(inputs["input_ids"]), with_kwargs=True)
    make_lm(llama, bos_tokenizer).loglikelihood(multiple_choice())
    assert all((ids == BOS).sum() <= len(ids) for ids in read)


def test_budget_needs_routers_and_a_number(llama, routed, tokenizer):
    with pytest.raises(ConfigError, match="needs routers"):
        make_lm(llama, tokenizer, budget=0.5)
    with pytest.raises(ConfigError, match="no number"):
        make_lm(routed, tokenizer, budget="half")
    make_lm(routed, tokenizer, budget=1.0)
    assert routing_of(routed).budget == 1.0


def test_the_harness_finds_it_by_name():
    from lm_eval.api.registry import get_model

    assert get_model("dynadepth") is DynadepthLM


@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_last_option_that_reads_nothing_behind_the_prompt(routed, tokenizer, batch_size):
    """Nine options of one context, of which all but one go on; rests are read eight at a time."""
    options = [f" the {word} of it all" for word in ("end", "sum", "top", "gist", "rest", "best", "most", "core")]
    requests = question(3, [("and so we come at last to", option) for option in (*options, "!")])
    expected = reference(routed, tokenizer, requests, [len(r.args[0]) for r in requests])
    found = make_lm(routed, tokenizer, batch_size).loglikelihood(requests)
    torch.testing.assert_close(sums(found), expected, rtol=1e-4, atol=1e-3)
