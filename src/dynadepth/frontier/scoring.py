"""What a cell holds: everything measured of one model as it stands, as plain data.

Keys: `text` and `tasks` (as `evaluation.evaluate` gives them, keep ratios apart), `rows` (scores of single windows and
rows), `site_keep` and `routes` (`report.routes.variety`) on the texts, `kinds` (keep ratio and routes by kind of
prompt), `samples` (answers). Figures that are means over inputs can be mixed: see `blend`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dynadepth.architectures import decoder_layers
from dynadepth.benchmark import cut_prompts, run
from dynadepth.budget import forward, prompts_to_batches
from dynadepth.evaluation import evaluate
from dynadepth.evaluation.scoring import DenseStates
from dynadepth.evaluation.spent import Spent
from dynadepth.frontier.prompts import KINDS, SAMPLES, encoded
from dynadepth.frontier.settings import Settings
from dynadepth.report.routes import variety
from dynadepth.report.samples import answers
from dynadepth.routed import is_attached, routing_of
from dynadepth.routing.decision import Site
from dynadepth.routing.recorder import Recorder, recording
from dynadepth.tuning.data import pad_token_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Tell = Callable[[str], object]
WHOLE = {"routed": 1.0, "all": 1.0}
"""The keep ratio of a model without routers."""
SHARES = ("flops_share", "flops_share_target", "kv_share")

Keep = Callable[[str, Callable[[], dict[str, Any]]], dict[str, Any]]
"""Given a piece's name and what measures it: the piece, measured now or before (`pieces.Pieces`)."""


