"""Semantics 2, 3, 5, 6 and 11 where rows of one batch skip, execute and repeat whole layers.

The oracle is the bare model with hooks: every layer runs, then once more on its own output, and each row takes the one
of the three that its decision names.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import dynadepth
from dynadepth import MindSkipConfig, Site
from dynadepth.benchmark import pruned_twin
from dynadepth.benchmark.memory import cache_bytes
from dynadepth.errors import ConfigError
from dynadepth.methods.drllm import DrLLMConfig
from dynadepth.routing.cache import RoutedCache
from transfers import host_transfers

from .matrix import BATCH, LAYER_RANGE, TOKENS, assert_same, in_chunks, inputs
from .models import FAMILIES, VOCABULARY, tiny
from .oracle import layers_of

SIDES = pytest.mark.parametrize("side", ["left", "right"])
NAMES = pytest.mark.parametrize("name", FAMILIES)
FEW = pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox_serial"])
PATTERN = ((2, 0, 1), (0, 1, 2), (1, 1, 2), (2, 2, 2))
"""How often each row executes each layer; the first row of a left-padded batch begins after the others."""
NEW = 5


def decisions() -> dict[Site, Tensor]:
    return {Site(layer, "block"): torch.tensor(PATTERN[layer]) for layer in LAYER_RANGE}


def attach(model: Any) -> Any:
    return dynadepth.attach(model, DrLLMConfig(hidden=6, windows=3))


def routed(name: str, seed: int = 0) -> Any:
    """A tiny model whose random routers take all three actions on `inputs()`."""
    model = attach(tiny(name))
    generator = torch.Generator().manual_seed(seed)
    for router in dynadepth.routing_of(model).routers().values():
        with torch.no_grad():
            for parameter in router.parameters():
                parameter.copy_(2 * torch.randn(parameter.shape, generator=generator))
    return model


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def reference(bare: Any, given: dict[Site, Tensor], batch: dict[str, Tensor]) -> Any:
    """The bare model's outputs under `given`."""
    running: list[int] = []

    def hook(times: Tensor, layer: Any, args: Any, kwargs: Any, output: Any) -> Any:
        if running:
            return None
        running.append(1)
        hidden = args[0] if args else kwargs["hidden_states"]
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        twice = _first(layer(_first(output), *args[1:], **rest))
        running.pop()
        choices = torch.stack([hidden, _first(output), twice])
        mixed = choices[times, torch.arange(len(times))]
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    hooks = [
        layers_of(bare)[site.layer].register_forward_hook(partial(hook, times), with_kwargs=True, prepend=True)
        for site, times in given.items()
    ]
    try:
        return bare(**batch, use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()


@SIDES
@NAMES
def test_one_decision_three_paths(name: str, side: str) -> None:
    model, batch, given = tiny(name), inputs(side), decisions()
    real = batch["attention_mask"]
    wanted = reference(model, given, batch).logits
    once = {site: times.clamp(max=1) for site, times in given.items()}
    assert (wanted - reference(model, once, batch).logits)[real.bool()].abs().max() > 0.1, "repeats change nothing"
    attach(model)
    with torch.no_grad(), dynadepth.fixed_routes(model, given):
        assert_same(model(**batch).logits, wanted, real)
        assert_same(model(**batch, use_cache=False).logits, wanted, real)
        assert_same(model.train()(**batch).logits, wanted, real)
    model.eval()
    for lengths in ((7, 3, 1, 1), (3, 4, 4, 1)):  # in the latter, a row brings nothing but padding at first
        steps = in_chunks(model, batch, lengths, given)
        assert_same(torch.cat([out.logits for out in steps], 1), wanted, real)


@NAMES
def test_a_batch_is_its_sequences(name: str) -> None:
    model, batch = routed(name), inputs()
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    together = model.generate(**batch, **options)
    cache, taken = together.past_key_values, set()
    for row in range(BATCH):
        real = batch["attention_mask"][row].bool()
        alone = {key: value[row, real].unsqueeze(0) for key, value in batch.items()}
        own = model.generate(**alone, **options)
        assert torch.equal(own.sequences[0, -NEW:], together.sequences[row, -NEW:])
        assert_same(torch.stack(own.logits, 1)[0], torch.stack(together.logits, 1)[row], atol=1e-4)
        for site, route in cache.routes.items():
            assert own.past_key_values.routes[site] == [route[row]]
            taken.add(int(route[row]))
    assert taken == {0, 1, 2}, "another seed: not all actions are taken"


@FEW
@pytest.mark.parametrize(
    ("rows", "change"),
    [
        ([2, 0, 0], lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0]))),
        ([2, 1], lambda cache: cache.batch_select_indices(torch.tensor([2, 1]))),
        ([1], lambda cache: cache.batch_select_indices(torch.tensor([1]))),
        ([0, 0, 1, 1, 2, 2], lambda cache: cache.batch_repeat_interleave(2)),
    ],
)
def test_rows_take_their_second_pass_along(name: str, rows: list[int], change: Any) -> None:
    model, batch, given = attach(tiny(name)), inputs(), decisions()
    wanted = torch.cat([out.logits for out in in_chunks(model, batch, (9, 1, 1, 1), given)], 1)
    with torch.no_grad(), dynadepth.fixed_routes(model, given):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        cache = model(input_ids=ids[:, :9], attention_mask=mask[:, :9]).past_key_values
        change(cache)
        for t in range(9, TOKENS):
            out = model(input_ids=ids[rows, t : t + 1], attention_mask=mask[rows, : t + 1], past_key_values=cache)
            assert_same(out.logits[:, 0], wanted[rows, t])


