"""The frontier in rows, for `frontier.json`, the terminal and the page alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dynadepth.report.cells import DENSE, Cell, Findings, budget_label
from dynadepth.routing.calibration import TOLERANCE

ROUGH = 0.25
"""Spread of timing samples (interquartile range over median) from which on a ratio means little."""

COST = ("FLOPs", "of target", "KV", "prefill", "decode", "routes")
"""Columns of the table that are not about quality."""


def summary_of(cell: Cell) -> dict[str, Any]:
    """One flat line a cell: what the table shows, as numbers. What was not measured is None.

    `perplexity` is that of the first text, `ratio` its ratio to dense with `low` and `high` (95 %), `tasks` the mean of
    the usual metrics of all tasks, `difference` that from dense; `flops_share` is that of the whole model,
    `flops_share_target` of the target's sublayers with routers and skip paths; `prefill` and `decode` are times as fast
    as dense. Costs are those of the texts, and of the tasks where single inputs were given routes: only those have any.
    """
    text, tasks = cell["text"], cell.get("tasks") or {}
    against = cell.get("against_dense") or {}
    first = next(iter(text["perplexity"]))
    given = cell.get("given")
    cost = tasks if given else text
    keep = cost.get("keep_ratio") or {}
    return {
        "method": cell["row"],
        "budget": cell["budget"],
        "keep_all": keep.get("all"),
        "keep_routed": keep.get("routed"),
        "keep_tasks": (tasks.get("keep_ratio") or {}).get("all"),
        "flops_share": cost.get("flops_share"),
        "flops_share_target": cost.get("flops_share_target"),
        "kv_share": cost.get("kv_share"),
        "text": first,
        "perplexity": text["perplexity"][first].get("ppl"),
        "ratio": (against.get("perplexity") or {}).get(first),
        "kl": text.get("kl"),
        "agreement": text.get("agreement"),
        "tasks": tasks.get("average"),
        "difference": against.get("average"),
        "prefill": speedup(cell, "prefill"),
        "decode": speedup(cell, "decode"),
        "routes": None if given else cell.get("routes"),
    }


def speedup(cell: Cell, phase: str) -> dict[str, float] | None:
    """`value` and `spread` of a phase's speed-up over dense; None where it was not timed. Dense is 1."""
    if cell["row"] == DENSE:
        return {"value": 1.0, "spread": 0.0}
    for timed in cell.get("speed") or []:
        if timed.get("phase") == phase and timed.get("speedup"):
            return {"value": timed["speedup"], "spread": timed.get("spread") or 0.0}
    return None


@dataclass(frozen=True)
class Line:
    """One line of a table: texts, and the method's name for its colour."""

    method: str
    values: tuple[str, ...]


def table(found: Findings) -> tuple[tuple[str, ...], list[Line]]:
    """Columns and lines of the frontier; columns that nobody has a figure for are left out."""
    columns = {
        "method": lambda s: s["method"],
        "budget": lambda s: "-" if s["method"] == DENSE else budget_label(s["budget"]),
        "executed": lambda s: percent(s["keep_all"]),
        "FLOPs": lambda s: percent(s["flops_share"]),
        "of target": lambda s: percent(s["flops_share_target"]),
        "KV": lambda s: percent(s["kv_share"]),
        "perplexity": lambda s: number(s["perplexity"]),
        "× dense, 95 %": lambda s: _interval(s, "ratio", 1, "{:.2f}"),
        "KL": lambda s: number(s["kl"], 3),
        _mean_of(found): lambda s: percent(s["tasks"]),
        "Δ points, 95 %": lambda s: _interval(s, "difference", 100, "{:+.1f}"),
        "prefill": lambda s: _times(s["prefill"]),
        "decode": lambda s: _times(s["decode"]),
        "routes": lambda s: _routes(s["routes"]),
    }
    summaries = [summary_of(cell) for row in found.methods for cell in found.cells[row["name"]].values()]
    texts = {name: [show(summary) for summary in summaries] for name, show in columns.items()}
    others = [s["method"] != DENSE for s in summaries]
    shown = [
        name
        for name, values in texts.items()
        if name == "method" or any(text != "-" and other for text, other in zip(values, others, strict=True))
    ] or list(columns)
    lines = [Line(s["method"], tuple(texts[name][i] for name in shown)) for i, s in enumerate(summaries)]
    return tuple(shown), lines


