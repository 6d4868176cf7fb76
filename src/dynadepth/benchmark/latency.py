"""Latency cells: dense, routed and pruned time of prefill and decode, for each batch size and context.

All of a grid point's models run interleaved in one go (`timing.measure`) on one batch of real prompts and share their
weights. *Dense* is the bare model, without any dynadepth module. *Routed* is the given model, its routers deciding.
*Pruned* is the twin without the sublayers that the route skipped, and with the blocks that it repeated twice.
*Execute-all* is the routed model with every threshold at minus infinity: routers run, the cache is in use, nothing is
skipped; what it takes beyond dense is the price of routing itself. Beside them stand the kinds of routing of
`variants`, which need nothing tuned.

A single pruned twin exists only where all rows of a batch took one route at sequence granularity; elsewhere `pruned_s`
and `skip_efficiency` are null, and the ideal is *nominal*: the time of dense less what a pruned twin saves, scaled by
the FLOPs that the route saves over those which that twin does (of mixed rows, the sum over sites of the rows that
skip). That twin lacks every sublayer that any unit skipped, or of a variant as many as its keep ratio says.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dynadepth.architectures import positions_of
from dynadepth.benchmark.ideal import ideal_saving
from dynadepth.benchmark.pruned import bare_twin, pruned_twin, shared_copy
from dynadepth.benchmark.timing import Samples, Work, measure, median, spread
from dynadepth.benchmark.variants import Variant, applicable, build, drawn_sites, settling
from dynadepth.compiled import compile_model, is_compiled, uncompile
from dynadepth.cost import flops, flops_share
from dynadepth.errors import ConfigError, DataError, UnsupportedModelError
from dynadepth.routed import is_attached, routing_of
from dynadepth.routing.cache import RoutedCache
from dynadepth.routing.decision import Site
from dynadepth.routing.recorder import recording

Cell = dict[str, Any]
Shares = dict[str, dict[Site, list[float]]]
"""Per phase and site what executed, as `ideal.Kept`."""
UNITS = {"prefill": "s/prefill", "decode": "s/token", "generate": "s/call"}


def run(model: PreTrainedModel, prompts_ids: Tensor, **options: Any) -> list[Cell]:
    """All cells of `grid`, which says what the options are."""
    return list(chain.from_iterable(grid(model, prompts_ids, **options)))


def grid(
    model: PreTrainedModel,
    prompts_ids: Tensor,
    *,
    batches: Iterable[int],
    contexts: Iterable[int],
    new_tokens: int = 32,
    repeats: int = 5,
    seconds: float | None = None,
    variants: Iterable[str] = ("routed", "execute_all"),
    compare: Iterable[Variant] = (),
    compiled: bool = False,
    finished: Collection[tuple[int, int]] = (),
    progress: Callable[[str], object] | None = None,
) -> Iterator[list[Cell]]:
    """The cells of one point (batch, context) after the other: one a variant and phase (`prefill`, `decode`; `generate`
    for `execute_all`).

    `prompts_ids`: int64 `[at least the largest batch, at least the largest context + new_tokens]`, as `cut_prompts`
    makes them. `variants` are of the given model's own routers: one without any has cells of what is in `compare`, or
    of the variant `dense` alone. `compiled`: every model decodes as `dynadepth.compile` makes it, and beside them
    stands the bare one, not compiled (`plain_s`; null otherwise). `seconds`: no further round (of `repeats`) is begun
    at a point once its rounds have taken as long, though three always run. `finished` points are left out. `progress`
    is told what runs, in words. Raises `DataError` for too few or too short prompts and `ConfigError` for values that
    make no cell.

    Times are medians in seconds of the `unit` for the whole batch; `spread` is the largest interquartile range over
    median among them. Beyond the keys of the command line's contract a cell has `saving` (1 - routed over dense) and
    `ideal_saving` (what FLOPs or bytes say: see `ideal`), `spreads` and `tokens_per_s` per model, `nominal_s` and
    `nominal_efficiency` (see the module), `keep_ratio` of the routed sites and `keep_ratio_all` of all of the target,
    `overhead` (routed over dense, less one), `peak_bytes` per model (of a prefill, its cache included), `samples`, and
    `beyond_positions` where the work is longer than the model was made for, so that its time means something and its
    text does not. A cell's own model goes by its variant's name there.
    """
    batches, contexts, variants, compare = list(batches), list(contexts), list(variants), list(compare)
    _check(prompts_ids, batches, contexts, new_tokens, repeats, variants, seconds)
    model.eval()
    bench = _Bench(model, variants, compare, compiled, repeats, seconds)
    device = next(model.parameters()).device
    for batch in batches:
        for context in contexts:
            if (batch, context) in finished:
                continue
            work = Work(prompts_ids[:batch, : context + new_tokens].to(device), context)
            label = f"batch {batch}, context {context}"

            def tell(what: str, label: str = label) -> None:
                if progress is not None:
                    progress(f"{label}: {what}")

            yield bench.point(work, tell)


class _Twin(NamedTuple):
    """What a pruned twin lacks of the model, and has twice."""

    absent: frozenset[Site]
    twice: frozenset[Site]

    def passes(self, site: Site) -> float:
        return 0.0 if site in self.absent else 2.0 if site in self.twice else 1.0


class _Bench:
    """The models of a grid: what is the same at every point is made once."""

    def __init__(
        self,
        model: PreTrainedModel,
        variants: Sequence[str],
        compare: Sequence[Variant],
        compiled: bool,
        repeats: int,
        seconds: float | None,
    ) -> None:
        self.plain, self.repeats, self.seconds, self.compiled = bare_twin(model), repeats, seconds, compiled
        self.dense = self._finished(bare_twin(model)) if compiled else self.plain
        self.own: dict[str, PreTrainedModel] = {}
        if is_attached(model):
            copies: dict[str, Callable[[], PreTrainedModel]] = {
                "routed": lambda: self._routed(model),
                "execute_all": lambda: self._finished(execute_all_copy(model)),
            }
            config = routing_of(model).config
            if "execute_all" in variants and not config.has_thresholds:
                del copies["execute_all"]
                warnings.warn(
                    f"What routing itself costs is not timed: routers of method {config.name!r} have no threshold that "
                    "would let everything execute.",
                    UserWarning,
                    stacklevel=2,
                )
            self.own = {name: copies[name]() for name in copies if name in variants}
        self.compared = {variant: self._finished(build(self.plain, variant)) for variant in compare}
        self.pruned: dict[_Twin, PreTrainedModel] = {}

    def point(self, work: Work, tell: Callable[[str], None]) -> list[Cell]:
        """The cells of one batch size and context."""
        routed = dict(self.own)
        compared = {str(variant): variant for variant in applicable(self.compared, work.ids_BT.shape[0])}
        routed |= {name: self.compared[variant] for name, variant in compared.items()}
        shares: dict[str, Shares] = {}
        for name, one in routed.items():
            variant = compared.get(name)
            if name == "routed" or (variant is not None and variant.by_input):
                tell(f"finding the route of {name}")
                shares[name] = _observe(one, work, nullcontext() if variant is None else settling(one, variant))
        twin_of = self._twins(routed, shares)
        label = {twin: f"pruned {i}" for i, twin in enumerate(dict.fromkeys(twin_of.values()))}
        models = {"dense": self.dense, **routed, **{name: self._pruned(twin) for twin, name in label.items()}}
        if self.compiled:
            models["plain"] = self.plain
        samples = measure(
            models,
            work,
            repeats=self.repeats,
            at_most=self.seconds,
            generate=[name for name in ("dense", "execute_all", "plain") if name in models and "execute_all" in routed],
            progress=tell,
        )
        cells = []
        for name in routed or ["dense"]:
            one, own = models[name], samples[name]
            found = shares.get(name) or dict.fromkeys(("prefill", "decode"), _by_row(own.routes))
            for phase in ("prefill", "decode", "generate") if name == "execute_all" else ("prefill", "decode"):
                cell = _cell(one, work, name, phase, samples)
                if name in routed and name != "execute_all":
                    _add_keep(cell, one, work, found[phase])
                if name in twin_of:
                    _add_pruned(cell, one, work, found[phase], twin_of[name], samples[label[twin_of[name]]])
                cells.append(cell)
        return cells

    def _routed(self, model: PreTrainedModel) -> PreTrainedModel:
        """The given one, or where all are to be compiled or it alone is, a copy on the same weights."""
        if not (self.compiled or is_compiled(model)):
            return model
        return self._finished(uncompile(shared_copy(model).eval()))

    def _pruned(self, twin: _Twin) -> PreTrainedModel:
        if twin not in self.pruned:
            self.pruned[twin] = self._finished(pruned_twin(self.plain, twin.absent, twin.twice))
        return self.pruned[twin]

    def _finished(self, model: PreTrainedModel) -> PreTrainedModel:
        if not self.compiled:
            return model
        try:
            return compile_model(model)
        except UnsupportedModelError as error:  # a twin without any attention has no cache to step on
            warnings.warn(f"{error} It is timed uncompiled.", UserWarning, stacklevel=2)
            return model

    def _twins(self, routed: Mapping[str, PreTrainedModel], shares: Mapping[str, Shares]) -> dict[str, _Twin]:
        """For each model with a pruned twin to be compared with: what that one lacks, and has twice."""
        found = {}
        if "routed" in routed:
            phases = shares["routed"].values()
            absent = frozenset(site for phase in phases for site, kept in phase.items() if min(kept) < 1.0)
            twice: frozenset[Site] = frozenset()
            if all(len(set(kept)) == 1 for phase in phases for kept in phase.values()):  # all rows took one route
                twice = frozenset(site for site, kept in shares["routed"]["prefill"].items() if kept[0] > 1.0)
            found["routed"] = _Twin(absent, twice)
        for variant in self.compared:
            if str(variant) in routed and (skipped := drawn_sites(self.plain, variant.keep)):
                found[str(variant)] = _Twin(skipped, frozenset())
        return found


def execute_all_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The routed model with every router's threshold at minus infinity, on shared weights; the given one stays."""
    copy = uncompile(shared_copy(model).eval())
    for router in routing_of(copy).routers().values():
        router.threshold = torch.full_like(router.threshold, float("-inf"))
        router.asked = True  # whatever the budget: their cost is what is measured
        if router.constant is not None:
            router.constant = True
    return copy