@FEW
def test_tokens_taken_back(name: str) -> None:
    model, batch, given = attach(tiny(name)), inputs(), decisions()
    wanted = torch.cat([out.logits for out in in_chunks(model, batch, (9, 1, 1, 1), given)], 1)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    with torch.no_grad(), dynadepth.fixed_routes(model, given):
        model(input_ids=ids[:, :9], attention_mask=mask[:, :9], past_key_values=cache)
        wrong = ids[:, 9:11].flip(1) % 7 + 1
        model(input_ids=wrong, attention_mask=mask[:, :11], past_key_values=cache)
        cache.crop(-2)
        for t in range(9, TOKENS):
            out = model(input_ids=ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache)
            assert_same(out.logits[:, 0], wanted[:, t])
        cache.reset()
        with dynadepth.disabled(model):
            assert model(input_ids=ids, attention_mask=mask, past_key_values=cache).past_key_values is cache
        assert type(cache) is DynamicCache
        assert len(cache.layers) == len(LAYER_RANGE)


@pytest.mark.parametrize("training", [True, False], ids=["masked", "sparse"])
@NAMES
def test_the_future_changes_nothing(name: str, training: bool) -> None:
    """Neither of the routes, which the prompt decides, nor of any pass at tokens before it."""
    batch, prompt = inputs(), 6
    ids, mask = batch["input_ids"], batch["attention_mask"]
    labels = ids.masked_fill(torch.arange(TOKENS) < prompt, -100)
    model = routed(name).train(training)
    with torch.no_grad():
        before = model(**batch, labels=labels)
        assert {int(count) for count in torch.cat(_routes(before))} == {0, 1, 2}
        for changed in range(prompt, TOKENS):
            other = ids.clone()
            other[:, changed:] = (other[:, changed:] + 11) % (VOCABULARY - 1) + 1
            after = model(input_ids=other, attention_mask=mask, labels=labels)
            assert_same(after.logits[:, :changed], before.logits[:, :changed], mask[:, :changed].bool(), atol=1e-5)
            assert (after.logits[:, changed] - before.logits[:, changed]).abs().max() > 0.1
            assert torch.equal(torch.stack(_routes(after)), torch.stack(_routes(before)))


def _routes(outputs: Any) -> list[Tensor]:
    """How often each layer executes, by row."""
    decisions = outputs.depth_trace.decisions.values()
    return [one.execute.long() if one.repeat is None else one.execute.long() + one.repeat.long() for one in decisions]


