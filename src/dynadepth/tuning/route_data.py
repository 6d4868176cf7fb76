"""Searched routes as examples: which of a file's routes are learnt from, which prompts steer nothing, and what each
router is shown.

A router sees pooled states of the prompt that no router changes, since the layers below it execute as the route of the
example says (teacher forcing). They are therefore computed once for each example and kept.

Shape suffixes: N examples, L routed layers, W windows, D hidden size.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynadepth.architectures import decoder_layers
from dynadepth.budget import forward, prompts_to_batches
from dynadepth.errors import DataError, TuningError
from dynadepth.model import fixed_routes
from dynadepth.route_file import PromptRoutes, Route, RouteFile
from dynadepth.routed import routing_of, unwrapped
from dynadepth.routing.context import current
from dynadepth.routing.decision import Site
from dynadepth.routing.granularity import pooled_tokens
from dynadepth.routing.windows import pool_windows
from dynadepth.tuning.route_recipe import RouteRecipe

BATCH = 16
MOST_MEMORY = 0.7
"""Share of the machine's memory that examples may take."""


@dataclass(frozen=True)
class RouteExample:
    """One prompt with one route to be learnt."""

    input_ids: list[int]
    counts: tuple[int, ...]
    """How often each layer of the model executes: 0, 1 or 2."""


@dataclass(frozen=True)
class Split:
    """Examples, parted by prompt."""

    training: list[RouteExample]
    validation: list[RouteExample]
    heldout: list[RouteExample]


def kept(prompt: PromptRoutes, n_layers: int, recipe: RouteRecipe) -> list[tuple[int, ...]]:
    """The counts of the routes of a prompt that are learnt from; routers cannot repeat a layer twice."""
    routes: Sequence[Route] = prompt.control_routes if recipe.towards == "control" else prompt.routes
    routes = [route for route in routes if route.margin >= recipe.margin and route.can_be_routed]
    if recipe.credible and not prompt.dense.correct:
        least = -float("inf") if prompt.control is None else prompt.control
        routes = [route for route in routes if route.margin > least]
    if recipe.order == "margin":
        routes = sorted(routes, key=lambda route: route.margin, reverse=True)
    chosen = [route.counts for route in routes[: recipe.routes_per_prompt]]
    if not chosen and recipe.dense and prompt.dense.correct:
        return [(1,) * n_layers]
    return chosen


def parted(
    routes: RouteFile, recipe: RouteRecipe, max_samples: int | None, seed: int, learnable: bool = True
) -> tuple[list[PromptRoutes], list[PromptRoutes], list[PromptRoutes]]:
    """The file's prompts for training, validation and to be held out, in an order that `seed` decides, by the recipe's
    shares: of those with a route to learn from, of which `max_samples` are taken, and of as many of the others. Where
    nothing is learnt from single routes (not `learnable`) all prompts are alike.

    Raises TuningError where a part would have no route to learn from.
    """
    usable = [p for p in routes.prompts if not learnable or kept(p, routes.header.n_layers, recipe)]
    if len(usable) < 3:
        raise TuningError(
            f"{len(usable)} of {len(routes.prompts)} prompts have a route to learn from (towards {recipe.towards}, "
            f"leads of {recipe.margin:g} nats or more{', credible ones' if recipe.credible else ''}), and three parts "
            "need at least one each: search more prompts, or ask less of a route in the recipe."
        )
    if max_samples is not None and max_samples < 3:
        raise TuningError(
            f"--max-samples {max_samples} leaves {max_samples} of {len(usable)} prompts that have a route to learn "
            "from, and three parts need at least one each: give 3 or more."
        )
    names = {(prompt.source, prompt.id) for prompt in usable}
    others = [prompt for prompt in routes.prompts if (prompt.source, prompt.id) not in names]
    share = 1.0 if max_samples is None else min(1.0, max_samples / len(usable))
    draw = random.Random(seed)
    parts: tuple[list[PromptRoutes], list[PromptRoutes], list[PromptRoutes]] = ([], [], [])
    for prompts, n, least in ((usable, max_samples, 1), (others, round(share * len(others)), 0)):
        draw.shuffle(prompts)
        prompts = prompts[:n]
        # What rounding gives too much is left to learn from.
        n_validation = min(max(least, round(recipe.validation * len(prompts))), len(prompts) - 2 * least)
        n_heldout = min(max(least, round(recipe.holdout * len(prompts))), len(prompts) - n_validation - least)
        cut = n_validation + n_heldout
        for part, new in zip(
            parts, (prompts[cut:], prompts[n_heldout:cut], prompts[:n_heldout]), strict=True
        ):  # fmt: skip
            part += new
    return parts


