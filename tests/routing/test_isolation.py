"""Two things at once on one model: nothing of a generation is on the model, so neither sees the other."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dynadepth import Site, disabled, fixed_routes, recording, routing_of
from dynadepth.routing import context as contexts
from small import KINDS, bare, ids, mixed, ragged, routed

KIND = pytest.mark.parametrize(("granularity", "kv_policy"), KINDS)
OPTIONS = {"max_new_tokens": 12, "do_sample": False}


@KIND
def test_two_interleaved_generations(granularity: str, kv_policy: str) -> None:
    model = routed(granularity=granularity, kv_policy=kv_policy)
    prompts, nexts = [ids(3, 6, seed=0), ids(2, 4, seed=1)], [ids(3, 5, seed=2), ids(2, 5, seed=3)]
    apart = []
    for prompt, new in zip(prompts, nexts, strict=True):
        cache = model(input_ids=prompt).past_key_values
        apart.append([model(input_ids=new[:, i : i + 1], past_key_values=cache).logits for i in range(5)])
    caches = [model(input_ids=prompt).past_key_values for prompt in prompts]
    routes = [{site: list(route) for site, route in cache.routes.items()} for cache in caches]
    for step in range(5):
        for number in (0, 1):
            new = nexts[number][:, step : step + 1]
            assert torch.equal(model(input_ids=new, past_key_values=caches[number]).logits, apart[number][step])
    assert [cache.routes for cache in caches] == routes
    assert granularity == "token" or routes[0] != routes[1]


def together(*tasks: Callable[[], Any]) -> list[Any]:
    """Runs the tasks in threads that start at the same moment."""
    barrier, results = threading.Barrier(len(tasks)), [None] * len(tasks)

    def run(number: int, task: Callable[[], Any]) -> None:
        barrier.wait()
        try:
            results[number] = task()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(tasks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@KIND
def test_threads_generate_at_once(granularity: str, kv_policy: str) -> None:
    model = routed(granularity=granularity, kv_policy=kv_policy)
    routing, one, other = routing_of(model), ragged([7, 3, 5]), {"input_ids": ids(2, 4, seed=5)}
    fixed = mixed(2) if granularity != "token" else {Site(1, "attention"): False, Site(2, "attention"): False}

    def plain() -> Any:
        return model.generate(**one, **OPTIONS)

    def different() -> Any:
        return model.generate(**other, **OPTIONS)

    def dense() -> Any:
        with disabled(model):
            return model.generate(**one, **OPTIONS)

    def injected() -> Any:
        with fixed_routes(model, fixed):
            return model.generate(**other, **OPTIONS)

    tasks = (plain, different, dense, injected)
    alone = [task() for task in tasks]
    assert torch.equal(alone[2], bare().generate(**one, **OPTIONS))
    assert not torch.equal(alone[0], alone[2])
    assert not torch.equal(alone[1], alone[3])
    for _ in range(3):
        for wanted, found in zip(alone, together(*tasks), strict=True):
            assert torch.equal(wanted, found), found
    assert routing_of(model) is routing


def test_threads_train_and_generate_through_their_own_contexts() -> None:
    # A masked forward with gradients beside a sparse one: on one model each, since `train()` is a flag of the module.
    training, generating = routed().train(), routed()
    batch, labels = ids(2, 8), ids(2, 8).masked_fill(torch.arange(8) < 4, -100)

    def step() -> Any:
        training.zero_grad()
        training(input_ids=batch, labels=labels).loss.backward()
        return torch.cat([router.weight.grad for router in routing_of(training).routers().values()])

    def generate() -> Any:
        return generating.generate(batch, **OPTIONS)

    wanted = [step(), generate()]
    for found, expected in zip(together(step, generate), wanted, strict=True):
        assert torch.equal(found, expected), found


def test_a_recorder_sees_its_own_thread_alone() -> None:
    model, batch = routed(), ids(2, 4)

    def generate() -> None:
        model.generate(batch, **OPTIONS)

    with recording() as record:
        together(generate)
        assert record.sequences == []
        generate()
    assert len(record.sequences) == 2


def test_contexts_follow_contextvars() -> None:
    model = routed()
    with disabled(model):
        inside = contextvars.copy_context()
    owner = routing_of(model)
    assert inside.run(contexts.is_disabled, owner)
    assert not contexts.is_disabled(owner)
    with fixed_routes(model, {}):
        assert contexts.injections(owner) == {}
        assert together(lambda: contexts.injections(owner)) == [None]
    assert contexts.current() is None


def test_an_error_inside_leaves_no_context_behind() -> None:
    model = routed()
    with pytest.raises(Exception, match=r".*"):
        model(input_ids=torch.tensor([[10**6]]))
    assert contexts.current() is None
    with pytest.raises(RuntimeError, match="stop"), disabled(model):
        raise RuntimeError("stop")
    assert not contexts.is_disabled(routing_of(model))


def test_one_models_context_is_not_anothers() -> None:
    first, second, tokens = routed(), routed(layers=(1,)), ids(2, 5)
    wanted = second(input_ids=tokens).logits
    with disabled(first), fixed_routes(first, {Site(0, "attention"): False}):
        assert torch.equal(second(input_ids=tokens).logits, wanted)


def test_nothing_of_a_forward_stays_on_the_model() -> None:
    model = routed()
    kept = {name: set(vars(module)) for name, module in model.named_modules()}
    values = {
        key: value for module in model.modules() for key, value in vars(module).items() if key.startswith("depth")
    }
    model.generate(**ragged([5, 2]), **OPTIONS)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == kept
    for state in routing_of(model).states.values():
        assert not any(isinstance(value, torch.Tensor | list) for value in vars(state).values())
    assert values["depth_routing"] is routing_of(model)
