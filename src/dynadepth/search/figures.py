"""What a file of routes amounts to: the oracle's accuracy, its control, layers saved, and what the search spent.

*Oracle*: a prompt counts as right if the dense model is right or a kept route is. It is an upper bound that no router
reaches, and much of it is luck: among fifty routes some hit a wrong answer too. The *control* says how much: of the
prompts searched towards an answer that is neither right nor the dense model's, the share where it was reached, by the
same margin and under the same limits.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from dynadepth.route_file import PromptRoutes, RouteFile
from dynadepth.statistics import standard_error

MARGINS = (0.5, 1.0, 2.0)
"""Larger leads at which the finds are set beside the control's, nats."""


def summarise(file: RouteFile) -> dict[str, Any]:
    """`all` and, by data file, `sources`: see `figures_of`; JSON-ready."""
    margin = float(file.header.search["margin"])
    by_source: dict[str, list[PromptRoutes]] = {}
    for prompt in file.prompts:
        by_source.setdefault(prompt.source, []).append(prompt)
    return {
        "sources": {name: figures_of(prompts, file.header.n_layers, margin) for name, prompts in by_source.items()},
        "all": figures_of(file.prompts, file.header.n_layers, margin),
    }


def figures_of(prompts: Sequence[PromptRoutes], n_layers: int, margin: float) -> dict[str, Any]:
    """Shares are fractions, None where there is nothing to share.

    `dense`, `oracle`: accuracies; `corrected`: of the prompts that dense answers wrongly, those with a kept route;
    `control`, `control_corrected`: of all prompts with a control, and of those among them that dense answers wrongly,
    the ones whose wrong answer was reached (compare `control_corrected` with `corrected`); `shorter`: of the prompts
    that dense answers rightly, those with a kept route of fewer layers; `layers`: mean of the best route's, of the
    model's (dense where none was kept); `actions`: layers skipped, executed and repeated by the best routes;
    `by_margin`: `corrected` and `control_corrected` where the lead must be larger, which leaves less to luck;
    `routes`, `control_routes`: kept; `executions`: layers run, controls included; `naive_executions`: of all routes
    tried, each run whole and once; `times_fewer`: their ratio; `times_fewer_apart`: the same where a route that the
    search and its control both tried counts as two.
    """
    right = [prompt for prompt in prompts if prompt.dense.correct]
    wrong = [prompt for prompt in prompts if not prompt.dense.correct]
    controlled = [prompt for prompt in prompts if prompt.control is not None]
    oracle = [float(prompt.dense.correct or bool(prompt.routes)) for prompt in prompts]
    best = [prompt.routes[0] for prompt in prompts if prompt.routes]
    counts = Counter(min(count, 2) for route in best for count in route.counts)
    executions, naive = sum(p.executions for p in prompts), sum(p.naive_executions for p in prompts)
    layers = sum(route.layers for route in best) + n_layers * (len(prompts) - len(best))

    def corrected(least: float) -> float | None:
        leads = [max((route.margin for route in prompt.routes), default=-math.inf) for prompt in wrong]
        return _share(sum(lead >= least for lead in leads), len(wrong))

    def control(among: Sequence[PromptRoutes], least: float) -> float | None:
        leads = [prompt.control for prompt in among if prompt.control is not None]
        return _share(sum(lead > 0 and lead >= least for lead in leads), len(leads))

    return {
        "prompts": len(prompts),
        "dense": _share(len(right), len(prompts)),
        "oracle": _share(sum(oracle), len(prompts)),
        "oracle_stderr": standard_error(oracle),
        "dense_wrong": len(wrong),
        "corrected": corrected(margin),
        "controls": len(controlled),
        "control": control(prompts, margin),
        "controls_dense_wrong": sum(not prompt.dense.correct for prompt in controlled),
        "control_corrected": control(wrong, margin),
        "by_margin": [
            {"margin": least, "corrected": corrected(least), "control_corrected": control(wrong, least)}
            for least in MARGINS
            if least > margin
        ],
        "shorter": _share(sum(any(route.layers < n_layers for route in prompt.routes) for prompt in right), len(right)),
        "layers": _share(layers, n_layers * len(prompts)),
        "actions": {"skip": counts[0], "execute": counts[1], "repeat": counts[2]},
        "routes": sum(len(prompt.routes) for prompt in prompts),
        "control_routes": sum(len(prompt.control_routes) for prompt in prompts),
        "executions": executions,
        "naive_executions": naive,
        "times_fewer": _share(naive, executions),
        "times_fewer_apart": _share(sum(p.apart_executions for p in prompts), executions),
    }


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None
