"""The cost table of this machine: measured once for a model and its routing, then read from the user's cache.

What is timed is the routed model with all its mechanism (routers are asked, skip paths run, the cache is the routed
one) against the bare model without any dynadepth module, interleaved. Which units execute is drawn, so that the keep
ratio is known and neither the routers' quality nor the text matters: one table serves all routers of one recipe.

Tables are JSON files in the folder `cost-tables` of the cache (see `hub.cache_dir`), one a setting.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import warnings
from collections.abc import Callable, Sequence
from contextvars import Context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dynadepth import adapter, provenance
from dynadepth.architectures import decoder_layers, positions_of
from dynadepth.benchmark.cost_table import CostTable, Times, Workload
from dynadepth.benchmark.pruned import bare_twin, shared_copy
from dynadepth.benchmark.timing import Samples, Work, measure, median, spread
from dynadepth.compiled import uncompile
from dynadepth.errors import ConfigError
from dynadepth.hub import cache_dir
from dynadepth.methods import DepthConfig
from dynadepth.routed import Routing, routing_of, unwrapped
from dynadepth.routing.decision import RoutingDecision
from dynadepth.routing.router import AbstractRouter
from dynadepth.routing.whole_route import decide_each

Progress = Callable[[str], object]

FORMAT = 3
ROUNDS = 5
"""Of each model, after one that warms up: as many prefills."""
STEPS = 8
"""Decode steps a round, in the middle of the new tokens."""


def cost_table(model: torch.nn.Module, workload: Workload, progress: Progress | None = None) -> CostTable:
    """The table of a routed model: from the cache, else measured (some 20 s for 135 million parameters on two cores).

    A damaged file is measured anew, with a warning that names it; a folder that cannot be written is warned of, too.
    Raises ConfigError for a workload longer than the model reads.
    """
    base = unwrapped(model)
    limit = positions_of(base)
    if limit is not None and workload.context + workload.new_tokens > limit:
        raise ConfigError(f"{workload} cannot be timed: the model reads {limit:,}; ask for a shorter workload.")
    setting = describe(base, workload)
    path = _path(setting)
    found = read(path, setting)
    if found is None:
        found = measure_table(base, workload, progress)
        write(path, setting, found)
    return found


def table_path(model: torch.nn.Module, workload: Workload) -> Path:
    """Where the table of `cost_table` is kept; deleted there, it is measured again."""
    return _path(describe(unwrapped(model), workload))


def _path(setting: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()
    return cache_dir() / "cost-tables" / f"{digest[:16]}.json"


def describe(model: PreTrainedModel, workload: Workload) -> dict[str, Any]:
    """All that a table depends on: model, routing, workload, machine and versions."""
    routing, run = routing_of(model), provenance.provenance()
    identity = adapter.identity(model, decoder_layers(model, routing.spec))
    del identity["name"]  # a folder's: the same weights may lie in several
    return {
        "format": FORMAT,
        "model": {
            **identity,
            "class": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "attention": model.config._attn_implementation,
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "routing": {
            "method": routing.config.name,
            **{field.name: getattr(routing.config, field.name) for field in dataclasses.fields(DepthConfig)},
            "layers": [site.layer for site in routing.sites],
            **({} if routing.lora is None else {"lora": routing.lora.facts()}),
        },
        "workload": dataclasses.asdict(workload),
        "device": next(model.parameters()).device.type,
        **{name: run["hardware"][name] for name in ("cpu", "cores", "threads", "gpu")},
        **{name: run[name] for name in ("dynadepth", *provenance.PACKAGES)},
    }


def read(path: Path, setting: dict[str, Any]) -> CostTable | None:
    """The table kept in `path`; None where none can be read, or (with a warning) a damaged one."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["setting"] != setting:
            raise ValueError("it is of another setting")
        return CostTable.from_dict(document["table"])
    except OSError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"The cost table {path} is damaged ({error!r}): it is measured anew.", UserWarning, stacklevel=2)
        return None


def write(path: Path, setting: dict[str, Any], table: CostTable) -> None:
    """Keeps a table, whole or not at all; a warning where that is impossible."""
    document = {"setting": setting, "table": table.to_dict(), "provenance": provenance.provenance()}
    text = json.dumps(document, indent=2) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        adapter.atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    except OSError as error:
        warnings.warn(
            f"The cost table cannot be kept in {path.parent} ({error.strerror or error}), so it will be measured "
            "again: make room, or point DYNADEPTH_CACHE at another folder.",
            UserWarning,
            stacklevel=2,
        )