@SIDES
@NAMES
def test_prompts_of_one_token(name: str, side: str) -> None:
    """Fewer tokens than windows, in a batch beside longer prompts."""
    model, batch = routed(name), inputs(side)
    first = batch["attention_mask"][0].nonzero().flatten()
    batch["attention_mask"][0, first[:-1] if side == "left" else first[1:]] = 0
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)  # GPT-2's are absolute
    with torch.no_grad():
        together = model(**batch)
        for row in range(BATCH):
            real = batch["attention_mask"][row].bool()
            alone = model(**{key: value[row, real].unsqueeze(0) for key, value in batch.items()})
            assert_same(alone.logits[0], together.logits[row, real], atol=1e-4)
            assert [int(r[0]) for r in _routes(alone)] == [int(r[row]) for r in _routes(together)]
    assert batch["attention_mask"][0].sum() == 1


@FEW
def test_a_continued_chat(name: str) -> None:
    """A second turn on the cache of the first: the route stays, and the logits are those of one forward under it."""
    model, batch = routed(name), inputs()
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "pad_token_id": 0}
    first = model.generate(**batch, **options)
    routes = {site: list(route) for site, route in first.past_key_values.routes.items()}
    assert {count for route in routes.values() for count in route} == {0, 1, 2}
    turn = torch.cat([first.sequences, batch["input_ids"][:, :3]], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones(BATCH, NEW + 3, dtype=torch.long)], 1)
    again = model.generate(
        input_ids=turn, attention_mask=mask, past_key_values=first.past_key_values, output_logits=True, **options
    )
    assert again.past_key_values.routes == routes
    whole = torch.cat([mask, torch.ones(BATCH, NEW, dtype=torch.long)], 1)
    with torch.no_grad(), dynadepth.fixed_routes(model, {s: torch.tensor(r) for s, r in routes.items()}):
        wanted = model(input_ids=again.sequences, attention_mask=whole).logits[:, turn.shape[1] - 1 : -1]
    assert_same(torch.stack(again.logits, 1), wanted, atol=1e-4)


@NAMES
def test_host_transfers(name: str) -> None:
    """One question a site where rows differ, none once the route is known."""
    model, batch, last = routed(name), inputs(), TOKENS - 1
    with torch.no_grad(), host_transfers() as asked:
        cache = model(batch["input_ids"][:, :last], attention_mask=batch["attention_mask"][:, :last]).past_key_values
        assert 1 <= len(asked) <= len(LAYER_RANGE), asked
        asked.clear()
        model(batch["input_ids"][:, last:], attention_mask=batch["attention_mask"], past_key_values=cache)
        assert not asked, asked


@FEW
def test_every_pass_has_its_keys_and_is_counted(name: str) -> None:
    model, batch = attach(tiny(name)), inputs()
    batch = {key: value[1:2] for key, value in batch.items()}  # a row without padding
    calls = dict.fromkeys(LAYER_RANGE, 0)
    for index, layer in enumerate(layers_of(model)):

        def count(*_: Any, index: int = index) -> None:
            calls[index] += 1

        layer.mlp.register_forward_hook(count)
    with torch.no_grad():
        with dynadepth.disabled(model):
            dense = cache_bytes(model(**batch).past_key_values)
        calls.update(dict.fromkeys(calls, 0))
        route = {Site(0, "block"): 2, Site(1, "block"): 0, Site(2, "block"): 2, Site(3, "block"): 1}
        with dynadepth.fixed_routes(model, route), dynadepth.recording() as record:
            cache = model(**batch).past_key_values
    assert calls == {site.layer: times for site, times in route.items()}
    assert isinstance(cache, RoutedCache)
    assert record.depth() == 5
    keep = record.keep_ratio()
    assert keep is not None
    assert (keep.routed, keep.all) == (0.75, 0.75)
    assert record.sequences == [{site: float(times) for site, times in route.items()}]
    share = dynadepth.cost.kv_share(model, record.site_passes(), TOKENS)
    if name == "gemma3":  # layers 0 and 2 hold a window less one
        assert cache.kv_bytes() == pytest.approx(share * dense)
    else:
        assert cache.kv_bytes() == dense * 5 // 4
        assert share == pytest.approx(1.25)


