"""Compiled decode answers what the ordinary one answers, whatever the route.

Most tests run the forms of a layer as plain Python (`uncompiled`): the logic is the same, without minutes of compiling.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import dynadepth
from dynadepth import Site, fixed_routes, routing_of
from dynadepth.compiled import layers as compiled_layers
from dynadepth.errors import ConfigError, UnsupportedCacheError, UnsupportedModelError
from dynadepth.lora import LoraSettings
from dynadepth.model import add_lora
from dynadepth.routing import roomy
from parity.models import tiny
from small import ALL, FAMILIES, alone, bare, ids, mixed, ragged, routed

FAMILY = pytest.mark.parametrize("family", FAMILIES)
PATH = pytest.mark.parametrize("skip_path", ["identity", "linear"])
EVEN = {Site(layer, "attention"): layer % 2 == 0 for layer in ALL}


class Counting:
    """Stands for a compiled form: runs it as it is, and counts."""

    runs = 0

    def __call__(self, *inputs: Any) -> Any:
        type(self).runs += 1
        return compiled_layers.step(*inputs)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> type[Counting]:
    class Fresh(Counting):
        runs = 0

    monkeypatch.setattr(roomy, "CHUNK", 3)  # rooms fill up on the way
    original = compiled_layers.Steps.__init__

    def quick(self: Any, routing: Any) -> None:
        original(self, routing, Fresh)

    monkeypatch.setattr(compiled_layers.Steps, "__init__", quick)
    return Fresh


def answer(model: Any, batch: dict[str, Tensor], new: int = 8, **options: Any) -> tuple[Tensor, Tensor]:
    """Generated ids, and the logits of every step."""
    out = model.generate(
        **batch, max_new_tokens=new, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
    )
    return out.sequences, torch.stack(out.logits, 1)


def same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=1e-5)


@FAMILY
@pytest.mark.parametrize("lengths", [(4,), (3, 7, 5)])
def test_a_dense_model_answers_the_same(family: str, lengths: tuple[int, ...], uncompiled: type[Counting]) -> None:
    model, batch = bare(family), ragged(lengths)
    expected = answer(model, batch)
    dynadepth.compile(model)
    before = uncompiled.runs
    same(answer(model, batch), expected)
    assert uncompiled.runs - before == 7 * len(ALL)  # every token but the first, which the prefill gives


@FAMILY
@PATH
def test_one_route_for_all_rows(family: str, skip_path: str, uncompiled: type[Counting]) -> None:
    model, batch = routed(family, skip_path=skip_path, skip_rank=4), ragged((3, 7, 5))
    with fixed_routes(model, EVEN):
        expected = answer(model, batch)
    dynadepth.compile(model)
    before = uncompiled.runs
    with fixed_routes(model, EVEN), dynadepth.recording() as record:
        same(answer(model, batch), expected)
    assert uncompiled.runs - before == 7 * len(ALL)
    assert record.keep_ratio("decode").routed == 0.5


@PATH
def test_layers_that_are_called_by_place(skip_path: str, uncompiled: type[Counting]) -> None:
    """GPT-2's: cache and mask have no names in the call."""
    model, batch = tiny("gpt2"), ragged((3, 7, 5))
    dense = answer(model, batch)
    dynadepth.compile(model)
    before = uncompiled.runs
    same(answer(model, batch), dense)
    assert uncompiled.runs - before == 7 * len(ALL)
    model = dynadepth.attach(tiny("gpt2"), dynadepth.MindSkipConfig(layers="all", skip_path=skip_path, skip_rank=4))
    with fixed_routes(model, EVEN):
        expected = answer(model, batch)
        dynadepth.compile(model)
        before = uncompiled.runs
        same(answer(model, batch), expected)
    assert uncompiled.runs - before == 7 * len(ALL)


