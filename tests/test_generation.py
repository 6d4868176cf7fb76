"""`generate()` on routed models: in every mode, each row of a batch does what it does alone, on its own sticky route.

Compared are the logits of every step, not the tokens alone: a lost key changes few tokens of a tiny model, but every
logit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from dynadepth import disabled, fixed_routes, recording, routing_of
from small import FAMILIES, KINDS, VOCABULARY, alone, bare, ids, ragged
from small import routed as routed_small

NEW = 7
KIND = pytest.mark.parametrize(("granularity", "kv_policy"), KINDS)
FAMILY = pytest.mark.parametrize("family", FAMILIES)


SKIP_PATHS = ("identity", "linear")


@pytest.fixture(params=SKIP_PATHS, autouse=True)
def skip_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every mode of generation, without and with what skip paths remember."""
    monkeypatch.setitem(SETTINGS, "skip_path", request.param)


SETTINGS: dict[str, Any] = {"skip_rank": 3}


def routed(*args: Any, **config: Any) -> Any:
    return routed_small(*args, **{**SETTINGS, **config})


def generate(model: Any, batch: dict[str, Tensor], **options: Any) -> Any:
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(**batch, **options, return_dict_in_generate=True, output_logits=True)


def same(one: Any, many: Any, row: int, rows_of_one: int = 1) -> None:
    """Rows `row * rows_of_one` and following of `many` have the tokens and logits of `one`."""
    rows = slice(row * rows_of_one, (row + 1) * rows_of_one)
    count = len(one.logits)
    assert torch.equal(one.sequences[:, -count:], many.sequences[rows, -count:])
    for step, (expected, found) in enumerate(zip(one.logits, many.logits, strict=True)):
        torch.testing.assert_close(found[rows], expected, atol=2e-4, rtol=2e-4, msg=lambda m, s=step: f"step {s}: {m}")


def as_one_forward(model: Any, batch: dict[str, Tensor], out: Any) -> None:
    """A plain forward over prompt and answer, routed by the prompt alone, gives the logits of every step."""
    whole, prompt = out.sequences, batch["input_ids"].shape[1]
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    mask = torch.cat([mask, mask.new_ones(len(whole), whole.shape[1] - prompt)], 1)
    found = model(
        input_ids=whole,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        prompt_mask=torch.arange(whole.shape[1]).expand(whole.shape) < prompt,
        use_cache=False,
    ).logits
    torch.testing.assert_close(found[:, prompt - 1 : -1], torch.stack(out.logits, 1), atol=2e-4, rtol=2e-4)


def route_of(cache: Any, row: int) -> list[bool]:
    return [route[row] for route in cache.routes.values()]


def distinct(cache: Any) -> int:
    """How many different routes the rows of a batch took: a test of mixed batches with one route tests nothing."""
    return len(set(zip(*cache.routes.values(), strict=True)))


@FAMILY
@KIND
def test_greedy_in_a_left_padded_batch(family: str, granularity: str, kv_policy: str) -> None:
    model, batch = routed(family, granularity=granularity, kv_policy=kv_policy), ragged([7, 3, 5, 1])
    many = generate(model, batch)
    as_one_forward(model, batch, many)
    assert granularity == "token" or distinct(many.past_key_values) > 2
    for row in range(4):
        one = generate(model, alone(batch, row))
        same(one, many, row)
        assert route_of(one.past_key_values, 0) == route_of(many.past_key_values, row)


@FAMILY
@pytest.mark.parametrize("target", ["mlp", "block"])
@pytest.mark.parametrize("granularity", ["sequence", "token"])
def test_greedy_for_the_other_targets(family: str, target: str, granularity: str) -> None:
    model, batch = routed(family, target=target, granularity=granularity), ragged([6, 2, 4])
    many = generate(model, batch)
    for row in range(3):
        same(generate(model, alone(batch, row)), many, row)


@KIND
def test_sampling_draws_from_the_same_distributions(granularity: str, kv_policy: str) -> None:
    model, batch = routed(granularity=granularity, kv_policy=kv_policy), ragged([6, 2, 4])
    torch.manual_seed(3)
    sampled = generate(model, batch, do_sample=True, top_k=0)
    torch.manual_seed(3)
    again = generate(model, batch, do_sample=True, top_k=0)
    assert torch.equal(sampled.sequences, again.sequences)
    for row in range(3):
        # The single sequence is led along the tokens that were drawn in the batch: its logits must be those drawn from.
        drawn, one = iter(sampled.sequences[row, -NEW:].tolist()), alone(batch, row)
        led = generate(model, one, prefix_allowed_tokens_fn=lambda _, __, drawn=drawn: [next(drawn)])
        same(led, sampled, row)


def test_sampling_one_sequence_equals_sampling_it_dense_when_all_execute() -> None:
    model, prompt = routed(), {"input_ids": ids(1, 5)}
    torch.manual_seed(5)
    with fixed_routes(model, {}):
        kept = generate(model, prompt, do_sample=True)
    torch.manual_seed(5)
    with disabled(model):
        dense = generate(model, prompt, do_sample=True)
    assert torch.equal(kept.sequences, dense.sequences)


