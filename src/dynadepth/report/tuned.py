"""Routers of a demo: newly tuned, or those of an earlier run where they are what would be tuned now."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynadepth import adapter
from dynadepth.dial import set_budget
from dynadepth.errors import DynadepthError, NewerFormatError
from dynadepth.model import load
from dynadepth.provenance import provenance
from dynadepth.report.stamp import model_facts, sign
from dynadepth.routed import routing_of
from dynadepth.tuning import Example, Recipe, tune

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def tuned_routers(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    recipe: Recipe,
    *,
    name: str,
    budget: float,
    seed: int,
    detail: Callable[[str], None],
) -> dict[str, Any]:
    """Attaches routers to the model, at the budget, and says how they came about: a `TuneResult`'s fields and `reused`.

    Routers in `folder` are used again if a run with the same model, recipe, budget, seed, number of samples and code
    completed them. Else they are tuned (an interrupted run goes on) and saved there.
    """
    if is_reusable(folder, model, recipe, name=name, budget=budget, seed=seed, n_samples=len(examples)):
        load(model, folder)
        set_budget(model, **{routing_of(model).target.name: budget})
        return {**routing_of(model).provenance["result"], "reused": True}

    def progress(stage: str, done: int, total: int, figures: dict[str, float]) -> None:
        detail(f"{stage}: {done} of {total}" + "".join(f", {key} {value:.3f}" for key, value in figures.items()))

    result = tune(model, tokenizer, examples, recipe, out=folder, budget=budget, seed=seed, progress=progress)
    sign(model, folder, name, seed)
    return {**asdict(result), "reused": False}


def is_reusable(
    folder: Path, model: PreTrainedModel, recipe: Recipe, *, name: str, budget: float, seed: int, n_samples: int
) -> bool:
    """Does `folder` hold complete routers of exactly this run? Raises NewerFormatError for those of a newer version."""
    try:
        document = adapter.read(folder)[0]
    except NewerFormatError:
        raise
    except DynadepthError:
        return False
    made = document.get("provenance") or {}
    result, run, now = made.get("result"), made.get("run") or {}, provenance()
    if result is None or "stopped" in made:
        return False
    wanted = json.loads(json.dumps({"recipe": recipe.to_dict(), "budget": budget, "seed": seed}))
    return (
        {key: made.get(key) for key in wanted} == wanted
        and result["n_train"] + result["n_heldout"] == n_samples
        and all(run.get(key) == now[key] for key in ("dynadepth", "commit"))
        and (run.get("model") or {}).get("fingerprint") == model_facts(name, model)["fingerprint"]
    )