@FAMILY
@PATH
@pytest.mark.parametrize("target", ["attention", "mlp", "block"])
def test_rows_of_different_routes(family: str, skip_path: str, target: str, uncompiled: type[Counting]) -> None:
    model, batch = routed(family, target=target, skip_path=skip_path, skip_rank=4), ragged((3, 7, 5))
    decisions = {Site(site.layer, target): rows for site, rows in mixed(3).items()}
    with fixed_routes(model, decisions):
        expected = answer(model, batch)
    dynadepth.compile(model)
    before = uncompiled.runs
    with fixed_routes(model, decisions):
        same(answer(model, batch), expected)
        cache = model(**batch).past_key_values
    if target == "attention":
        assert uncompiled.runs - before == 7 * len(ALL)
    for row in range(3):
        given = {site: rows[row : row + 1] for site, rows in decisions.items()}
        with fixed_routes(model, given):
            one = answer(model, alone(batch, row))
        assert torch.equal(one[0][0, -8:], expected[0][row, -8:])
    assert cache.routes == {site: rows.tolist() for site, rows in decisions.items()}


def test_repeated_layers_take_the_ordinary_way(uncompiled: type[Counting]) -> None:
    model, batch = routed("llama", target="block"), ragged((3, 7, 5))
    decisions = {Site(1, "block"): torch.tensor([2, 1, 2]), Site(2, "block"): torch.tensor([0, 1, 1])}
    with fixed_routes(model, decisions):
        expected = answer(model, batch)
    dynadepth.compile(model)
    before = uncompiled.runs
    with fixed_routes(model, decisions):
        same(answer(model, batch), expected)
    assert uncompiled.runs - before == 7 * 2


@PATH
def test_steps_equal_the_masked_reference(skip_path: str, uncompiled: type[Counting]) -> None:
    model, text = routed("llama", skip_path=skip_path, skip_rank=4), ids(2, 10)
    decisions = mixed(2) | dict(list(EVEN.items())[2:])
    with fixed_routes(model, decisions):
        model.train()
        with torch.no_grad():
            whole = model(input_ids=text).logits  # every row runs everything, and is selected
        dynadepth.compile(model.eval())
        with torch.no_grad():
            out = model(input_ids=text[:, :5])
            steps = [out.logits]
            for place in range(5, 10):
                steps.append(model(input_ids=text[:, place : place + 1], past_key_values=out.past_key_values).logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-5, rtol=1e-5)
    assert uncompiled.runs


@FAMILY
@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 2}], ids=str
)
def test_ways_of_generating(family: str, options: dict[str, Any], uncompiled: type[Counting]) -> None:
    model = routed(family, skip_path="linear", skip_rank=4)
    batch = {"input_ids": ids(1, 6)} if "prompt_lookup_num_tokens" in options else ragged((3, 6))
    settings = {"max_new_tokens": 7, "do_sample": False, **options}
    expected = model.generate(**batch, **settings)
    dynadepth.compile(model)
    assert torch.equal(model.generate(**batch, **settings), expected)


@pytest.mark.parametrize(("granularity", "kv_policy"), [("token", "project"), ("token", "drop")])
def test_token_granularity_takes_the_ordinary_way(granularity: str, kv_policy: str, uncompiled: type[Counting]) -> None:
    model, batch = routed("llama", granularity=granularity, kv_policy=kv_policy), ragged((3, 6))
    expected = answer(model, batch)
    with pytest.warns(UserWarning, match=r"decide for every token .* ordinary way"):
        dynadepth.compile(model)
    before = uncompiled.runs
    same(answer(model, batch), expected)
    assert uncompiled.runs == before
    with dynadepth.disabled(model):
        answer(model, batch)
    assert uncompiled.runs > before


def test_lora_beside_the_routers(uncompiled: type[Counting]) -> None:
    model, batch = routed("llama"), ragged((3, 6))
    add_lora(model, LoraSettings(rank=2))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in routing_of(model).lora.tensors().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    with fixed_routes(model, EVEN):
        expected = answer(model, batch)
    with dynadepth.disabled(model):
        dense = answer(model, batch)
    assert not torch.allclose(dense[1][:, 0], expected[1][:, 0], atol=1e-2)
    dynadepth.compile(model)
    before = uncompiled.runs
    with fixed_routes(model, EVEN):
        same(answer(model, batch), expected)
    assert uncompiled.runs > before
    with dynadepth.disabled(model):
        same(answer(model, batch), dense)
    with pytest.raises(ConfigError, match="compiled as it is"):
        add_lora(model, LoraSettings(rank=2))


