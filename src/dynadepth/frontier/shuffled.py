"""Routes of other inputs: what a tuned row's routers chose for each input, given to others of the same text or task.

Keep ratios stay as they are; what is lost is what the choice was worth. Where nothing is lost, routing does not follow
the content. Inputs are windows of a text and contexts of a task.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

from dynadepth.evaluation import evaluate
from dynadepth.evaluation.scoring import DenseStates
from dynadepth.frontier.given import Prompt, Route, giving, watching
from dynadepth.frontier.makers import Beside, Budget, Part, Tuned, loaded
from dynadepth.frontier.scoring import Tell, measured
from dynadepth.frontier.searched import Searched
from dynadepth.frontier.settings import Settings
from dynadepth.frontier.workbench import Workbench
from dynadepth.routed import routing_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Shuffled(Beside[Tuned | Searched]):
    """A tuned row's routers at sequence granularity, each input under the route of another one."""

    kind = "shuffled"

    def parts(self, bench: Workbench, name: str, budget: Budget) -> list[Part]:
        folder = self.row.folder(bench, self.of)
        scored = partial(
            shuffled,
            tokenizer=bench.tokenizer,
            settings=bench.settings,
            tell=bench.tell,
            dense_states=bench.dense_states,
        )
        return [Part(lambda: loaded(bench.model, folder, budget), scored=scored)]


def shuffled(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    tell: Tell,
    dense_states: DenseStates | None = None,
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
        found = measured(model, tokenizer, settings, tell, prompts=False, dense_states=dense_states)
    return {**found, "shuffled": counts}


def deranged(routes: Mapping[Prompt, Route], seed: int) -> dict[Prompt, Route]:
    """Every prompt with the route of another one: the next in an order that `seed` decides."""
    order = list(routes)
    Random(seed).shuffle(order)
    return {prompt: routes[other] for prompt, other in zip(order, order[1:] + order[:1], strict=True)}
