"""Benchmarks: latency, memory and KV bytes of dense, routed and pruned models, interleaved in one run; speed-ups as
budgets."""

from dynadepth.benchmark.latency import grid, run
from dynadepth.benchmark.prompts import cut_prompts
from dynadepth.benchmark.pruned import bare_twin, pruned_twin
from dynadepth.benchmark.speedup import set_speedup

__all__ = ["bare_twin", "cut_prompts", "grid", "pruned_twin", "run", "set_speedup"]
