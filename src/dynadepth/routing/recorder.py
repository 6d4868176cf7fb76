"""Collects what was executed over many forwards: `with recording() as record: model.generate(...)`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from dynadepth.routing.decision import KeepRatio, RoutingTrace, Site

Phase = str | None


class Recorder:
    """Keep ratios of the forwards of one thread: padding excluded, sequences weighted equally, prefill and decode
    apart.

    Per site it keeps, for each sequence, executions and units; sequences of one generation accumulate over its steps.
    Nothing is moved from the device before a figure is asked for.
    """

    def __init__(self, by_token: bool = False) -> None:
        """`by_token`: keeps `token_shares`, too."""
        # (phase, generation) -> site -> (executed units, all units), float32 [B] each
        self._counts: dict[tuple[str, int], dict[Site, tuple[Tensor, Tensor]]] = {}
        self._generations: dict[int, tuple[Any, int]] = {}
        self._n_layers = 0
        self._by_token = by_token
        self._assigned: dict[int, tuple[Tensor, int]] = {}  # layer -> assignments [C], how many of the C are experts
        self._tokens: dict[int, list[Tensor]] = {}  # generation -> share of the sites, float32 [B, T] a forward

    def add(self, trace: RoutingTrace, generation: Any) -> None:
        """Takes in one forward; `generation` is the object (route book) that its continuation will share."""
        self._n_layers = trace.n_layers
        key = self._generations.setdefault(id(generation), (generation, len(self._generations)))[1]
        phase = "prefill" if trace.prefill else "decode"
        counts = self._counts.setdefault((phase, key), {})
        for site, route in trace.routes.items():
            rows = trace.fresh if trace.prefill and trace.fresh is not None else [True] * trace.batch
            units = torch.tensor(rows, dtype=torch.float32)
            self._count(counts, site, torch.tensor(route, dtype=torch.float32) * units, units)
        for site, decision in trace.decisions.items():
            if site in trace.routes:
                continue
            execute = decision.times.float()
            if execute.dim() == 3:  # assignments to experts: a token's share of its own
                execute = execute.mean(-1)
            units = torch.ones_like(execute)
            if execute.dim() == 2:
                if trace.token_mask is not None:
                    units = trace.token_mask.float()
                execute, units = (execute * units).sum(1), units.sum(1)
            self._count(counts, site, execute, units)
        for layer, assignments in trace.assignments.items():
            counts_C = assignments.counts().detach()
            if layer in self._assigned:
                counts_C = counts_C + self._assigned[layer][0]
            self._assigned[layer] = (counts_C, assignments.experts)
        each = [d.execute.float() for d in trace.decisions.values() if d.execute.dim() == 2] if self._by_token else []
        if each:
            self._tokens.setdefault(key, []).append(torch.stack(each).mean(0))

    @staticmethod
    def _count(counts: dict[Site, tuple[Tensor, Tensor]], site: Site, executed: Tensor, units: Tensor) -> None:
        if site in counts and counts[site][0].shape == executed.shape:
            executed, units = counts[site][0] + executed, counts[site][1] + units
        counts[site] = (executed, units)

    def _shares(self, phase: Phase) -> list[dict[Site, list[float]]]:
        """Per generation: site -> executions per unit of each of its sequences (nan where it had no unit)."""
        groups = []
        for (kind, _), counts in self._counts.items():
            if phase in (None, kind):
                groups.append({site: (done / units).tolist() for site, (done, units) in counts.items()})
        return groups

    def _sequences(self, phase: Phase) -> list[dict[Site, float]]:
        out = []
        for group in self._shares(phase):
            for row in zip(*group.values(), strict=True):
                if not any(share != share for share in row):
                    out.append(dict(zip(group, row, strict=True)))
        return out

    @property
    def sequences(self) -> list[dict[Site, float]]:
        """One entry a prefilled sequence: executions per unit, for each site (at sequence granularity 0, 1, or 2 where
        it repeats; by token a share)."""
        return self._sequences("prefill")

    @property
    def token_shares(self) -> list[Tensor]:
        """One entry a generation: the share of the routed sites that executed for each token that was read, padding
        included, float32 `[B, T]`. Recorded with `by_token`, at token granularity alone."""
        return [torch.cat(steps, dim=1) for steps in self._tokens.values()]

    @property
    def expert_load(self) -> dict[int, list[float]]:
        """By layer, the share of the assignments that each expert got, no-ops behind the experts: of all tokens alike,
        prefill and decode. Empty where no gate is watched (methods of Mixture-of-Depths-and-Experts watch them)."""
        return {layer: (counts / counts.sum()).tolist() for layer, (counts, _) in self._assigned.items()}

    @property
    def no_op_share(self) -> float | None:
        """Share of all assignments that went to no-op experts; None where no gate is watched."""
        if not self._assigned:
            return None
        shares = self.expert_load
        idle = [sum(shares[layer][experts:]) for layer, (_, experts) in self._assigned.items()]
        return sum(idle) / len(idle)

    def site_keep(self, phase: Phase = None) -> dict[Site, float]:
        """Mean share executed per site over the sequences of a phase (`"prefill"`, `"decode"`, None: both)."""
        return self._site_means(phase, most=1.0)

    def site_passes(self, phase: Phase = None) -> dict[Site, float]:
        """Mean executions per site: `site_keep` with those that repeat counted twice, which is what costs follow."""
        return self._site_means(phase, most=math.inf)

    def _site_means(self, phase: Phase, most: float) -> dict[Site, float]:
        counts: dict[Site, list[float]] = {}
        for sequence in self._sequences(phase):  # not all have the same sites where an assistant is routed, too
            for site, passes in sequence.items():
                counts.setdefault(site, []).append(min(passes, most))
        return {site: sum(values) / len(values) for site, values in counts.items()}

    def keep_ratio(self, phase: Phase = None) -> KeepRatio | None:
        """Of the routed sites and of all sublayers of the target; None where nothing was recorded."""
        keep = self.site_keep(phase)
        return self._ratio(keep) if keep else None

    @property
    def sequence_keeps(self) -> list[KeepRatio]:
        """One entry a prefilled sequence, as `keep_ratio` is of all."""
        return [self._ratio({site: min(times, 1.0) for site, times in one.items()}) for one in self.sequences]

    def _ratio(self, keep: dict[Site, float]) -> KeepRatio:
        executed, always = sum(keep.values()), self._n_sublayers(keep) - len(keep)
        return KeepRatio(executed / len(keep), (executed + always) / self._n_sublayers(keep))

    def depth(self, phase: Phase = None) -> float | None:
        """Mean executions of all sublayers of the target in a sequence: layers, repeats counted twice; None where
        nothing was recorded."""
        passes = self.site_passes(phase)
        return sum(passes.values()) + self._n_sublayers(passes) - len(passes) if passes else None

    def _n_sublayers(self, sites: Iterable[Site]) -> int:
        return len({site.target for site in sites}) * self._n_layers


_recorders: ContextVar[tuple[Recorder, ...]] = ContextVar("dynadepth_recorders", default=())


@contextmanager
def recording(recorder: Recorder | None = None, *, by_token: bool = False) -> Iterator[Recorder]:
    """Records every routed forward of this thread inside the block: anew, or going on with `recorder`. May be nested.
    A new one keeps, with `by_token`, the share of the sites that each token executed (`Recorder.token_shares`)."""
    recorder = Recorder(by_token) if recorder is None else recorder
    token = _recorders.set((*_recorders.get(), recorder))
    try:
        yield recorder
    finally:
        _recorders.reset(token)


def publish(trace: RoutingTrace, generation: Any) -> None:
    """Hands one forward to the recorders of this thread."""
    for recorder in _recorders.get():
        recorder.add(trace, generation)