def test_recorded_outputs_are_whole(uncompiled: type[Counting]) -> None:
    model, batch = bare("llama", attn_implementation="eager"), ragged((3, 6))
    wanted = {"output_attentions": True, "output_hidden_states": True}
    expected = model.generate(**batch, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, **wanted)
    dynadepth.compile(model)
    found = model.generate(**batch, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, **wanted)
    for kind in ("attentions", "hidden_states"):
        for a, b in zip(getattr(found, kind), getattr(expected, kind), strict=True):
            assert len(a) == len(b)
            assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a, b, strict=True))


def test_a_step_that_is_padding_for_some_rows(uncompiled: type[Counting]) -> None:
    answers = []
    for compiled in (False, True):
        model, logits = routed("llama", skip_path="linear", skip_rank=4), []
        if compiled:
            dynadepth.compile(model)
        mask = torch.ones(2, 5, dtype=torch.long)
        with fixed_routes(model, EVEN), torch.no_grad():
            cache = model(input_ids=ids(2, 5), attention_mask=mask).past_key_values
            for seed, real in enumerate(([1, 1], [1, 0], [1, 1])):
                mask = torch.cat([mask, torch.tensor(real)[:, None]], 1)
                out = model(input_ids=ids(2, 1, seed), attention_mask=mask, past_key_values=cache)
                logits.append(out.logits[torch.tensor(real).bool()])
        answers.append(torch.cat(logits))
    torch.testing.assert_close(*answers, atol=1e-5, rtol=1e-5)
    assert uncompiled.runs


def test_kv_bytes_are_those_of_the_ordinary_way(uncompiled: type[Counting]) -> None:
    held = []
    for compiled in (False, True):
        model = routed("llama")
        if compiled:
            dynadepth.compile(model)
        with fixed_routes(model, EVEN), torch.no_grad():
            cache = model(input_ids=ids(2, 5)).past_key_values
            for seed in range(5):
                model(input_ids=ids(2, 1, seed), past_key_values=cache)
        held.append((cache.kv_bytes(), cache.get_seq_length()))
    assert held[0] == held[1]


def test_a_cache_of_another_models_routes_is_refused(uncompiled: type[Counting]) -> None:
    model, other = routed(), dynadepth.compile(bare())
    before = uncompiled.runs
    with torch.no_grad():
        with fixed_routes(model, EVEN):
            cache = model(input_ids=ids(2, 5)).past_key_values
        with pytest.raises(UnsupportedCacheError, match="only the routed model that it belongs to"):
            other(input_ids=ids(2, 1), past_key_values=cache)
    assert uncompiled.runs == before


def test_weights_that_change_are_read(uncompiled: type[Counting]) -> None:
    model, batch = dynadepth.compile(routed("llama")), ragged((3, 6))
    first = answer(model, batch)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-1)
        model.model.layers[1].self_attn.o_proj.weight = nn.Parameter(-model.model.layers[1].self_attn.o_proj.weight)
    found = answer(model, batch)
    assert not torch.allclose(found[1], first[1], atol=1e-3)
    same(found, answer(dynadepth.uncompile(model), batch))


def test_a_copy_is_compiled_apart(uncompiled: type[Counting]) -> None:
    model, batch = dynadepth.compile(routed("llama")), ragged((3, 6))
    expected = answer(model, batch)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert dynadepth.is_compiled(other)
    same(answer(other, batch), expected)


@FAMILY
def test_it_is_undone(family: str, uncompiled: type[Counting]) -> None:
    model = routed(family)
    before = {name: type(module) for name, module in model.named_modules()}
    names, attributes = list(model.state_dict()), {id(m): set(vars(m)) for m in model.modules()}
    assert not dynadepth.is_compiled(model)
    dynadepth.compile(model)
    assert dynadepth.is_compiled(model)
    assert list(model.state_dict()) == names
    dynadepth.uncompile(model)
    assert not dynadepth.is_compiled(model)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert {id(m): set(vars(m)) for m in model.modules()} == attributes
    dynadepth.uncompile(model)  # nothing to do