@FAMILY
@KIND
def test_beam_search_with_mixed_routes(family: str, granularity: str, kv_policy: str) -> None:
    model, batch = routed(family, granularity=granularity, kv_policy=kv_policy), ragged([6, 2, 4])
    many = generate(model, batch, num_beams=3, output_scores=True)
    assert granularity == "token" or distinct(many.past_key_values) > 1
    for row in range(3):
        one = generate(model, alone(batch, row), num_beams=3, output_scores=True)
        assert torch.equal(one.sequences[0, -NEW:], many.sequences[row, -NEW:])
        torch.testing.assert_close(one.sequences_scores[0], many.sequences_scores[row])


@KIND
def test_beams_score_what_a_plain_forward_scores(granularity: str, kv_policy: str) -> None:
    # Single sequences have one route for all beams, so their cache is reordered on the device.
    model, prompt = routed(granularity=granularity, kv_policy=kv_policy), {"input_ids": ids(1, 6, seed=2)}
    beams = generate(model, prompt, num_beams=4, num_return_sequences=4, output_scores=True, length_penalty=0.0)
    whole = beams.sequences
    prompt_mask = torch.arange(whole.shape[1]).expand(whole.shape) < 6
    logits = model(input_ids=whole, prompt_mask=prompt_mask).logits[:, 5:-1]
    steps = logits.log_softmax(-1).gather(2, whole[:, 6:, None]).squeeze(2)
    torch.testing.assert_close(beams.sequences_scores, steps.sum(1), atol=1e-4, rtol=1e-4)


