"""What a cell holds: everything measured of one model as it stands, as plain data.

Keys: `text` and `tasks` (as `evaluation.evaluate` gives them, keep ratios apart), `rows` (scores of single windows and
rows), `site_keep` and `routes` (`report.routes.variety`) on the texts, `kinds` (keep ratio and routes by kind of
prompt), `samples` (answers). Figures that are means over inputs can be mixed: see `blend`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dynadepth.architectures import decoder_layers
from dynadepth.benchmark import cut_prompts, run
from dynadepth.budget import forward, prompts_to_batches
from dynadepth.evaluation import evaluate
from dynadepth.frontier.prompts import KINDS, SAMPLES, encoded
from dynadepth.frontier.settings import Settings
from dynadepth.report.routes import variety
from dynadepth.report.samples import answers
from dynadepth.routed import is_attached, routing_of
from dynadepth.routing.recorder import Recorder, recording
from dynadepth.tuning.data import pad_token_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Tell = Callable[[str], object]
WHOLE = {"routed": 1.0, "all": 1.0}
"""The keep ratio of a model without routers."""


def measured(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, tell: Tell, prompts: bool = True
) -> dict[str, Any]:
    """Quality of the model as it stands, routed or bare, and what it executed; without `prompts` on the texts and tasks
    alone (`kinds` and `samples` stay empty)."""
    common: dict[str, Any] = {"seed": settings.seed, "with_rows": True, "progress": tell}
    with recording() as record:
        text = evaluate(
            model,
            tokenizer,
            perplexity=settings.perplexity,
            max_windows=settings.max_windows,
            compare_dense=is_attached(model),
            **common,
        )
    rows = {name: _by_file(text["rows"][name]) for name in ("perplexity", "kl")}
    tasks = None
    if settings.tasks:
        tasks = evaluate(
            model, tokenizer, tasks=settings.tasks, task_data=settings.task_data, limit=settings.limit, **common
        )
        rows["tasks"] = tasks["rows"]["tasks"]
        tasks = {"tasks": tasks["tasks"], "average": tasks["average"], **_spent(tasks)}
    kinds, samples = {}, []
    if prompts:
        tell("keep ratio by kind of prompt")
        kinds = by_kind(model, tokenizer)
        tell("sample answers")
        samples = answers(model, tokenizer, SAMPLES, settings.answer_tokens)
    return {
        "layers": len(decoder_layers(model)),
        "target": routing_of(model).target.name if is_attached(model) else None,
        "granularity": routing_of(model).config.granularity if is_attached(model) else None,
        "text": {
            "perplexity": _by_file(text["perplexity"]),
            "kl": 0.0 if text["kl"] is None else text["kl"],
            "agreement": 1.0 if text["agreement"] is None else text["agreement"],
            **_spent(text),
        },
        "tasks": tasks,
        "rows": rows,
        "site_keep": {str(site): share for site, share in record.site_passes("prefill").items()},
        "routes": _routes(model, record),
        "kinds": kinds,
        "samples": samples,
    }


def by_kind(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, Any]]:
    """For each kind of built-in prompt: `keep_ratio`, and the `variety` of its routes."""
    found = {}
    for kind in KINDS:
        batches = prompts_to_batches(encoded(kind, tokenizer), pad_token_id(tokenizer))
        with torch.no_grad(), recording() as record:
            for batch in batches if is_attached(model) else ():
                forward(model, batch)
        keep = record.keep_ratio("prefill")
        found[kind] = {"keep_ratio": WHOLE if keep is None else asdict(keep), **_routes(model, record)}
    return found


def timed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, tell: Tell
) -> list[dict[str, Any]]:
    """The `bench` cells of the routed model, interleaved with dense and its pruned twin; none of a bare model."""
    if not is_attached(model):
        return []
    prompts = cut_prompts(tokenizer, count=1, length=settings.context + settings.new_tokens)
    return run(
        model,
        prompts,
        batches=[1],
        contexts=[settings.context],
        new_tokens=settings.new_tokens,
        repeats=settings.repeats,
        variants=["routed"],
        progress=tell,
    )


def blend(parts: Iterable[tuple[float, Any]]) -> Any:
    """The mean of documents of one form, weighted by shares that sum to one: numbers are mixed at any depth, anything
    else is that of the largest share. A perplexity is made again from its mixed `nll`."""
    parts = list(parts)
    if len(parts) == 1:
        return parts[0][1]
    main = max(parts, key=lambda part: part[0])[1]
    values = [value for _, value in parts]
    if all(isinstance(value, Mapping) for value in values):
        mixed = {
            key: blend((share, value[key]) for share, value in parts) if all(key in v for v in values) else main[key]
            for key in main
        }
        if {"ppl", "nll"} <= set(mixed):
            mixed["ppl"] = math.exp(min(mixed["nll"], 700.0))
        return mixed
    if all(isinstance(value, list) for value in values) and len({len(value) for value in values}) == 1:
        return [blend(zip((share for share, _ in parts), items, strict=True)) for items in zip(*values, strict=True)]
    if all(type(value) in (int, float) for value in values) and len(set(values)) > 1:
        return sum(share * value for share, value in parts)
    return main


def _spent(results: Mapping[str, Any]) -> dict[str, Any]:
    bare = results["keep_ratio"] is None
    return {
        "keep_ratio": WHOLE if bare else results["keep_ratio"],
        "depth": None if bare else results["depth"],
        "flops_share": 1.0 if bare else results["flops_share"],
        "flops_share_target": 1.0 if bare else results["flops_share_target"],
        "kv_share": 1.0 if bare else results["kv_share"],
    }


def _routes(model: PreTrainedModel, record: Recorder) -> dict[str, Any]:
    return variety(record.sequences, sticky=not is_attached(model) or routing_of(model).granularity.sticky)


def _by_file(results: Mapping[str, Any]) -> dict[str, Any]:
    """Keyed by the files' names: where they lie on this machine tells nobody anything."""
    return {Path(file).name: figures for file, figures in results.items()}
