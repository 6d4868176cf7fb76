"""The routes of single inputs, told apart by their prompts (the tokens that may decide a route): seen, and given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from dynadepth.model import fixed_routes
from dynadepth.routed import routing_of
from dynadepth.routing.cache import RoutedCache
from dynadepth.routing.context import Injection, is_disabled
from dynadepth.routing.decision import Site

Prompt = tuple[int, ...]
Route = dict[Site, int]


@contextmanager
def watching(model: nn.Module) -> Iterator[dict[Prompt, Route]]:
    """The route of every prompt that decides one inside the block, in their order."""
    seen: dict[Prompt, Route] = {}

    def after(module: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> None:
        trace = getattr(outputs, "depth_trace", None)  # none of a dense forward
        if trace is None or trace.fresh is None:
            return
        for row, prompt in enumerate(_prompts(kwargs)):
            if trace.fresh[row]:
                seen[prompt] = {site: route[row] for site, route in trace.routes.items()}

    handle = model.register_forward_hook(after, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def giving(model: nn.Module, routes: Mapping[Prompt, Route], default: Route | None = None) -> Iterator[set[Prompt]]:
    """Inside the block every prompt takes the route that `routes` gives it, or the `default`; without one it must give
    one to each. The set grows by the prompts that it gave one to."""
    routing = routing_of(model)
    given: set[Prompt] = set()
    decisions: dict[Site, Injection] = dict.fromkeys(routing.sites, True)

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if is_disabled(routing) or (isinstance(cache, RoutedCache) and cache.book.complete):
            return  # dense, or a continuation, whose route sticks
        prompts = _prompts(kwargs)
        given.update(prompt for prompt in prompts if prompt in routes)
        rows = [routes[prompt] if default is None else routes.get(prompt, default) for prompt in prompts]
        decisions.update({site: [route[site] for route in rows] for site in decisions})

    handle = model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        with fixed_routes(model, decisions):
            yield given
    finally:
        handle.remove()


def _prompts(inputs: Mapping[str, Any]) -> list[Prompt]:
    """The tokens of each row that may decide its route."""
    ids = inputs["input_ids"]
    masks = [inputs[name].bool() for name in ("attention_mask", "prompt_mask") if inputs.get(name) is not None]
    if not masks:
        return [tuple(row) for row in ids.tolist()]
    mask = masks[0] if len(masks) == 1 else masks[0] & masks[1]
    return [tuple(row[real].tolist()) for row, real in zip(ids, mask, strict=True)]