def test_routing_and_compiling_in_order(uncompiled: type[Counting]) -> None:
    model = dynadepth.compile(bare())
    with pytest.raises(ConfigError, match=r"already compiled: dynadepth\.uncompile"):
        dynadepth.compile(model)
    with pytest.raises(ConfigError, match=r"compiled as it is: dynadepth\.uncompile"):
        dynadepth.attach(model, dynadepth.MindSkipConfig(layers=ALL))
    model = dynadepth.compile(routed())
    dynadepth.detach(model)
    assert not dynadepth.is_compiled(model)
    assert {type(module) for module in model.modules()} == {type(module) for module in bare().modules()}


def replace_mlp(model: Any) -> None:
    model.model.layers[1].mlp = copy.deepcopy(model.model.layers[2].mlp)


def replace_linear(model: Any) -> None:
    model.model.layers[1].mlp.up_proj = copy.deepcopy(model.model.layers[2].mlp.up_proj)


def replace_activation(model: Any) -> None:
    model.model.layers[1].mlp.act_fn = nn.ReLU()


def raise_epsilon(model: Any) -> None:
    model.model.layers[0].input_layernorm.variance_epsilon = 0.5


def scale_attention(model: Any) -> None:
    model.model.layers[2].self_attn.scaling = 2.0


def hook_mlp(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: -output)


def patch_mlp(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda hidden: -type(mlp).forward(mlp, hidden)


def adapt(model: Any) -> None:
    settings = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    get_peft_model(model, settings).eval()


def changed(model: Any, change: Any, between: bool) -> Tensor:
    """Logits of a prefill and two steps; the model changes before the prefill, or behind it."""
    with fixed_routes(model, EVEN) if dynadepth.is_attached(model) else nullcontext(), torch.no_grad():
        if not between:
            change(model)
        out = model(input_ids=ids(2, 5), use_cache=True)
        logits, cache = [out.logits[:, -1:]], out.past_key_values
        if between:
            change(model)
        logits += [model(input_ids=ids(2, 1, seed), past_key_values=cache).logits for seed in (1, 2)]
    return torch.cat(logits, 1)


@pytest.mark.parametrize("make", [bare, routed])
@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize(
    "change", [replace_mlp, replace_linear, replace_activation, raise_epsilon, scale_attention, hook_mlp, adapt]
)
def test_a_layer_that_changes_is_followed(make: Any, between: bool, change: Any, uncompiled: type[Counting]) -> None:
    expected = changed(make(), change, between)
    model = dynadepth.compile(make())
    before = changed(model, lambda model: None, between)
    runs, copied = uncompiled.runs, copy.deepcopy(model)
    for one in (model, copied):
        blocked = change in (hook_mlp, adapt)
        with pytest.warns(UserWarning, match="after dynadepth.compile") if blocked else nullcontext() as said:
            found = changed(one, change, between)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(found[:, 1:], before[:, 1:], atol=1e-3)
        assert said is None or sum("after dynadepth.compile" in str(warning.message) for warning in said) == 1
    if change is not adapt:  # which is in every layer
        assert uncompiled.runs > runs


def test_a_forward_of_its_own_is_followed_from_the_next_prompt(uncompiled: type[Counting]) -> None:
    expected, model = changed(bare(), patch_mlp, False), dynadepth.compile(bare())
    with pytest.warns(UserWarning, match=r"changed after dynadepth\.compile \(mlp has a forward of its own"):
        torch.testing.assert_close(changed(model, patch_mlp, False), expected, atol=1e-5, rtol=1e-5)


def test_a_layer_that_is_put_back_is_compiled_again(uncompiled: type[Counting]) -> None:
    model = dynadepth.compile(bare())
    expected = changed(model, lambda model: None, False)
    runs = uncompiled.runs
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *given: None)
    with pytest.warns(UserWarning, match="mlp has a forward hook"):
        answer(model, ragged((3, 6)), 2)
    assert uncompiled.runs - runs == len(ALL) - 1
    handle.remove()
    assert torch.equal(changed(model, lambda model: None, False), expected)
    assert uncompiled.runs - runs == len(ALL) - 1 + 2 * len(ALL)