@FEW
def test_the_twin_has_the_block_twice(name: str) -> None:
    model, batch, given = attach(tiny(name)), inputs(), {Site(0, "block"): 2, Site(1, "block"): 0, Site(3, "block"): 2}
    twin = pruned_twin(model, [Site(1, "block")], [Site(0, "block"), Site(3, "block")])
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with dynadepth.fixed_routes(model, given):
        found = model.generate(**batch, **options)
    wanted = twin.generate(**batch, **options)
    assert torch.equal(found.sequences, wanted.sequences)
    assert_same(torch.stack(found.logits, 1), torch.stack(wanted.logits, 1), atol=1e-4)
    assert found.past_key_values.kv_bytes() == cache_bytes(wanted.past_key_values)
    with pytest.raises(ConfigError, match="only whole blocks"):
        pruned_twin(model, [], [Site(0, "mlp")])


def test_beams_score_what_a_plain_forward_scores() -> None:
    model, batch, given = attach(tiny("llama")), inputs(), decisions()
    beams = {site: times.repeat_interleave(3) for site, times in given.items()}
    with dynadepth.fixed_routes(model, beams):
        out = model.generate(**batch, max_new_tokens=4, num_beams=3, do_sample=False, return_dict_in_generate=True,
                             output_scores=True, length_penalty=0.0)  # fmt: skip
    mask = torch.cat([batch["attention_mask"], torch.ones(BATCH, 4, dtype=torch.long)], 1)
    with torch.no_grad(), dynadepth.fixed_routes(model, given):
        logits = model(input_ids=out.sequences, attention_mask=mask, use_cache=False).logits
    log_probs = logits.log_softmax(-1)[:, TOKENS - 1 : -1].gather(-1, out.sequences[:, TOKENS:, None]).sum((1, 2))
    assert_same(out.sequences_scores, log_probs, atol=1e-4)


def test_attention_weights_of_the_last_pass() -> None:
    model, batch = tiny("llama-eager"), inputs()
    attach(model)
    route = {Site(0, "block"): torch.tensor([2, 1, 0])}
    with torch.no_grad(), dynadepth.fixed_routes(model, route):
        whole = model(**batch, output_attentions=True, output_hidden_states=True)
        trained = model.train()(**batch, output_attentions=True).attentions
        model.eval()
    twin = pruned_twin(model, [], [Site(0, "block")])
    with torch.no_grad():
        twice = twin(**batch, output_attentions=True).attentions
    assert len(whole.attentions) == len(LAYER_RANGE)
    assert len(whole.hidden_states) == len(LAYER_RANGE) + 1
    real = batch["attention_mask"].bool()
    for found in (whole.attentions, trained):
        assert len(found) == len(LAYER_RANGE)
        assert_same(found[0][0].transpose(0, 1)[real[0]], twice[1][0].transpose(0, 1)[real[0]])
        assert_same(found[0][1].transpose(0, 1)[real[1]], twice[0][1].transpose(0, 1)[real[1]])
        assert not found[0][2].any()


@pytest.mark.parametrize("target", ["attention", "mlp"])
def test_other_sublayers_do_not_repeat(target: str) -> None:
    model = dynadepth.attach(tiny("llama"), MindSkipConfig(target=target, layers="all"))
    twice = dynadepth.fixed_routes(model, {Site(0, target): 2})
    with pytest.raises(ConfigError, match="Only whole layers can repeat"), twice:
        pass


def test_decisions_that_name_no_action() -> None:
    thrice = dynadepth.fixed_routes(attach(tiny("llama")), {Site(0, "block"): 3})
    with pytest.raises(ConfigError, match="cannot execute 3 times"), thrice:
        pass
