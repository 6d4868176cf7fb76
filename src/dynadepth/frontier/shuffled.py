"""Routes of other inputs: what a tuned row's routers chose for each input, given to others of the same text or task.

Keep ratios stay as they are; what is lost is what the choice was worth. Where nothing is lost, routing does not follow
the content. Inputs are windows of a text and contexts of a task, told apart by their prompts: the tokens that may
decide a route.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

from torch import nn

from dynadepth.evaluation import evaluate
from dynadepth.frontier.makers import Budget, Maker, Part, Tuned, loaded
from dynadepth.frontier.scoring import Tell, measured
from dynadepth.frontier.searched import Searched
from dynadepth.frontier.settings import Settings
from dynadepth.frontier.workbench import Workbench
from dynadepth.model import fixed_routes
from dynadepth.routed import routing_of
from dynadepth.routing.cache import RoutedCache
from dynadepth.routing.context import Injection, is_disabled
from dynadepth.routing.decision import Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Prompt = tuple[int, ...]
Route = dict[Site, int]


@dataclass(frozen=True)
class Shuffled(Maker):
    """A tuned row's routers at sequence granularity, each input under the route of another one."""

    of: str
    """The tuned row's name: its cells come first."""
    row: Tuned | Searched

    def budgets(self, name: str, asked: Iterable[float], n_layers: int) -> tuple[Budget, ...]:
        return self.row.budgets(name, asked, n_layers)

    def settings(self, bench: Workbench, name: str) -> dict[str, Any]:
        return {"shuffled": self.row.settings(bench, self.of)}

    def ready(self, bench: Workbench, name: str) -> None:
        self.row.ready(bench, self.of)

    def parts(self, bench: Workbench, name: str, budget: Budget) -> list[Part]:
        folder = self.row.folder(bench, self.of)
        scored = partial(shuffled, tokenizer=bench.tokenizer, settings=bench.settings, tell=bench.tell)
        return [Part(lambda: loaded(bench.model, folder, budget), scored=scored)]


def shuffled(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, tell: Tell
) -> dict[str, Any]:
    """`measured` on texts and tasks under routes of other inputs. `shuffled` says of `texts` and `tasks` how many
    `inputs` there are, and for how many of them the route `changed`."""
    assert routing_of(model).granularity.sticky, "a route belongs to a sequence"
    common: dict[str, Any] = {"seed": settings.seed, "progress": lambda line: tell(f"routes to shuffle: {line}")}
    given: dict[Prompt, Route] = {}
    counts = {kind: {"inputs": 0, "changed": 0} for kind in ("texts", "tasks")}
    sets: list[tuple[str, dict[str, Any]]] = [
        ("texts", {"perplexity": [file], "max_windows": settings.max_windows}) for file in settings.perplexity
    ]
    sets += [
        ("tasks", {"tasks": [task], "task_data": settings.task_data, "limit": settings.limit})
        for task in settings.tasks
    ]
    for kind, inputs in sets:
        with watching(model) as routes:
            evaluate(model, tokenizer, **inputs, **common)
        others = deranged(routes, settings.seed)
        counts[kind]["inputs"] += len(routes)
        counts[kind]["changed"] += sum(others[prompt] != route for prompt, route in routes.items())
        given |= others
    with giving(model, given):
        return {**measured(model, tokenizer, settings, tell, prompts=False), "shuffled": counts}


def deranged(routes: Mapping[Prompt, Route], seed: int) -> dict[Prompt, Route]:
    """Every prompt with the route of another one: the next in an order that `seed` decides."""
    order = list(routes)
    Random(seed).shuffle(order)
    return {prompt: routes[other] for prompt, other in zip(order, order[1:] + order[:1], strict=True)}


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
def giving(model: nn.Module, routes: Mapping[Prompt, Route]) -> Iterator[None]:
    """Inside the block every prompt takes the route that `routes` gives it; it must give one to each."""
    routing = routing_of(model)
    decisions: dict[Site, Injection] = dict.fromkeys(routing.sites, True)

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if is_disabled(routing) or (isinstance(cache, RoutedCache) and cache.book.complete):
            return  # dense, or a continuation, whose route sticks
        rows = [routes[prompt] for prompt in _prompts(kwargs)]
        decisions.update({site: [route[site] for route in rows] for site in decisions})

    handle = model.register_forward_pre_hook(before, with_kwargs=True)
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
