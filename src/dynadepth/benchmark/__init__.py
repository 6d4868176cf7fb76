"""Benchmarks: latency, memory and KV bytes of dense, routed and pruned models, interleaved in one run."""

from dynadepth.benchmark.latency import run
from dynadepth.benchmark.prompts import cut_prompts
from dynadepth.benchmark.pruned import bare_twin, pruned_twin

__all__ = ["bare_twin", "cut_prompts", "pruned_twin", "run"]