def test_layers_are_looked_at_and_twins_made_no_more_than_needed(
    uncompiled: type[Counting], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = dynadepth.compile(routed())

    def anew(*given: Any) -> None:
        raise AssertionError("twins were made anew")

    monkeypatch.setattr(compiled_layers.Plan, "make_twins", anew)
    answer(model, ragged((3, 6)))
    dynadepth.set_control(model, 0.2)
    answer(model.train().eval(), ragged((3, 6)))
    answer(copy.deepcopy(model), ragged((3, 6)))


def test_adapters_of_pefts_are_refused() -> None:
    model = get_peft_model(bare(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UnsupportedModelError, match=r"self_attn\.q_proj is an adapter of PEFT's"):
        dynadepth.compile(model)
    assert not dynadepth.is_compiled(model)
    dynadepth.compile(model.merge_and_unload())


def test_hooks_inside_a_layer_are_refused() -> None:
    model = bare()
    model.model.layers[2].mlp.register_forward_hook(lambda *given: None)
    with pytest.raises(UnsupportedModelError, match="mlp has a forward hook"):
        dynadepth.compile(model)
    assert not dynadepth.is_compiled(model)


def test_layers_that_answer_otherwise_are_refused(uncompiled: type[Counting], monkeypatch: pytest.MonkeyPatch) -> None:
    original = compiled_layers.step

    def wrong(*inputs: Any) -> Any:
        output, memory = original(*inputs)
        return output * 1.1, memory

    monkeypatch.setattr("dynadepth.compiled.model.step", wrong)
    with pytest.raises(UnsupportedModelError, match="differs by up to"):
        dynadepth.compile(bare())


def test_a_machine_that_cannot_compile_says_so_once_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = bare(), ragged((3, 6))
    expected = answer(model, batch)

    def fails(*inputs: Any) -> Any:
        raise torch._dynamo.exc.TorchRuntimeError("no compiler here")

    dynadepth.compile(model)
    model.model.layers[0].compiled_plan.steps.reset(lambda: fails)
    with pytest.warns(UserWarning, match="no compiler here") as said:
        same(answer(model, batch), expected)
    assert len(said) == 1
    same(answer(model, batch), expected)


def test_layers_that_differ_by_a_function_share_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def traced(own: Any, fullgraph: bool, options: dict[str, Any]) -> Any:
        guards = options["guard_filter_fn"]
        return torch._dynamo.optimize("eager", nopython=fullgraph, guard_filter_fn=guards)(own)

    monkeypatch.setattr(torch, "compile", traced)  # the same checks, without a compiler's minutes
    model, batch = bare(), ragged((3, 6))
    for index, layer in enumerate(model.model.layers):
        del layer.mlp.act_fn
        layer.mlp.act_fn = nn.functional.relu if index == 2 else nn.functional.gelu
    expected = answer(model, batch, 3)
    dynadepth.compile(model)
    same(answer(model, batch, 3), expected)


@pytest.mark.slow
@FAMILY
def test_no_route_and_no_length_compiles_anew(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.setattr(roomy, "CHUNK", 3)
    model, batch = routed(family, skip_path="linear", skip_rank=4), ragged((3, 7, 5))
    odd = {site: not execute for site, execute in EVEN.items()}
    with fixed_routes(model, EVEN):
        expected = answer(model, batch, 12)
    dynadepth.compile(model)
    with fixed_routes(model, EVEN):
        same(answer(model, batch, 4), (expected[0][:, :-8], expected[1][:, :4]))
    with fixed_routes(model, odd):
        answer(model, batch, 4)
    for rows in ([True, True, False], [True, False, False]):  # one row is a kind of its own
        with fixed_routes(model, dict.fromkeys(EVEN, torch.tensor(rows))):
            answer(model, batch, 4)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs
    with fixed_routes(model, EVEN):
        same(answer(model, batch, 12), expected)
    for decisions in ({Site(0, "attention"): False, Site(3, "attention"): False}, mixed(3)):
        with fixed_routes(model, decisions):
            answer(model, batch, 12)
    answer(model, ragged((3, 7, 5), seed=3), 12)
    assert counters["stats"]["unique_graphs"] == graphs