def _observe(model: PreTrainedModel, work: Work, settled: AbstractContextManager[None]) -> Shares:
    """Runs prefill (inside `settled`) and decode once. Executions per phase and site on these prompts.

    One a row, 0, 1 or 2, where routes are sticky; else one alone, the mean over rows and tokens.
    """
    with torch.no_grad(), recording() as record:
        with settled:
            cache = work.prefill(model)
        for index in range(work.new_tokens):
            work.step(model, cache, index)
    if isinstance(cache, RoutedCache) and cache.routes:  # sticky
        return dict.fromkeys(("prefill", "decode"), _by_row(cache.routes))
    return {
        phase: {site: [share] for site, share in record.site_keep(phase).items()} for phase in ("prefill", "decode")
    }


def _by_row(routes: Mapping[Site, Sequence[int]]) -> dict[Site, list[float]]:
    return {site: [float(count) for count in rows] for site, rows in routes.items()}


def _cell(model: PreTrainedModel, work: Work, name: str, phase: str, samples: Mapping[str, Samples]) -> Cell:
    names = [n for n in dict.fromkeys(("dense", name, "plain")) if n in samples]
    times: dict[str, list[float]] = {n: getattr(samples[n], phase) for n in names}
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
        "plain_s": median(times["plain"]) if times.get("plain") else None,
        "spread": _largest(spreads),
        "speedup": dense_s / routed_s if routed_s else None,
        "skip_efficiency": None,
        "kv_bytes_dense": samples["dense"].kv_bytes[after],
        "kv_bytes_routed": None if name == "dense" else samples[name].kv_bytes[after],
        "state_bytes_routed": None if name == "dense" else samples[name].state_bytes,
        "reserved_bytes_routed": None if name == "dense" or phase == "prefill" else samples[name].reserved_bytes,
        "new_tokens": work.new_tokens,
        "beyond_positions": _is_beyond(model, work),
        "tokens_per_s": {n: _tokens(work, phase) / median(values) for n, values in times.items()},
        "saving": 1.0 - routed_s / dense_s if routed_s else None,
        "ideal_saving": None,
        "overhead": routed_s / dense_s - 1.0 if routed_s else None,
        "keep_ratio": 1.0 if name == "execute_all" else None,
        "keep_ratio_all": 1.0 if name == "execute_all" else None,
        "nominal_s": None,
        "nominal_efficiency": None,
        "spreads": spreads,
        "peak_bytes": {n: samples[n].peak_bytes for n in times},
        "samples": {n: len(values) for n, values in times.items()},
    }