@KIND
def test_num_return_sequences_share_the_route_of_their_prompt(granularity: str, kv_policy: str) -> None:
    model, batch = routed(granularity=granularity, kv_policy=kv_policy), ragged([6, 2])
    torch.manual_seed(0)
    many = generate(model, batch, do_sample=True, num_return_sequences=3)
    assert many.sequences.shape[0] == 6
    for row in range(6):
        assert route_of(many.past_key_values, row) == route_of(
            generate(model, alone(batch, row // 3)).past_key_values, 0
        )
        drawn = iter(many.sequences[row, -NEW:].tolist())
        led = generate(model, alone(batch, row // 3), prefix_allowed_tokens_fn=lambda _, __, drawn=drawn: [next(drawn)])
        same(led, many, row)


@FAMILY
@KIND
def test_one_token_prompts(family: str, granularity: str, kv_policy: str) -> None:
    model, prompt = routed(family, granularity=granularity, kv_policy=kv_policy), ids(5, 1)
    many = generate(model, {"input_ids": prompt})
    as_one_forward(model, {"input_ids": prompt}, many)
    assert granularity == "token" or distinct(many.past_key_values) > 1
    for row in range(5):
        one = generate(model, {"input_ids": prompt[row : row + 1]})
        same(one, many, row)
        if granularity != "token":
            assert route_of(one.past_key_values, 0) == route_of(many.past_key_values, row)


@FAMILY
@pytest.mark.parametrize(("granularity", "kv_policy"), KINDS[2:])
def test_chunked_prefill_at_token_granularity_changes_nothing(family: str, granularity: str, kv_policy: str) -> None:
    model, batch = routed(family, granularity=granularity, kv_policy=kv_policy), ragged([11, 2, 5])
    whole, chunked = generate(model, batch), generate(model, batch, prefill_chunk_size=3)
    for row in range(3):
        same(generate(model, alone(batch, row)), chunked, row)
    assert torch.equal(whole.sequences, chunked.sequences)


@FAMILY
def test_chunked_prefill_decides_on_each_rows_first_real_chunk(family: str) -> None:
    # Chunks of 4 of 13 tokens: the rows' first real tokens are in chunks 0, 2, 1 and 3 (a single one).
    model, batch = routed(family), ragged([13, 4, 6, 1])
    with recording() as record:
        chunked = generate(model, batch, prefill_chunk_size=4)
    assert len(record.sequences) == 4
    for row, (start, stop) in enumerate([(0, 4), (9, 12), (7, 8), (12, 13)]):
        first = model(input_ids=batch["input_ids"][row : row + 1, start:stop]).past_key_values
        route = route_of(first, 0)
        assert route_of(chunked.past_key_values, row) == route
        assert list(record.sequences[row].values()) == [float(on) for on in route]
        with fixed_routes(model, dict(zip(routing_of(model).sites, route, strict=True))):
            same(generate(model, alone(batch, row)), chunked, row)
    assert distinct(chunked.past_key_values) > 2


def test_chunked_prefill_from_the_generation_config() -> None:
    model, batch = routed(), ragged([9, 3])
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    found = model.generate(**batch, generation_config=GenerationConfig(prefill_chunk_size=4, pad_token_id=0, **options))
    assert torch.equal(found.sequences, generate(model, batch, prefill_chunk_size=4).sequences)


class Collect(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens.extend(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@KIND
def test_streaming(granularity: str, kv_policy: str) -> None:
    model, prompt, streamer = routed(granularity=granularity, kv_policy=kv_policy), {"input_ids": ids(1, 5)}, Collect()
    out = generate(model, prompt, streamer=streamer)
    assert streamer.ended
    assert streamer.tokens == out.sequences[0].tolist() == generate(model, prompt).sequences[0].tolist()


@FAMILY
@KIND
@pytest.mark.parametrize("form", ["whole conversation", "new tokens alone"])
def test_continued_chats_keep_route_and_keys(family: str, granularity: str, kv_policy: str, form: str) -> None:
    model, batch = routed(family, granularity=granularity, kv_policy=kv_policy), ragged([7, 3, 5])
    first = generate(model, batch)
    cache, routes = first.past_key_values, {s: list(r) for s, r in first.past_key_values.routes.items()}
    turn = ids(3, 4, seed=9)
    whole = torch.cat([first.sequences, turn], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones(3, NEW + 4, dtype=torch.long)], 1)
    new = whole if form == "whole conversation" else whole[:, cache.seen :]
    second = generate(model, {"input_ids": new, "attention_mask": mask}, past_key_values=cache)
    assert second.past_key_values is cache
    assert cache.routes == routes
    for row in range(3):
        # The same conversation from its start, without a cache of the first turn, under the first turn's route.
        real = mask[row].bool()
        route = {site: route[row] for site, route in routes.items()}
        prompt = {"input_ids": whole[row : row + 1, real], "attention_mask": mask[row : row + 1, real]}
        if granularity == "token":
            same(generate(model, prompt), second, row)
        else:
            with fixed_routes(model, route):
                same(generate(model, prompt), second, row)


@FAMILY
@KIND
@pytest.mark.parametrize("empty", ["with config", "without config"])
def test_an_empty_cache_of_the_callers_own_fills(family: str, granularity: str, kv_policy: str, empty: str) -> None:
    model, batch = routed(family, granularity=granularity, kv_policy=kv_policy), ragged([7, 3, 5])
    mine = DynamicCache(config=model.config) if empty == "with config" else DynamicCache()
    out = generate(model, batch, past_key_values=mine)
    assert out.past_key_values is mine
    assert mine.get_seq_length() == 7 + NEW - 1
    assert mine.kv_bytes() > 0
    reference = generate(model, batch)
    assert torch.equal(out.sequences, reference.sequences)
    assert mine.routes == reference.past_key_values.routes


@FAMILY
@KIND
def test_a_routed_assistant_never_changes_a_dense_models_words(family: str, granularity: str, kv_policy: str) -> None:
    main, prompt = bare(family), {"input_ids": ids(1, 6, seed=4)}
    assistant = routed(family, granularity=granularity, kv_policy=kv_policy)
    dense = generate(main, prompt, max_new_tokens=12)
    assisted = generate(main, prompt, max_new_tokens=12, assistant_model=assistant)
    same(dense, assisted, 0)


@FAMILY
@KIND
def test_a_dense_assistants_draft_does_not_change_a_routed_models_route(
    family: str, granularity: str, kv_policy: str
) -> None:
    main = routed(family, granularity=granularity, kv_policy=kv_policy)
    for seed in range(3):
        prompt = {"input_ids": ids(1, 3, seed=seed)}
        plain = generate(main, prompt, max_new_tokens=12)
        assisted = generate(main, prompt, max_new_tokens=12, assistant_model=bare(family))
        same(plain, assisted, 0)
        assert assisted.past_key_values.routes == plain.past_key_values.routes
        looked_up = generate(main, prompt, max_new_tokens=12, prompt_lookup_num_tokens=3)
        same(plain, looked_up, 0)


def test_both_routed_with_different_sites() -> None:
    main, assistant = routed(layers=(1, 2)), routed(layers=(0, 3), granularity="token")
    prompt = {"input_ids": ids(1, 5, seed=6)}
    with recording() as record:
        same(generate(main, prompt), generate(main, prompt, assistant_model=assistant), 0)
    assert {site.layer for site in record.site_keep()} == {0, 1, 2, 3}


@KIND
def test_a_model_that_drafts_for_itself_by_an_early_exit(granularity: str, kv_policy: str) -> None:
    model, prompt = routed(granularity=granularity, kv_policy=kv_policy), {"input_ids": ids(1, 5)}
    same(generate(model, prompt), generate(model, prompt, assistant_early_exit=2), 0)


def test_tokens_stay_in_the_vocabulary_without_a_mask_given() -> None:
    # The mask is made from the padding, as for the bare model: its name must be in the routed forward's signature.
    model, batch = routed(), ragged([6, 2])
    bare_ids = model.generate(input_ids=batch["input_ids"], max_new_tokens=NEW, do_sample=False)
    assert torch.equal(bare_ids, generate(model, batch).sequences)
    assert bare_ids.max() < VOCABULARY
