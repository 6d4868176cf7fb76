"""Latency cells: dense, routed and pruned time of prefill and decode, for each batch size and context.

All of a cell's models run interleaved in one go (`timing.measure`) on one batch of real prompts and share their
weights. *Dense* is the bare model, without any dynadepth module. *Routed* is the given model, its routers deciding.
*Pruned* is the twin without the sublayers that the route skipped,
and with the blocks that it repeated twice. *Execute-all* is the routed model with every
threshold at minus infinity: routers run, the cache is in use, nothing is skipped; what it takes beyond dense is the
price of routing itself.

A single pruned twin exists only where all rows of a batch took one route at sequence granularity; elsewhere `pruned_s`
and `skip_efficiency` are null, and the ideal is *nominal*: the time of dense less what the twin without every sublayer
that any unit skipped saves, scaled by the FLOPs that the route saves over those which that twin does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dynadepth.benchmark.memory import peak_bytes
from dynadepth.benchmark.pruned import bare_twin, pruned_twin, shared_copy
from dynadepth.benchmark.timing import Samples, Work, measure, median, spread
from dynadepth.cost import flops, flops_share
from dynadepth.errors import ConfigError, DataError
from dynadepth.routed import is_attached, routing_of
from dynadepth.routing.cache import RoutedCache
from dynadepth.routing.decision import Site
from dynadepth.routing.recorder import recording

Cell = dict[str, Any]
UNITS = {"prefill": "s/prefill", "decode": "s/token", "generate": "s/call"}


def run(
    model: PreTrainedModel,
    prompts_ids: Tensor,
    *,
    batches: Iterable[int],
    contexts: Iterable[int],
    new_tokens: int = 32,
    repeats: int = 5,
    variants: Iterable[str] = ("routed", "execute_all"),
    progress: Callable[[str], object] | None = None,
) -> list[Cell]:
    """One cell a variant, batch, context and phase (`prefill`, `decode`; `generate` for `execute_all`).

    `prompts_ids`: int64 `[at least the largest batch, at least the largest context + new_tokens]`, as `cut_prompts`
    makes them. A model without routers gets cells of the variant `dense` alone. `progress` is told what runs, in words.
    Raises `DataError` for too few or too short prompts and `ConfigError` for values that make no cell.

    Times are medians in seconds of the `unit` for the whole batch; `spread` is the largest interquartile range over
    median among them. Beyond the keys of the command line's contract a cell has `spreads` per model,
    `nominal_s` and `nominal_efficiency` (see the module), `keep_ratio` of the routed sites, `overhead` (routed over
    dense, less one), `peak_bytes` per model over prefill and decode, and `samples`.
    """
    batches, contexts, variants = list(batches), list(contexts), list(variants)
    _check(prompts_ids, batches, contexts, new_tokens, repeats, variants)
    model.eval()
    dense = bare_twin(model)
    device = next(model.parameters()).device
    cells: list[Cell] = []
    for batch in batches:
        for context in contexts:
            work = Work(prompts_ids[:batch, : context + new_tokens].to(device), context)
            label = f"batch {batch}, context {context}"

            def tell(what: str, label: str = label) -> None:
                if progress is not None:
                    progress(f"{label}: {what}")

            cells += _grid_point(model, dense, work, variants, repeats, tell)
    return cells


def _grid_point(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    work: Work,
    variants: list[str],
    repeats: int,
    tell: Callable[[str], None],
) -> list[Cell]:
    models: dict[str, PreTrainedModel] = {"dense": dense}
    route: dict[str, dict[Site, list[float]]] = {}
    skipping: set[Site] = set()  # sites that any unit skips, in either phase
    twice: set[Site] = set()  # blocks that repeat, where all rows took one route
    if is_attached(model):
        if "routed" in variants:
            tell("finding the route")
            models["routed"], route = model, _observe(model, work)
            skipping = {site for phase in route.values() for site, kept in phase.items() if min(kept) < 1.0}
            if all(len(set(kept)) == 1 for phase in route.values() for kept in phase.values()):
                twice = {site for site, kept in route["prefill"].items() if kept[0] > 1.0}
            models["pruned"] = pruned_twin(model, skipping, twice)
        if "execute_all" in variants:
            models["execute_all"] = execute_all_copy(model)
    samples = measure(
        models,
        work,
        repeats=repeats,
        generate=[name for name in ("dense", "execute_all") if "execute_all" in models],
        progress=tell,
    )
    tell("memory")
    device = work.ids_BT.device
    peaks = {name: peak_bytes(partial(_prefill_and_steps, one, work), device) for name, one in models.items()}

    cells = []
    timed: list[str] = [name for name in ("routed", "execute_all") if name in models]
    for name in timed or ["dense"]:
        phases = ("prefill", "decode", "generate") if name == "execute_all" else ("prefill", "decode")
        for phase in phases:
            cell = _cell(model, work, name, phase, samples)
            shown = ("dense", "routed", "pruned") if name == "routed" else dict.fromkeys(("dense", name))
            cell["peak_bytes"] = {n: peaks[n] for n in shown}
            if name == "routed":
                _add_ideal(cell, model, work, phase, route[phase], skipping, twice, samples)
            cells.append(cell)
    return cells


def execute_all_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The routed model with every router's threshold at minus infinity, on shared weights; the given one stays."""
    copy = shared_copy(model).eval()
    for router in routing_of(copy).routers().values():
        router.threshold = torch.full_like(router.threshold, float("-inf"))
        router.asked = True  # whatever the budget: their cost is what is measured
        if router.constant is not None:
            router.constant = True
    return copy


