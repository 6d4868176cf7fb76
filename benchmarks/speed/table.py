"""Prints the Markdown tables of a `dynadepth bench` file: `python benchmarks/speed/table.py FILE.json`.

A table a phase, a row a batch size and context, a column a variant: times as fast as dense, by the model of the ideal
(FLOPs of a prefill, bytes read by a decode step), and the skip efficiency in brackets (of the nominal saving where rows
or tokens differ; for what executes everything, the price of routing). Then memory, the goals, and how cost grows.
"""

import json
import sys
from pathlib import Path

from dynadepth.benchmark.growth import slopes

GOALS = {"prefill": 0.90, "decode": 0.95}
"""Skip efficiency of one route for all rows, from a context of 512 on."""
MIXED = 0.90
"""Share of the nominal saving in batches of 8 rows with routes of their own."""
OVERHEAD = 0.02
"""Price of routing where everything executes."""
NOISY = 0.2
"""Spread of the noisiest model that a figure is made of, dense and pruned among them, from which on it is printed."""


def speed(cells: list[dict], phase: str) -> list[str]:
    """The table of one phase."""
    chosen = [cell for cell in cells if cell["phase"] == phase]
    names = list(dict.fromkeys(cell["variant"] for cell in chosen))
    lines = [
        f"| {phase}: batch × context | dense, tokens/s | " + " | ".join(names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for point in dict.fromkeys((cell["batch"], cell["context"]) for cell in chosen):
        row = {cell["variant"]: cell for cell in chosen if (cell["batch"], cell["context"]) == point}
        dense = next(iter(row.values()))
        shown = [said(row[name]) if name in row else "–" for name in names]
        rate = f"{dense['tokens_per_s']['dense']:,.0f} (spread {dense['spreads']['dense'] or 0:.0%})"
        lines.append(f"| {point[0]} × {point[1]:,} | {rate} | " + " | ".join(shown) + " |")
    return lines


def said(cell: dict) -> str:
    """Of a model that skips the speed-up, the ideal one and the efficiency (none where the pruned twin was no faster);
    of one that executes everything the overhead."""
    if cell["routed_s"] is None:
        return "–"
    efficiency, ideal = cell["nominal_efficiency"], cell["ideal_saving"]
    spread = f", spread {cell['spread']:.0%}" if (cell["spread"] or 0.0) >= NOISY else ""
    if cell["keep_ratio"] == 1.0:
        return f"{cell['overhead']:+.1%}{spread}"
    found = f"{cell['speedup']:.2f}× of {1 / (1 - ideal):.2f}×"
    return found + (spread if efficiency is None else f" ({efficiency:.2f}{spread})")


def memory(cells: list[dict]) -> list[str]:
    """Peak memory of prefill and decode beyond the weights, and bytes of keys and values after the last token."""
    chosen = [cell for cell in cells if cell["phase"] == "decode"]
    names = list(dict.fromkeys(cell["variant"] for cell in chosen))
    lines = [
        "| batch × context | dense: peak, KV (MiB) | " + " | ".join(f"{name}: of dense's" for name in names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for point in dict.fromkeys((cell["batch"], cell["context"]) for cell in chosen):
        row = {cell["variant"]: cell for cell in chosen if (cell["batch"], cell["context"]) == point}
        dense = next(iter(row.values()))
        peak, kept = dense["peak_bytes"]["dense"], dense["kv_bytes_dense"]
        shown = []
        for name in names:
            cell = row.get(name)
            if cell is None or cell["kv_bytes_routed"] is None:
                shown.append("–")
                continue
            share = f"{cell['peak_bytes'][name] / peak:.0%}" if peak else "–"
            held = cell["kv_bytes_routed"] + (cell.get("state_bytes_routed") or 0)
            shown.append(f"{share}, {held / kept:.0%}")
        size = f"{peak / 2**20:,.0f}" if peak else "–"
        lines.append(f"| {point[0]} × {point[1]:,} | {size}, {kept / 2**20:,.0f} | " + " | ".join(shown) + " |")
    return lines


def goals(cells: list[dict]) -> list[str]:
    """A sentence a goal that these cells can tell of: the worst cell, and how many reach it."""
    lines = []
    for phase, goal in GOALS.items():
        found = [c for c in cells if c["phase"] == phase and c["context"] >= 512 and c["skip_efficiency"] is not None]
        for kind in ("sequence", "route"):
            own = [c for c in found if c["granularity"] == kind and not c["variant"].startswith("static")]
            lines += worst(f"skip efficiency at {phase}, by {kind}", own, "skip_efficiency", goal, above=True)
    for kind in ("mixed", "mixed-route"):
        mixed = [c for c in cells if c["variant"].startswith(f"{kind}@") and c["batch"] >= 8]
        mixed = [c for c in mixed if c["nominal_efficiency"] is not None]
        lines += worst(f"{kind} batches, of the nominal saving", mixed, "nominal_efficiency", MIXED, above=True)
    for kind in ("sequence", "route", "token"):
        whole = [c for c in cells if c["granularity"] == kind and c["keep_ratio"] == 1.0 and c["overhead"] is not None]
        what = f"price of routing where everything executes, by {kind}"
        lines += worst(what, whole, "overhead", OVERHEAD, above=False)
    return lines


def worst(what: str, cells: list[dict], key: str, goal: float, above: bool) -> list[str]:
    if not cells:
        return []
    met = [c for c in cells if (c[key] >= goal if above else c[key] <= goal)]
    last = (min if above else max)(cells, key=lambda c: c[key])
    at = f"{last['variant']}, {last['phase']}, batch {last['batch']}, context {last['context']:,}"
    value, limit = (f"{last[key]:.2f}", f"≥ {goal:.2f}") if above else (f"{last[key]:+.1%}", f"≤ {goal:.0%}")
    return [f"- {what} (goal {limit}): met in {len(met)} of {len(cells)} cells; worst {value} ({at})"]


def growth(cells: list[dict]) -> list[str]:
    """Exponents of cost along each axis with three points or more; nothing where there is none."""
    found = [one for one in slopes(cells) if one.phase != "generate"]
    if not found:
        return []
    lines = [
        "| | along | time, dense | time | peak memory, dense | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for one in found:
        other = f"context {one.fixed:,}" if one.axis == "batch" else f"batch {one.fixed}"
        figures = (one.dense_time, one.time, one.dense_memory, one.memory)
        shown = " | ".join("–" if x is None else f"{x:.2f}" for x in figures)
        lines.append(f"| {one.variant}, {one.phase} | {one.axis} {one.low:,} to {one.high:,}, {other} | {shown} |")
    return lines


def main(file: str) -> None:
    cells = json.loads(Path(file).read_text())["cells"]
    parts = [speed(cells, "prefill"), speed(cells, "decode"), memory(cells), goals(cells), growth(cells)]
    print("\n\n".join("\n".join(part) for part in parts if part))


if __name__ == "__main__":
    main(*sys.argv[1:])