def measure_table(model: PreTrainedModel, workload: Workload, progress: Progress | None = None) -> CostTable:
    """Times the bare model and the routed one at `measured_keeps`, interleaved; nothing of `model` changes."""
    steps = min(STEPS, workload.new_tokens - 1)
    ahead = (workload.new_tokens - 1 - steps) // 2
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    size = (workload.batch, workload.context + ahead + steps)
    ids = torch.randint(vocabulary, size, generator=torch.Generator().manual_seed(0))
    work = Work(ids.to(next(model.parameters()).device), workload.context, ahead)
    names = {f"keep {keep:g}": keep for keep in measured_keeps(routing_of(model))}
    models = {"dense": bare_twin(model), **{name: drawn_copy(model, keep) for name, keep in names.items()}}

    def tell(line: str) -> None:
        if progress is not None:
            progress(f"measuring this machine, once, at {workload}: {line}")

    # In a context of its own: what the caller records or injects is not meant for this.
    samples = Context().run(measure, models, work, repeats=ROUNDS, progress=tell)
    times = {name: _medians(one) for name, one in samples.items()}
    spreads = [spread(values) or 0.0 for one in samples.values() for values in (one.prefill, one.decode)]
    return CostTable(workload, times["dense"], {keep: times[name] for name, keep in names.items()}, max(spreads))


def _medians(samples: Samples) -> Times:
    return Times(median(samples.prefill), median(samples.decode) if samples.decode else 0.0)


def measured_keeps(routing: Routing) -> list[float]:
    """Keep ratios of the routed sites that are timed: none, half and all of them.

    At token granularity the last is one site's share less: where no token of a forward skips, the base module's own
    call runs, which says nothing of one where few do.
    """
    n = len(routing.sites)
    return sorted({count / n for count in (0, n // 2, n if routing.granularity.sticky else n - 1)})


def drawn_copy(model: PreTrainedModel, keep: float) -> PreTrainedModel:
    """The routed model on shared weights, in eval mode, its routers asked but decisions drawn; the given one stays.

    Of a static route, whose routers are never asked, the sites that execute are drawn.
    """
    copy = uncompile(shared_copy(model).eval())  # as the dense model beside it
    routing = routing_of(copy)
    n, static = len(routing.sites), routing.is_static
    places = random.Random(0).sample(range(n), n)
    for state, place in zip(routing.states.values(), places, strict=True):
        if static:
            state.router.constant = (place + 0.5) / n < keep
        else:
            state.router = DrawnRouter(state.router, keep, (place + 0.5) / n)
    for path in routing.paths().values():
        path.to(model.dtype)  # float32 while they are tuned
    if routing.lora is not None:
        routing.lora.to(model.dtype)
    return copy


class DrawnRouter(AbstractRouter):
    """Asks the router in whose place it stands, and lets a drawn share `keep` of the units execute instead.

    `place`: in [0, 1), other for each site. Of `n` sites whose places are evenly spread, `keep · n` execute for every
    row or token, and of any number of tokens the share `keep` executes at every site (a Weyl sequence).
    """

    def __init__(self, router: AbstractRouter, keep: float, place: float) -> None:
        super().__init__()
        self.router, self.keep, self.place = router, keep, place
        self.threshold = torch.zeros_like(router.threshold)  # on its device

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.router(hidden)
        return _drawn(logits.numel(), self.keep, torch.tensor(self.place, device=logits.device)).view(logits.shape)

    @staticmethod
    def decide_each(routers: Sequence[AbstractRouter], hidden: Tensor) -> list[RoutingDecision]:
        own = [router for router in routers if isinstance(router, DrawnRouter)]
        decide_each([router.router for router in own], hidden)  # asked, and not heeded
        places = torch.tensor([[router.place] for router in own], device=hidden.device)
        drawn = _drawn(len(hidden), own[0].keep, places)
        return [RoutingDecision(*parts) for parts in zip((drawn > 0).unbind(), drawn.unbind(), strict=True)]


def _drawn(units: int, keep: float, place: Tensor) -> Tensor:
    """Logits of so many units: 1 of the share `keep`, else -1; for each of the places `[...]`, `[..., units]`."""
    steps = torch.arange(units, device=place.device) * 40503 % 65536 / 65536  # of the golden ratio
    return torch.where((steps + place) % 1 < keep, 1.0, -1.0)