def _observe(model: PreTrainedModel, work: Work) -> dict[str, dict[Site, list[float]]]:
    """Executions per phase and site: real decisions on these prompts.

    One a row, 0, 1 or 2, where routes are sticky; else one alone, the mean over rows and tokens.
    """
    shares: dict[str, dict[Site, list[float]]] = {}
    with torch.no_grad(), recording() as record:
        cache = work.prefill(model)
        for index in range(work.new_tokens):
            work.step(model, cache, index)
    for phase in ("prefill", "decode"):
        if isinstance(cache, RoutedCache) and cache.routes:  # sticky
            shares[phase] = {site: [float(count) for count in rows] for site, rows in cache.routes.items()}
        else:
            shares[phase] = {site: [share] for site, share in record.site_keep(phase).items()}
    return shares


def _prefill_and_steps(model: PreTrainedModel, work: Work, steps: int = 4) -> None:
    with torch.no_grad():
        cache = work.prefill(model)
        for index in range(min(steps, work.new_tokens)):
            work.step(model, cache, index)


def _cell(model: PreTrainedModel, work: Work, name: str, phase: str, samples: Mapping[str, Samples]) -> Cell:
    times: dict[str, list[float]] = {n: getattr(samples[n], phase) for n in ("dense", name)}
    spreads = {n: spread(values) for n, values in times.items()}
    after = "prefill" if phase == "prefill" else "decode"
    dense_s = median(times["dense"])
    routed_s = None if name == "dense" else median(times[name])
    return {
        "variant": name,
        "granularity": routing_of(model).config.granularity if is_attached(model) else None,
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch": work.ids_BT.shape[0],
        "context": work.context,
        "phase": phase,
        "unit": UNITS[phase],
        "dense_s": dense_s,
        "routed_s": routed_s,
        "pruned_s": None,
        "spread": _largest(spreads),
        "speedup": dense_s / routed_s if routed_s else None,
        "skip_efficiency": None,
        "kv_bytes_dense": samples["dense"].kv_bytes[after],
        "kv_bytes_routed": None if name == "dense" else samples[name].kv_bytes[after],
        "new_tokens": work.new_tokens,
        "overhead": routed_s / dense_s - 1.0 if routed_s else None,
        "keep_ratio": 1.0 if name == "execute_all" else None,
        "nominal_s": None,
        "nominal_efficiency": None,
        "spreads": spreads,
        "samples": {n: len(values) for n, values in times.items()},
    }


def _add_ideal(
    cell: Cell,
    model: PreTrainedModel,
    work: Work,
    phase: str,
    kept: Mapping[Site, list[float]],
    absent: Collection[Site],
    twice: Collection[Site],
    samples: Mapping[str, Samples],
) -> None:
    """Fills in what a model without the skipped work takes, and how much of that saving the routed model has."""
    pruned = getattr(samples["pruned"], phase)
    pruned_s, dense_s, routed_s = median(pruned), cell["dense_s"], cell["routed_s"]
    keep = {site: sum(shares) / len(shares) for site, shares in kept.items()}
    cell["keep_ratio"] = sum(min(share, 1.0) for share in keep.values()) / len(keep)
    saving = dense_s - pruned_s
    single = all(passes == (0.0 if site in absent else 2.0 if site in twice else 1.0) for site, passes in keep.items())
    if single:
        cell["pruned_s"], cell["nominal_s"] = pruned_s, pruned_s
        cell["spreads"]["pruned"] = spread(pruned)
        cell["spread"] = _largest(cell["spreads"])
    elif not absent:  # rows that repeat beside rows that do not, and nothing skipped: no saving to measure by
        return
    else:
        cell["nominal_s"] = dense_s - saving * _share_saved(model, work, phase, keep, absent)
    ideal = dense_s - cell["nominal_s"]
    efficiency = (dense_s - routed_s) / ideal if ideal > 0 else None
    cell["nominal_efficiency"] = efficiency
    cell["skip_efficiency"] = efficiency if single else None


def _largest(spreads: Mapping[str, float | None]) -> float | None:
    return max((value for value in spreads.values() if value is not None), default=None)


def _share_saved(
    model: PreTrainedModel, work: Work, phase: str, keep: Mapping[Site, float], absent: Collection[Site]
) -> float:
    """FLOPs that the route saves, over those that the pruned model saves."""
    tokens, past = (work.context, 0) if phase == "prefill" else (1, work.context + work.new_tokens // 2)
    pruned = sum(flops(model, site.target, site.layer, tokens, past) for site in absent)
    routing = routing_of(model)
    all_of_target = sum(flops(model, routing.config.target, i, tokens, past) for i in range(routing.n_layers))
    return (1.0 - flops_share(model, keep, tokens, past).target) * all_of_target / pruned


def _check(
    prompts: Tensor, batches: list[int], contexts: list[int], new_tokens: int, repeats: int, variants: list[str]
) -> None:
    if not batches or not contexts or min(*batches, *contexts, new_tokens, repeats) < 1:
        raise ConfigError(
            f"nothing to time: batches {batches}, contexts {contexts}, new tokens {new_tokens} and repeats {repeats} "
            "must all be at least 1"
        )
    unknown = set(variants) - {"routed", "execute_all"}
    if unknown:
        raise ConfigError(f"unknown variants {sorted(unknown)}: 'routed' and 'execute_all' are known")
    needed = (max(batches), max(contexts) + new_tokens)
    if prompts.dim() != 2 or prompts.shape[0] < needed[0] or prompts.shape[1] < needed[1]:
        raise DataError(
            f"prompts of shape {tuple(prompts.shape)} are too few or too short: {needed[0]} rows of {needed[1]} tokens "
            "are needed (the largest batch, the largest context + new tokens)"
        )
