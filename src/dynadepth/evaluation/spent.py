"""What a model executed of the sequences that it read, in a form that several measurements can be joined in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dynadepth.architectures import decoder_layers
from dynadepth.cost import flops_share, kv_share
from dynadepth.routed import is_attached, unwrapped
from dynadepth.routing.decision import Site
from dynadepth.routing.recorder import Recorder, recording

FIGURES = ("keep_ratio", "depth", "flops_share", "flops_share_target", "kv_share")


@dataclass(frozen=True)
class Spent:
    """Of the prefills alone; nothing of a model without routers."""

    sequences: int
    """How many were routed."""

    keep: dict[str, float]
    """Site -> mean share executed."""

    passes: dict[str, float]
    """Site -> mean executions: repeats count twice."""

    inputs: int
    """Sequences read, by the dense model, too, where it was asked."""

    tokens: int
    """Of the inputs."""

    @classmethod
    def of(cls, record: Recorder, inputs: int, tokens: int) -> Spent:
        keep, passes = ({str(s): v for s, v in f("prefill").items()} for f in (record.site_keep, record.site_passes))
        return cls(len(record.sequences), keep, passes, inputs, tokens)

    @classmethod
    def joined(cls, parts: Sequence[Mapping[str, Any]]) -> Spent:
        """Of parts as `asdict` gives them, by one model: as if they had been one measurement."""
        n = sum(part["sequences"] for part in parts)

        def mean(name: str) -> dict[str, float]:
            sites = dict.fromkeys(site for part in parts for site in part[name])
            return {site: sum(part[name].get(site, 0.0) * part["sequences"] for part in parts) / n for site in sites}

        inputs, tokens = (sum(part[name] for part in parts) for name in ("inputs", "tokens"))
        return cls(n, mean("keep"), mean("passes"), inputs, tokens)

    def figures(self, model: Any) -> dict[str, Any]:
        """`keep_ratio` (of the `routed` sites, of `all` sublayers of the target), `depth` (mean executions of the
        target's sublayers), and shares of the dense model's costs for sequences of the mean length; None of each where
        nothing was routed."""
        if not self.sequences or not is_attached(model):
            return dict.fromkeys(FIGURES)
        passes = {Site.parse(site): share for site, share in self.passes.items()}
        sublayers = len({site.target for site in passes}) * len(decoder_layers(unwrapped(model)))
        always = sublayers - len(passes)
        length = max(1, round(self.tokens / max(1, self.inputs)))
        share = flops_share(model, passes, length)
        executed = sum(self.keep.values())
        return {
            "keep_ratio": {"routed": executed / len(self.keep), "all": (executed + always) / sublayers},
            "depth": sum(passes.values()) + always,
            "flops_share": share.model,
            "flops_share_target": share.target,
            "kv_share": kv_share(model, passes, length),
        }


@contextmanager
def spending(model: Any) -> Iterator[Callable[[], Spent]]:
    """Watches what `model` reads and executes in the block; the function tells of it."""
    counts = [0, 0]

    def count(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if ids is not None and mask is not None and ids.shape == mask.shape:  # a prefill
            counts[0] += len(ids)
            counts[1] += int(mask.sum())

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        with recording() as record:
            yield lambda: Spent.of(record, *counts)
    finally:
        handle.remove()
