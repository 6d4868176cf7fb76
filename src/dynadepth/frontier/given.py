"""The routes of single inputs, told apart by their prompts (the tokens that may decide a route): seen, and given; and
routes given to tokens by their positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dynadepth.architectures import decoder_of
from dynadepth.model import fixed_routes
from dynadepth.routed import routing_of, unwrapped
from dynadepth.routing.cache import RoutedCache
from dynadepth.routing.context import Injection, is_disabled
from dynadepth.routing.decision import Site

Prompt = tuple[int, ...]
Route = dict[Site, int]
GOLDEN, ROOT = (1 + 5**0.5) / 2, 2**0.5


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


@contextmanager
def giving_positions(model: nn.Module, shares: Mapping[Site, float]) -> Iterator[None]:
    """Inside the block the share `shares[site]` of the positions executes at each site, whatever the tokens are there.

    Position p, counted from 1, executes where the fractional part of p · φ + layer · √2, φ the golden ratio, is below
    the share: evenly spread at every site, and elsewhere at every one. Padding has no position.
    """
    routing = routing_of(model)
    decisions: dict[Site, Injection] = dict.fromkeys(shares, True)

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if is_disabled(routing):
            return
        ids, mask, cache = kwargs["input_ids"], kwargs.get("attention_mask"), kwargs.get("past_key_values")
        if mask is None:
            past = cache.seen if isinstance(cache, RoutedCache) else 0
            number = torch.arange(past + 1, past + 1 + ids.shape[1]).expand(ids.shape)
        else:
            number = mask.long().cumsum(1)[:, -ids.shape[1] :]
        turns = number.cpu().double() * GOLDEN  # not every device has float64
        decisions.update({site: (turns + site.layer * ROOT) % 1 < share for site, share in shares.items()})

    decoder = decoder_of(unwrapped(model))  # prompts are also read without the head
    handle = decoder.register_forward_pre_hook(before, with_kwargs=True)
    try:
        with fixed_routes(model, decisions):
            yield
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
