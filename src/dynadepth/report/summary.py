"""The demo's results in words and rows, for the terminal and the page alike. Parts that are missing are left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dynadepth.routing.calibration import TOLERANCE

VARIANTS = ("dense", "routed", "static")
ROUGH = 0.25
"""Spread of timing samples (interquartile range over median) from which on a ratio means little."""
TITLES = {"dense": "dense", "routed": "routed", "static": "static twin"}


@dataclass(frozen=True)
class Row:
    """One line of the table: a label, and a text a variant."""

    label: str
    values: tuple[str, str, str]
    better: str | None = None
    """`routed` or `static`, where one of the two is better."""


def rows(results: Mapping[str, Any]) -> list[Row]:
    """The table of dense, routed and static twin."""
    variants = results.get("variants") or {}
    target = results.get("target") or "attention"
    n = (variants.get("routed") or {}).get("questions")
    made = [
        _row(variants, f"{target} sublayers executed (text)", "keep_all", _percent),
        _row(variants, "perplexity", "perplexity", lambda v: f"{v:,.2f}", lower=True),
        _row(variants, "KL from dense, nats a token", "kl", lambda v: f"{v:.3f}", lower=True),
        _row(variants, "same next token as dense", "agreement", _percent, lower=False),
        _row(variants, f"accuracy, {n} questions" if n else "accuracy", "accuracy", _percent, lower=False),
        _row(variants, f"{target} sublayers executed (questions)", "keep_questions", _percent),
        _row(variants, "FLOPs of the dense model's", "flops_share", _percent),
        _row(variants, "KV bytes of the dense model's", "kv_share", _percent),
    ]
    return [row for row in made if row is not None] + _speed_rows(results)


def _row(variants: Mapping[str, Any], label: str, key: str, show: Any, lower: bool | None = None) -> Row | None:
    values = [(variants.get(name) or {}).get(key) for name in VARIANTS]
    if all(value is None for value in values):
        return None
    texts = tuple("-" if value is None else show(value) for value in values)
    assert len(texts) == 3
    better, (_, routed, static) = None, values
    if lower is not None and routed is not None and static is not None and texts[1] != texts[2]:
        better = "routed" if (routed < static) == lower else "static"
    return Row(label, texts, better)


def _speed_rows(results: Mapping[str, Any]) -> list[Row]:
    made = []
    by_place: dict[tuple[str, int], dict[str, Mapping[str, Any]]] = {}
    for name, cells in (results.get("speed") or {}).items():
        for cell in cells:
            by_place.setdefault((cell["phase"], cell["context"]), {})[name] = cell
    for (phase, context), cells in sorted(by_place.items(), key=lambda item: (item[0][0] != "prefill", item[0][1])):
        first = next(iter(cells.values()))
        unit = "a token" if phase == "decode" else f"of {context:,} tokens"
        where = f"{phase} {unit}" + (f" at {context:,}" if phase == "decode" else "")
        texts = [f"{1000 * first['dense_s']:,.0f} ms" if first.get("dense_s") is not None else "-"]
        texts += [_speedup(cells.get(name)) for name in ("routed", "static")]
        made.append(Row(where, (texts[0], texts[1], texts[2])))
        if phase == "decode" and first.get("kv_bytes_dense"):
            held = [_bytes(first["kv_bytes_dense"])]
            held += [_bytes(_held(cells.get(name) or {})) for name in ("routed", "static")]
            made.append(Row(f"KV cache at {context:,}", (held[0], held[1], held[2])))
    return made


def _held(cell: Mapping[str, Any]) -> int | None:
    """Keys and values, and what skip paths remember."""
    held: int | None = cell.get("kv_bytes_routed")
    return None if held is None else held + (cell.get("state_bytes_routed") or 0)


def verdict(results: Mapping[str, Any]) -> list[str]:
    """What the numbers say, in plain sentences, whoever wins."""
    variants, said = results.get("variants") or {}, []
    dense, routed, static = (variants.get(name) or {} for name in VARIANTS)
    if None not in (dense.get("perplexity"), routed.get("perplexity"), static.get("perplexity")):
        said.append(
            f"With {_percent(routed['keep_all'])} of the {results.get('target') or 'attention'} sublayers executed, "
            f"perplexity goes from {dense['perplexity']:.2f} to {routed['perplexity']:.2f}; the static twin, one fixed "
            f"route with the same keep ratio, has {static['perplexity']:.2f}: on this text {_winner(routed, static)}."
        )
    asked = (results.get("settings") or {}).get("budget")
    measured = {"text": routed.get("keep_all"), "questions": routed.get("keep_questions")}
    missed = [
        f"{_percent(keep)} on the {what}" for what, keep in measured.items() if keep and asked and _far(keep, asked)
    ]
    if asked is not None and missed:
        said.append(f"The budget asked for {_percent(asked)}; what was executed is {' and '.join(missed)}.")
    interval = routed.get("accuracy_difference")
    if interval is not None and dense.get("accuracy") is not None:
        low, high = interval[-2:]
        noise = "within the noise" if low <= 0 <= high else "beyond the noise"
        said.append(
            f"Accuracy changes by {100 * (routed['accuracy'] - dense['accuracy']):+.1f} points against dense, which is "
            f"{noise} (95 % interval {100 * low:+.1f} to {100 * high:+.1f})."
        )
    speedups = {place: cell["speedup"] for place, cell in _routed_cells(results) if cell.get("speedup")}
    if speedups:
        parts = [f"{phase} at {context:,} tokens {speedup:.2f}×" for (phase, context), speedup in speedups.items()]
        said.append(f"Speed against dense in the same run: {', '.join(parts)}.")
    spread = max(
        (cell.get("spread") or 0 for cells in (results.get("speed") or {}).values() for cell in cells), default=0
    )
    if spread > ROUGH:
        said.append(
            f"The machine was busy while timing (samples spread by up to {spread:.0%}): these speeds are rough."
        )
    distinct = _distinct_routes(results)
    if distinct is not None:
        count, total = distinct
        same = "every prompt took the same route" if count == 1 else f"{count} different routes for {total} prompts"
        said.append(f"Sample prompts: {same}.")
    tuning = results.get("tuning") or {}
    if tuning.get("seconds") is not None:
        again = ", in an earlier run whose routers are used again" if tuning.get("reused") else ""
        data = tuning.get("data_seconds") if not again else None
        writing = "" if data is None else f" (and writing them took the model {data:.0f} s)"
        said.append(
            f"Tuning {tuning.get('n_trainable', 0):,} parameters of routers and skip paths took "
            f"{tuning['seconds']:.0f} s on {tuning.get('n_train', '?')} samples{writing}{again}."
        )
    return said


def _far(keep: float, asked: float) -> bool:
    return abs(keep - asked) > TOLERANCE + 1e-9


def _winner(routed: Mapping[str, Any], static: Mapping[str, Any]) -> str:
    ratio = routed["perplexity"] / static["perplexity"]
    if abs(ratio - 1) < 0.005:
        return "the two are equal within half a percent"
    return "routing per input is better" if ratio < 1 else "the static twin is better"


def _routed_cells(results: Mapping[str, Any]) -> list[tuple[tuple[str, int], Mapping[str, Any]]]:
    cells = (results.get("speed") or {}).get("routed") or []
    return [((cell["phase"], cell["context"]), cell) for cell in cells]


def _distinct_routes(results: Mapping[str, Any]) -> tuple[int, int] | None:
    routes = [sample["answers"].get("routed", {}).get("route") for sample in results.get("samples") or []]
    known = [tuple(sorted(route.items())) for route in routes if route]
    return (len(set(known)), len(known)) if known else None


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _speedup(cell: Mapping[str, Any] | None) -> str:
    """The ratio alone: each variant was timed against dense in a run of its own, so only ratios can be compared."""
    if cell is None or cell.get("speedup") is None:
        return "-"
    return f"{cell['speedup']:.2f}×"


def _bytes(count: float | None) -> str:
    return "-" if count is None else f"{count / 1e6:,.1f} MB"
