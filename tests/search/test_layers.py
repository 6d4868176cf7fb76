"""Layers run in any order give what a model gives whose layers were really moved, dropped and doubled."""

import random

import pytest
import torch
import transformers

from dynadepth import MindSkipConfig, attach
from dynadepth.architectures import decoder_layers
from dynadepth.errors import ConfigError, UnsupportedModelError
from dynadepth.search.layers import LayerRunner, path_of
from dynadepth.search.rows import Row
from parity.models import MODELS, tiny

PROMPTS = [[5, 9, 11, 2, 7, 31, 8], [3, 3, 40, 12, 1, 6, 9, 50, 4]]
CONTINUATIONS = [[[8, 1], [22, 6, 13], []], [[17], [2, 44, 21, 9]]]
ROWS = [Row.of(prompt, rests) for prompt, rests in zip(PROMPTS, CONTINUATIONS, strict=True)]


def rebuilt(model, counts):
    """The model itself with other layers in its list, run as it is."""
    layers = decoder_layers(model)
    before = list(layers)
    del layers[:]
    for layer, count in enumerate(counts):
        layers.extend([before[layer]] * count)
    return before


@torch.no_grad()
def plain(model, ids, counts):
    """Logits `[T, V]` of one sequence from a plain forward of the model with these layers."""
    config = model.config
    types, layers = getattr(config, "layer_types", None), decoder_layers(model)
    before = rebuilt(model, counts)
    if types is not None:
        config.layer_types = [types[layer] for layer in path_of(counts)]
    number = config.num_hidden_layers
    config.num_hidden_layers = len(layers)
    try:
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        del layers[:]
        layers.extend(before)
        config.num_hidden_layers = number
        if types is not None:
            config.layer_types = types


def routes(n_layers, n, seed=0):
    drawn = random.Random(seed)
    made = [tuple(drawn.choice((0, 1, 1, 2)) for _ in range(n_layers)) for _ in range(n)]
    return [(1,) * n_layers, *(counts for counts in made if sum(counts))]


def compare(model, runner, asked):
    for (number, counts), state_TD in zip(asked, runner.run(asked), strict=True):
        states = runner.finish(state_TD[None])
        logits_TV = states.to_logits(states.states_BTD[0])
        row = ROWS[number]
        for branch in sorted(set(row.branches)):
            place = [at for at, own in enumerate(row.branches) if own in (0, branch)]
            wanted = plain(model, [row.ids[at] for at in place], counts)
            torch.testing.assert_close(logits_TV[place], wanted, atol=3e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_equals_a_model_whose_layers_were_moved(name):
    model = tiny(name)
    runner = LayerRunner(model)
    runner.check(ROWS[0])
    runner.take(ROWS)
    compare(model, runner, [(number, counts) for counts in routes(4, 6) for number in (0, 1)])
    assert all("forward" not in vars(layer) for layer in decoder_layers(model))


def test_paths():
    assert path_of((1, 0, 2, 1)) == (0, 2, 2, 3)


def test_shared_prefixes_run_once():
    runner = LayerRunner(tiny("llama"))
    runner.take(ROWS)
    calls = []
    for number, layer in enumerate(runner.layers):
        layer.register_forward_hook(lambda *given, number=number: calls.append((number, len(given[2]))))
    runner.run([(0, (1, 1, 1, 1)), (0, (1, 1, 0, 1)), (0, (1, 1, 2, 1)), (1, (1, 1, 1, 1))])
    # Two prompts; at layer 2 the repeat runs once more; at layer 3 three ways come to prompt 0.
    assert calls == [(0, 2), (1, 2), (2, 2), (2, 1), (3, 4)]
    assert runner.executions == {0: 7, 1: 4}
    calls.clear()
    runner.run([(0, (1, 1, 2, 2)), (1, (1, 1, 1, 1)), (1, (1, 0, 1, 1))])
    assert calls == [(2, 1), (3, 1), (3, 1)]
    assert runner.executions == {0: 8, 1: 6}


@pytest.mark.parametrize("memory", [0, 3000, 20_000])
def test_under_any_memory_limit_the_answers_are_the_same(memory):
    model = tiny("gemma3")
    asked = [(number, counts) for counts in routes(4, 12, seed=3) for number in (0, 1)]
    free, tight = LayerRunner(model), LayerRunner(model, memory=memory, tokens_at_once=40)
    for runner in (free, tight):
        runner.take(ROWS)
    for first in range(0, len(asked), 5):
        part = asked[first : first + 5]
        for one, other in zip(free.run(part), tight.run(part), strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
        assert sum(state.nbytes for state in tight._kept.values()) == tight._bytes <= memory
    assert tight.executions.total() > free.executions.total()


def test_what_cannot_be_searched_is_refused():
    with pytest.raises(ConfigError, match="detach its routers first"):
        LayerRunner(attach(tiny("llama"), MindSkipConfig()))
    model = tiny("llama")
    layer = model.model.layers[2]
    original = layer.forward
    layer.forward = lambda hidden, **given: original(hidden, **given) + 0.1 * hidden.shape[0] * len(hidden[0])
    with pytest.raises(UnsupportedModelError, match="differ from its own forward"):
        LayerRunner(model).check(ROWS[0])
    bloom = transformers.BloomConfig(vocab_size=97, hidden_size=16, n_layer=2, n_head=2)
    with pytest.raises(UnsupportedModelError, match="no list of layers"):
        LayerRunner(transformers.BloomForCausalLM(bloom).eval())
