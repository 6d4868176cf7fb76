"""Nothing that comes later changes what came before, and no route knows its answer.

At token granularity that holds for every position; at sequence granularity from the prompt's last token on, since the
route is decided from the whole prompt.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForSequenceClassification, LlamaForTokenClassification

from dynadepth import MindSkipConfig, Site, attach, detach, fixed_routes, routing_of
from dynadepth.routing.forward import content_prefix
from dynadepth.routing.granularity import PerSequence
from small import ALL, COMMON, FAMILIES, VOCABULARY, ids, ragged, routed, scatter

LENGTH, PROMPT = 10, 4
FAMILY = pytest.mark.parametrize("family", FAMILIES)
MODE = pytest.mark.parametrize("training", [False, True], ids=["sparse", "masked"])


def changed(tokens: Tensor, place: int) -> Tensor:
    """The same ids with others from `place` on."""
    return torch.where(torch.arange(tokens.shape[1]) >= place, tokens % (VOCABULARY - 1) + 1, tokens)


def first(count: int, like: Tensor) -> Tensor:
    return (torch.arange(like.shape[1]) < count).expand(like.shape)


def forward(model: Any, tokens: Tensor, **more: Tensor) -> Tensor:
    return model(input_ids=tokens, **more).logits.detach()


@FAMILY
@MODE
@pytest.mark.parametrize(
    ("target", "kv_policy"),
    [("attention", "project"), ("attention", "drop"), ("mlp", "project"), ("block", "project"), ("block", "drop")],
)
def test_at_token_granularity_no_position_sees_later_ones(
    family: str, training: bool, target: str, kv_policy: str
) -> None:
    model = routed(family, granularity="token", target=target, kv_policy=kv_policy).train(training)
    tokens = ids(2, LENGTH)
    before = forward(model, tokens)
    for place in range(1, LENGTH):
        after = forward(model, changed(tokens, place))
        torch.testing.assert_close(after[:, :place], before[:, :place], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(after[:, -1], before[:, -1], atol=1e-3)


@FAMILY
@MODE
@pytest.mark.parametrize("target", ["attention", "mlp", "block"])
def test_at_sequence_granularity_none_from_the_prompts_end_on(family: str, training: bool, target: str) -> None:
    model, tokens = routed(family, target=target).train(training), ids(12, LENGTH)
    prompt = first(PROMPT, tokens)
    before = forward(model, tokens, prompt_mask=prompt)
    for place in range(PROMPT, LENGTH):
        after = forward(model, changed(tokens, place), prompt_mask=prompt)
        torch.testing.assert_close(after[:, :place], before[:, :place], atol=1e-5, rtol=1e-5)
    # The prompt itself does decide: without this the test would hold for a route that is always the same.
    inside = forward(model, changed(tokens, PROMPT - 1), prompt_mask=prompt)
    assert not torch.allclose(inside[:, 0], before[:, 0], atol=1e-3)


@MODE
def test_labels_tell_the_prompt(training: bool) -> None:
    model, tokens = routed().train(training), ids(4, LENGTH)
    labels = tokens.masked_fill(first(PROMPT, tokens), -100)
    out = model(input_ids=tokens, labels=labels)
    prompt_alone = model(input_ids=tokens[:, :PROMPT])
    for site, logits in out.depth_logits.items():
        if site.layer == 0:  # higher layers see the same prompt, too, but through attention of their own length
            torch.testing.assert_close(logits, prompt_alone.depth_logits[site])
        torch.testing.assert_close(logits, prompt_alone.depth_logits[site], atol=1e-4, rtol=1e-4)
    answer = changed(tokens, PROMPT)
    other = model(input_ids=answer, labels=answer.masked_fill(first(PROMPT, tokens), -100))
    for site, logits in out.depth_logits.items():
        assert torch.equal(logits, other.depth_logits[site])


def test_labelled_tokens_inside_a_conversation_are_not_pooled() -> None:
    # Two labelled turns: what lies between them comes after the first answer, and is not the prompt.
    model, tokens = routed().train(), ids(1, LENGTH)
    labels = torch.full_like(tokens, -100)
    labels[:, [3, 4, 8]] = tokens[:, [3, 4, 8]]
    out, other = (model(input_ids=t, labels=labels) for t in (tokens, changed(tokens, 3)))
    assert all(torch.equal(out.depth_logits[site], other.depth_logits[site]) for site in out.depth_logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_pooled_and_not_the_prompt(side: str) -> None:
    model, batch = routed().train(), ragged([7, 4], side=side)
    real = batch["attention_mask"].bool()
    rank = real.cumsum(1)
    labels = batch["input_ids"].masked_fill(~real | (rank <= 2), -100)
    out = model(**batch, labels=labels)
    for row in range(2):
        one = model(input_ids=batch["input_ids"][row : row + 1, real[row]], labels=labels[row : row + 1, real[row]])
        for site, logits in out.depth_logits.items():
            torch.testing.assert_close(logits[row], one.depth_logits[site][0], atol=1e-4, rtol=1e-4)


def test_not_even_nan_comes_out_of_padding() -> None:
    hidden, mask = torch.randn(2, 3, 4), torch.tensor([[False, True, True], [True, True, True]])
    context = SimpleNamespace(pool_mask=mask, padding_unknown=False)
    wanted = PerSequence().pool(hidden, context)
    torch.testing.assert_close(wanted, torch.stack([hidden[0, 1:].mean(0), hidden[1].mean(0)]))
    hidden[0, 0] = torch.nan
    assert torch.equal(PerSequence().pool(hidden, context), wanted)


def test_a_prompt_mask_is_honoured_before_labels() -> None:
    model, tokens = routed().train(), ids(3, LENGTH)
    labels = tokens.masked_fill(first(6, tokens), -100)
    by_mask = model(input_ids=tokens, labels=labels, prompt_mask=first(3, tokens))
    by_labels = model(input_ids=tokens, labels=tokens.masked_fill(first(3, tokens), -100))
    for site, logits in by_mask.depth_logits.items():
        assert torch.equal(logits, by_labels.depth_logits[site])


def test_a_prompt_mask_reaches_generation() -> None:
    model, tokens = routed(), ids(3, LENGTH)
    options = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True}
    with_mask = model.generate(tokens, prompt_mask=first(PROMPT, tokens), **options)
    assert with_mask.past_key_values.routes == model(input_ids=tokens[:, :PROMPT]).past_key_values.routes
    assert with_mask.past_key_values.routes != model.generate(tokens, **options).past_key_values.routes


@pytest.mark.parametrize("granularity", ["sequence", "route"])
@pytest.mark.parametrize(
    "parts", [{"prefill_chunk_size": 3}, {"prefill_chunk_size": PROMPT + 1}, {"prompt_lookup_num_tokens": 3}], ids=str
)
def test_a_prompt_mask_reaches_every_part_of_a_prefill(granularity: str, parts: dict[str, int]) -> None:
    """`generate` hands the mask of the whole prompt to each chunk, and to prompts with drafted tokens behind them."""
    model = routed(granularity=granularity)

    def route(tokens: Tensor) -> dict[Site, list[int]]:
        return model(input_ids=tokens).past_key_values.routes

    behind = ids(1, 3).repeat(1, 2)  # there is something to look up
    prompts = (torch.cat([ids(1, PROMPT, seed=seed), behind], 1) for seed in range(50))
    tokens = next(t for t in prompts if len({str(route(t[:, :n])) for n in (3, PROMPT, LENGTH)}) == 3)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    wanted = route(tokens[:, : min(PROMPT, parts.get("prefill_chunk_size", PROMPT))])
    found = model.generate(tokens, prompt_mask=first(PROMPT, tokens), **parts, **options)
    assert found.past_key_values.routes == wanted


# ---- plain text: a prefix of pseudo-random length is the prompt


def prefix_lengths(tokens: Tensor, mask: Tensor | None = None) -> list[int]:
    return content_prefix(tokens, torch.ones_like(tokens).bool() if mask is None else mask.bool()).sum(1).tolist()


def test_the_prefix_depends_on_the_row_alone() -> None:
    tokens = ids(6, 40)
    alone = [prefix_lengths(tokens[row : row + 1])[0] for row in range(6)]
    assert prefix_lengths(tokens) == alone
    assert prefix_lengths(tokens.flip(0)) == alone[::-1]
    for side in ("left", "right"):
        batch = ragged([40, 24, 11, 1], side=side, total=50)
        wanted = [prefix_lengths(row[mask.bool()][None])[0] for row, mask in zip(*batch.values(), strict=True)]
        assert prefix_lengths(*batch.values()) == wanted
        assert not (content_prefix(*map(torch.Tensor.clone, batch.values())) & (batch["attention_mask"] == 0)).any()


def test_the_prefix_varies_and_leaves_something_to_score() -> None:
    lengths = prefix_lengths(ids(200, 40))
    assert min(lengths) >= 5
    assert max(lengths) <= 30
    assert len(set(lengths)) > 15


def test_no_token_behind_the_prefix_changes_its_length() -> None:
    tokens = ids(20, 40)
    for row in tokens.split(1):
        (length,) = prefix_lengths(row)
        assert all(prefix_lengths(changed(row, place)) == [length] for place in range(length, 40))


def test_in_plain_text_the_pooled_prefix_is_not_scored_and_decides() -> None:
    model, tokens = routed().train(), ids(3, 24)
    prefix = content_prefix(tokens, torch.ones_like(tokens).bool())
    plain = model(input_ids=tokens, labels=tokens)
    explicit = model(input_ids=tokens, labels=tokens.masked_fill(prefix, -100), prompt_mask=prefix)
    torch.testing.assert_close(plain.loss, explicit.loss)
    assert all(torch.equal(plain.depth_logits[site], explicit.depth_logits[site]) for site in plain.depth_logits)
    whole = model(input_ids=tokens, labels=tokens, prompt_mask=prefix)
    assert not torch.allclose(whole.loss, plain.loss)


def test_at_token_granularity_every_label_is_scored() -> None:
    model, tokens = routed(granularity="token").train(), ids(2, 12)
    logits = model(input_ids=tokens).logits
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    out = model(input_ids=tokens, labels=tokens)
    torch.testing.assert_close(out.loss - out.depth_loss, wanted)


def test_the_callers_labels_are_left_alone() -> None:
    model, tokens = routed().train(), ids(2, 12)
    labels = tokens.clone()
    model(input_ids=tokens, labels=labels)
    assert torch.equal(labels, tokens)


@FAMILY
def test_a_prefill_in_one_piece_answers_as_the_masked_forward(family: str) -> None:
    # The route of generation, from its prompt alone, is the one that training gives the same prompt.
    model, tokens = routed(family), ids(4, LENGTH)
    masked = model.train()(input_ids=tokens, prompt_mask=first(PROMPT, tokens))
    model.eval()
    cache = model(input_ids=tokens[:, :PROMPT]).past_key_values
    for site, decision in masked.depth_trace.decisions.items():
        assert decision.execute.tolist() == cache.routes[site]
    rest = model(input_ids=tokens[:, PROMPT:], past_key_values=cache)
    torch.testing.assert_close(rest.logits, masked.logits[:, PROMPT:].detach(), atol=1e-4, rtol=1e-4)
    with fixed_routes(model, {site: torch.tensor(cache.routes[site]) for site in routing_of(model).sites}):
        torch.testing.assert_close(forward(model, tokens)[:, PROMPT:], rest.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("granularity", ["sequence", "route", "token"])
def test_labels_of_a_classifier_are_no_tokens(granularity: str) -> None:
    """They are neither read as positions nor changed, and every real token may be pooled."""
    torch.manual_seed(3)
    many = LlamaForSequenceClassification(LlamaConfig(**COMMON, num_labels=6)).eval()
    tags = LlamaForTokenClassification(LlamaConfig(**COMMON, num_labels=3)).eval()
    batch = ragged([6, 3, 5])
    for model, labels in (
        (many, torch.tensor([0, 1, 2])),
        (many, torch.rand(3, 6)),  # several labels a text, as many as there are tokens
        (tags, batch["input_ids"] % 3),
    ):
        many.config.problem_type = None
        wanted = model(**batch, labels=labels).loss
        scatter(attach(model, MindSkipConfig(layers=ALL, granularity=granularity)))
        many.config.problem_type = None
        with fixed_routes(model, {}):
            assert torch.equal(model(**batch, labels=labels).loss, wanted)
        routes = [model(**batch, **given).depth_trace.decisions for given in ({}, {"labels": labels})]
        for site, decision in routes[0].items():
            assert torch.equal(decision.execute, routes[1][site].execute)
        loss = model.train()(**batch, labels=labels)
        assert torch.isfinite(loss.loss)
        detach(model.eval())