def halves(found: Findings) -> list[tuple[tuple[str, ...], list[Line]]]:
    """`table` as two that fit a screen: quality, then cost."""
    columns, lines = table(found)
    made = []
    for cost in (False, True):
        shown = [i for i, name in enumerate(columns) if name in ("method", "budget") or (name in COST) == cost]
        cut = [Line(line.method, tuple(line.values[i] for i in shown)) for line in lines]
        made.append((tuple(columns[i] for i in shown), cut))
    return made


def markdown(found: Findings) -> str:
    """`table` in Markdown."""
    columns, lines = table(found)
    rows = [columns, ("---",) * len(columns), *(line.values for line in lines)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _mean_of(found: Findings) -> str:
    """Heading of the mean of all tasks, which is not that of single rows of a paper's table: says of how many."""
    names = dict.fromkeys(
        name
        for cells in found.cells.values()
        for cell in cells.values()
        for name in (cell.get("tasks") or {}).get("tasks") or {}
    )
    return f"mean of {len(names)} tasks" if len(names) > 1 else next(iter(names), "tasks")


def task_table(found: Findings) -> tuple[tuple[str, ...], list[Line]]:
    """Every task's usual metric ± standard error, its row count in the heading, and further texts' perplexities."""
    tasks: dict[str, int] = {}
    files: dict[str, None] = {}
    for cells in found.cells.values():
        for cell in cells.values():
            files |= dict.fromkeys(cell["text"]["perplexity"])
            for name, figures in ((cell.get("tasks") or {}).get("tasks") or {}).items():
                tasks[name] = figures.get("n", 0)
    more = list(files) if len(files) > 1 else []
    lines = []
    for row in found.methods:
        for budget, cell in found.cells[row["name"]].items():
            scored = (cell.get("tasks") or {}).get("tasks") or {}
            values = [row["name"], "-" if row["name"] == DENSE else budget_label(budget)]
            values += [_task(scored.get(name)) for name in tasks]
            values += [number((cell["text"]["perplexity"].get(file) or {}).get("ppl")) for file in more]
            lines.append(Line(row["name"], tuple(values)))
    heads = ("method", "budget", *(f"{name} ({n:,})" for name, n in tasks.items()), *more)
    return heads, lines if tasks or more else []


def budgets_met(found: Findings) -> tuple[tuple[str, ...], list[Line], list[str]]:
    """What was asked for and what was executed, on the texts, the tasks and each kind of prompt; and, in words, the
    cells that are off by more than 0.02 on the texts or the tasks."""
    kinds = list(dict.fromkeys(k for cells in found.cells.values() for c in cells.values() for k in c["kinds"]))
    lines, missed = [], []
    for row in found.methods:
        if row["name"] == DENSE:
            continue
        for budget, cell in found.cells[row["name"]].items():
            summary = summary_of(cell)
            keeps = [summary["keep_all"], summary["keep_tasks"]]
            keeps += [_keep(cell["kinds"].get(kind)) for kind in kinds]
            lines.append(Line(row["name"], (row["name"], budget_label(budget), *(percent(keep) for keep in keeps))))
            for measured, where in zip(keeps, ("texts", "tasks"), strict=False):
                if budget is not None and measured is not None and abs(measured - budget) > TOLERANCE + 1e-9:
                    missed.append(f"{row['name']} at {budget:g} executed {percent(measured)} on the {where}.")
    return ("method", "asked", "texts", "tasks", *kinds), lines, missed


def per_kind(cells: Iterable[Cell]) -> int:
    """Most prompts of one kind."""
    return max((kind.get("sequences", 0) for cell in cells for kind in cell["kinds"].values()), default=0)


def compared(found: Findings) -> list[str]:
    """What a row's cells are beside those of the row that they are compared with, on the same windows, in words."""
    said = []
    for row in found.methods:
        for budget, cell in found.cells[row["name"]].items():
            beside = cell.get("against") or {}
            if cell.get("given"):
                said.append(f"{row['name']}: {_given(cell, found.dense)}")
            for text, ratio in (beside.get("perplexity") or {}).items():
                on = f" on {text}" if len(beside["perplexity"]) > 1 else ""
                sentence = (
                    f"{row['name']} at {budget_label(budget)}: perplexity{on} {ratio['value']:.3f} × that of "
                    f"{beside['row']}{_between(ratio, '95 % {:.3f} to {:.3f}')}"
                )
                if kl := (beside.get("kl") or {}).get(text):
                    sentence += f", KL {kl['value']:+.4f}{_between(kl, '{:+.4f} to {:+.4f}')}"
                if inputs := (cell.get("shuffled") or {}).get("texts"):
                    sentence += f"; {inputs['changed']} of {inputs['inputs']} windows had another route"
                said.append(f"{sentence}.")
    return said


def _between(value: Mapping[str, Any], form: str) -> str:
    """An interval in brackets; nothing of a single window, which has none."""
    return "" if value["low"] is None or value["high"] is None else f" ({form.format(value['low'], value['high'])})"


def _given(cell: Cell, dense: Cell | None) -> str:
    """What the routes of single inputs come to: by `acc`, which the search judged by, and beside its control."""
    given = cell["given"]
    said = [f"{given['prompts']} of {given['of']} searched prompts were scored"]
    scores = [_mean_acc(one) for one in (cell, dense) if one is not None]
    if all(score is not None for score in scores):
        by_acc = f"by acc, the search's own measure, {percent(scores[0])}"
        said.append(by_acc + (f" (dense {percent(scores[1])})" if len(scores) > 1 else ""))
    if given.get("corrected") is not None:
        luck = given.get("control_corrected")
        control = (
            "there was no control" if luck is None else f"the same search towards a wrong one reached {percent(luck)}"
        )
        said.append(f"of what dense answers wrongly the search corrected {percent(given['corrected'])}; {control}")
    return "; ".join(said) + "."


def _mean_acc(cell: Cell) -> float | None:
    """Of the tasks that have it."""
    tasks = ((cell.get("tasks") or {}).get("tasks") or {}).values()
    values = [figures["acc"] for figures in tasks if figures.get("acc") is not None]
    return sum(values) / len(values) if values else None


def rough_timing(found: Findings) -> str | None:
    """A sentence where the machine was busy while timing."""
    spreads = [
        timed.get("spread") or 0.0
        for cells in found.cells.values()
        for cell in cells.values()
        for timed in cell.get("speed") or []
    ]
    if max(spreads, default=0.0) <= ROUGH:
        return None
    return f"The machine was busy while timing (samples spread by up to {max(spreads):.0%}): these speeds are rough."


def percent(share: float | None) -> str:
    """`0.75` as `75.0 %`."""
    return "-" if share is None else f"{100 * share:.1f} %"


def number(value: float | None, digits: int = 2) -> str:
    """With thousands set apart; `-` where there is none."""
    return "-" if value is None else f"{value:,.{digits}f}"


def _interval(summary: Mapping[str, Any], key: str, scale: float, form: str) -> str:
    value = summary[key]
    if value is None or summary["method"] == DENSE:
        return "-"
    if value["low"] is None or value["high"] is None:
        return form.format(scale * value["value"])
    shown = [form.format(scale * value[part]) for part in ("value", "low", "high")]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


def _times(value: Mapping[str, float] | None) -> str:
    return "-" if value is None else f"{value['value']:.2f}×"


def _routes(value: Mapping[str, Any] | None) -> str:
    """`12 of 64, 2.1 bits, 96 % alike`: what is known of a cell's `report.routes.variety`."""
    if not value or not value.get("sequences"):
        return "-"
    if value.get("distinct") == 1:
        return f"one for all {value['sequences']}"
    said = []
    if value.get("distinct") is not None:
        said.append(f"{value['distinct']} of {value['sequences']}")
    if value.get("entropy") is not None:
        said.append(f"{value['entropy']:.1f} bits")
    if value.get("agreement") is not None:
        said.append(f"{100 * value['agreement']:.0f} % alike")
    return ", ".join(said) or "-"


def _task(figures: Mapping[str, Any] | None) -> str:
    if not figures or figures.get("metric") is None:
        return "-"
    value = figures.get(figures["metric"], figures.get("perplexity"))
    if figures.get("stderr") is None:
        return number(value)
    return f"{100 * value:.1f} ± {100 * figures['stderr']:.1f} %"


def _keep(kind: Mapping[str, Any] | None) -> float | None:
    return ((kind or {}).get("keep_ratio") or {}).get("all")