def at_once(name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Measures a piece and keeps nothing."""
    return measure()


def measured(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    tell: Tell,
    prompts: bool = True,
    keep: Keep = at_once,
    dense_states: DenseStates | None = None,
) -> dict[str, Any]:
    """Quality of the model as it stands, routed or bare, and what it executed; without `prompts` on the texts and tasks
    alone (`kinds` and `samples` stay empty). Each text and each task, the kinds and the samples are pieces of their own
    for `keep`."""
    common: dict[str, Any] = {"seed": settings.seed, "with_rows": True, "progress": tell}

    def read(file: str) -> dict[str, Any]:
        with recording() as record:
            found = evaluate(
                model,
                tokenizer,
                perplexity=[file],
                max_windows=settings.max_windows,
                compare_dense=is_attached(model),
                dense_states=dense_states,
                **common,
            )
        routes = [{str(site): passes for site, passes in row.items()} for row in record.sequences]
        found |= {"perplexity": _by_file(found["perplexity"]), "routes": routes}
        found["rows"] = {name: _by_file(found["rows"][name]) for name in ("perplexity", "kl")}
        return found

    def solved(task: str) -> dict[str, Any]:
        return evaluate(
            model, tokenizer, tasks=[task], task_data=settings.task_data, limit=settings.limit, **common
        )  # fmt: skip

    texts = [keep(f"text {Path(file).name}", partial(read, file)) for file in settings.perplexity]
    tasks = [keep(f"task {task}", partial(solved, task)) for task in settings.tasks]
    kinds, samples = {}, []
    if prompts:
        tell("keep ratio by kind of prompt")
        kinds = keep("kinds", partial(by_kind, model, tokenizer))
        tell("sample answers")
        written = partial(answers, model, tokenizer, SAMPLES, settings.answer_tokens)
        samples = keep("samples", lambda: {"answers": written()})["answers"]
    rows = {name: _together(text["rows"][name] for text in texts) for name in ("perplexity", "kl")}
    if tasks:
        rows["tasks"] = _together(task["rows"]["tasks"] for task in tasks)
    spent = Spent.joined([text["spent"] for text in texts])
    routes = [{Site.parse(site): passes for site, passes in row.items()} for text in texts for row in text["routes"]]
    return {
        "layers": len(decoder_layers(model)),
        "target": routing_of(model).target.name if is_attached(model) else None,
        "granularity": routing_of(model).config.granularity if is_attached(model) else None,
        "text": {
            "perplexity": _together(text["perplexity"] for text in texts),
            "kl": _by_token(texts, "kl", 0.0),
            "agreement": _by_token(texts, "agreement", 1.0),
            **_figures(model, spent),
        },
        "tasks": _of_tasks(model, tasks),
        "rows": rows,
        "site_keep": spent.passes,
        "routes": variety(routes, sticky=not is_attached(model) or routing_of(model).granularity.sticky),
        "kinds": kinds,
        "samples": samples,
    }


def _of_tasks(model: PreTrainedModel, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not parts:
        return None
    results = _together(part["tasks"] for part in parts)
    values = [part["average"] for part in parts if part["average"] is not None]
    average = sum(values) / len(values) if values else None
    return {"tasks": results, "average": average, **_figures(model, Spent.joined([part["spent"] for part in parts]))}


def _together(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: value for part in parts for name, value in part.items()}


def _by_token(texts: Sequence[Mapping[str, Any]], name: str, bare: float) -> float:
    """The mean over all scored tokens of a figure that each text has; `bare` for a model without routers."""
    counts = [sum(figures["n_tokens"] for figures in text["perplexity"].values()) for text in texts]
    values = [bare if text[name] is None else text[name] for text in texts]
    return sum(n * value for n, value in zip(counts, values, strict=True)) / sum(counts)


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
    else is that of the largest share, and so are `samples`, each of which was written under one route. A perplexity is
    made again from its mixed `nll`, a speed-up from its mixed times."""
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
        if isinstance(main.get("samples"), list):
            mixed["samples"] = main["samples"]
        if {"ppl", "nll"} <= set(mixed):
            mixed["ppl"] = math.exp(min(mixed["nll"], 700.0))
        return mixed | _ratios(mixed, main) if mixed.get("routed_s") else mixed
    if all(isinstance(value, list) for value in values) and len({len(value) for value in values}) == 1:
        return [blend(zip((share for share, _ in parts), items, strict=True)) for items in zip(*values, strict=True)]
    if all(type(value) in (int, float) for value in values) and len(set(values)) > 1:
        return sum(share * value for share, value in parts)
    return main


def _ratios(mixed: Mapping[str, Any], main: Mapping[str, Any]) -> dict[str, Any]:
    """What a `bench` cell says of times, of mixed ones: means of ratios are not ratios of means."""
    dense_s, routed_s, nominal_s = (mixed[name] for name in ("dense_s", "routed_s", "nominal_s"))
    ideal = 0.0 if nominal_s is None else dense_s - nominal_s
    efficiency = (dense_s - routed_s) / ideal if ideal > 0 else None
    times = {name: (main.get(f"{name}_s"), mixed.get(f"{name}_s")) for name in main["tokens_per_s"]}
    rates = {name: main["tokens_per_s"][name] * own / new for name, (own, new) in times.items() if own and new}
    return {
        "speedup": dense_s / routed_s,
        "saving": 1.0 - routed_s / dense_s,
        "overhead": routed_s / dense_s - 1.0,
        "nominal_efficiency": efficiency,
        "skip_efficiency": None if mixed["skip_efficiency"] is None else efficiency,
        "tokens_per_s": {**mixed["tokens_per_s"], **rates},
    }


def _figures(model: PreTrainedModel, spent: Spent) -> dict[str, Any]:
    if not is_attached(model):
        return {"keep_ratio": WHOLE, "depth": None, **dict.fromkeys(SHARES, 1.0)}
    return spent.figures(model)


def _routes(model: PreTrainedModel, record: Recorder) -> dict[str, Any]:
    return variety(record.sequences, sticky=not is_attached(model) or routing_of(model).granularity.sticky)


def _by_file(results: Mapping[str, Any]) -> dict[str, Any]:
    """Keyed by the files' names: where they lie on this machine tells nobody anything."""
    return {Path(file).name: figures for file, figures in results.items()}