def _tokens(work: Work, phase: str) -> int:
    """Tokens read or written in one sample of a phase."""
    each = {"prefill": work.context, "decode": 1, "generate": work.new_tokens}[phase]
    return work.ids_BT.shape[0] * each


def _add_keep(cell: Cell, model: PreTrainedModel, work: Work, kept: Mapping[Site, list[float]]) -> None:
    """Fills in what was executed, and what that should save by the model of `ideal`."""
    skipped = sum(1.0 - min(sum(shares) / len(shares), 1.0) for shares in kept.values())
    cell["keep_ratio"] = 1.0 - skipped / len(kept)
    cell["keep_ratio_all"] = 1.0 - skipped / routing_of(model).n_layers
    size = (work.ids_BT.shape[0], work.context, work.new_tokens)
    cell["ideal_saving"] = ideal_saving(model, kept, cell["phase"], *size)


def _add_pruned(
    cell: Cell,
    model: PreTrainedModel,
    work: Work,
    kept: Mapping[Site, list[float]],
    twin: _Twin,
    timed: Samples,
) -> None:
    """Fills in what a model without the skipped work takes, and how much of that saving the routed model has."""
    phase = cell["phase"]
    pruned = getattr(timed, phase)
    cell["peak_bytes"]["pruned"] = timed.peak_bytes
    pruned_s, dense_s, routed_s = median(pruned), cell["dense_s"], cell["routed_s"]
    saving = dense_s - pruned_s
    single = all(set(shares) == {twin.passes(site)} for site, shares in kept.items())
    cell["spreads"]["pruned"] = spread(pruned)  # of what the nominal saving is made of, too
    cell["spread"] = _largest(cell["spreads"])
    if single:
        cell["pruned_s"], cell["nominal_s"] = pruned_s, pruned_s
        cell["tokens_per_s"]["pruned"] = _tokens(work, phase) / pruned_s
    elif not twin.absent:  # rows that repeat beside rows that do not, and nothing skipped: no saving to measure by
        return
    else:
        keep = {site: sum(shares) / len(shares) for site, shares in kept.items()}
        cell["nominal_s"] = dense_s - saving * _share_saved(model, work, phase, keep, twin.absent)
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
    prompts: Tensor,
    batches: list[int],
    contexts: list[int],
    new_tokens: int,
    repeats: int,
    variants: list[str],
    seconds: float | None,
) -> None:
    if not batches or not contexts or min(*batches, *contexts, new_tokens, repeats) < 1:
        raise ConfigError(
            f"nothing to time: batches {batches}, contexts {contexts}, new tokens {new_tokens} and repeats {repeats} "
            "must all be at least 1"
        )
    if seconds is not None and seconds <= 0:
        raise ConfigError(f"the seconds for a point of the grid must be more than 0, not {seconds:g}")
    unknown = set(variants) - {"routed", "execute_all"}
    if unknown:
        raise ConfigError(f"unknown variants {sorted(unknown)}: 'routed' and 'execute_all' are known")
    needed = (max(batches), max(contexts) + new_tokens)
    if prompts.dim() != 2 or prompts.shape[0] < needed[0] or prompts.shape[1] < needed[1]:
        raise DataError(
            f"prompts of shape {tuple(prompts.shape)} are too few or too short: {needed[0]} rows of {needed[1]} tokens "
            "are needed (the largest batch, the largest context + new tokens)"
        )


def _is_beyond(model: PreTrainedModel, work: Work) -> bool:
    limit = positions_of(model)
    return limit is not None and work.ids_BT.shape[1] > limit