def split(routes: RouteFile, tokenizer: Any, recipe: RouteRecipe, max_samples: int | None, seed: int) -> Split:
    """The examples of each part (`parted`)."""

    def examples(part: list[PromptRoutes]) -> list[RouteExample]:
        found = []
        for prompt in part:
            ids = list(tokenizer.encode(prompt.prompt.rstrip()))  # as the search reads it
            if not ids:
                raise DataError(f"Prompt {prompt.id!r} of {prompt.source} has no token.")
            found += [RouteExample(ids, counts) for counts in kept(prompt, routes.header.n_layers, recipe)]
        return found

    return Split(*(examples(part) for part in parted(routes, recipe, max_samples, seed)))


@contextmanager
def _watched(model: nn.Module, windows: int) -> Iterator[dict[Site, Tensor]]:
    """What the routers of the routed blocks would be shown by the latest forward inside the block: `[B, W, D]`."""
    seen: dict[Site, Tensor] = {}
    routing, layers = routing_of(model), decoder_layers(unwrapped(model))

    def note(site: Site) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            context = current()
            assert context is not None, "a routed forward"
            hidden = args[0] if args else kwargs["hidden_states"]
            seen[site] = pool_windows(hidden, pooled_tokens(context), windows)

        return hook

    hooks = [layers[s.layer].register_forward_pre_hook(note(s), with_kwargs=True) for s in routing.sites]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def shown(
    model: nn.Module, examples: Sequence[RouteExample], pad: int, progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """What each router is shown where the layers below execute as the example says: `[N, L, W, D]`, in the model's
    dtype, on the host."""
    routing = routing_of(model)
    router = next(iter(routing.routers().values()))
    base = unwrapped(model)
    size = base.config.get_text_config(decoder=True).hidden_size
    shape = (len(examples), len(routing.sites), router.windows, size)
    _check_memory(shape, base.dtype.itemsize)
    found = torch.empty(shape, dtype=base.dtype)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))
    with _watched(model, router.windows) as seen:
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            batch = prompts_to_batches([examples[i].input_ids for i in rows], pad, BATCH)[0]
            route = {s: torch.tensor([examples[i].counts[s.layer] for i in rows]) for s in routing.sites}
            with fixed_routes(model, route):
                forward(model, batch)
            found[rows] = torch.stack([seen[site] for site in routing.sites], 1).to("cpu", base.dtype)
            if progress:
                progress(start + len(rows), len(order))
    return found


def _check_memory(shape: tuple[int, ...], itemsize: int) -> None:
    """Raises TuningError where the states of all examples are larger than this machine's memory."""
    try:
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # no such figure on this system
        return
    need = math.prod(shape) * itemsize
    if need > MOST_MEMORY * machine:
        most = int(shape[0] * MOST_MEMORY * machine / need)
        raise TuningError(
            f"what the routers are shown of {shape[0]:,} routes takes {need / 2**30:,.1f} GiB, and this machine has "
            f"{machine / 2**30:,.1f}, enough for {most:,}: give fewer prompts (--max-samples), or less "
            "routes_per_prompt in the recipe."
        )


def labels(model: nn.Module, examples: Sequence[RouteExample]) -> Tensor:
    """The action of each router: int64 `[N, L]`."""
    layers = [site.layer for site in routing_of(model).sites]
    return torch.tensor([[example.counts[layer] for layer in layers] for example in examples])
