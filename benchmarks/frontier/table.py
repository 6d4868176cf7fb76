"""Prints the Markdown table of a committed frontier: `python benchmarks/frontier/table.py benchmarks/frontier/MODEL`.

Perplexity as a multiple of the dense model's, and the difference of the mean of the eight tasks (LAMBADA apart), each
with a 95 % bootstrap interval paired by window or row; rows of a task are drawn within it.
"""

import json
import sys
from pathlib import Path

import torch

TASKS = ("arc_challenge", "boolq", "hellaswag", "mmlu", "openbookqa", "piqa", "rte", "winogrande")
DRAWS = 2000


def cells(folder: Path) -> dict[str, dict]:
    found = [json.loads(path.read_text()) for path in sorted((folder / "cells").glob("*.json"))]
    return {f"{cell['row']}@{cell['budget']}": cell for cell in found}


def average(cell: dict, dense: dict) -> tuple[float, float, float]:
    """Difference of the tasks' mean score, and its interval."""
    generator = torch.Generator().manual_seed(0)
    total, drawn = 0.0, torch.zeros(DRAWS, dtype=torch.float64)
    for task in TASKS:
        own, other = (torch.tensor(c["rows"]["tasks"][task], dtype=torch.float64) for c in (cell, dense))
        difference = own - other
        total += float(difference.mean()) / len(TASKS)
        picks = torch.randint(len(difference), (DRAWS, len(difference)), generator=generator)
        drawn += difference[picks].mean(1) / len(TASKS)
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return total, low, high


def lines(folder: Path) -> list[str]:
    found = cells(folder)
    dense = next(cell for cell in found.values() if cell["row"] == "dense")
    text = next(iter(dense["text"]["perplexity"]))
    out = [
        "| method | budget | executed | perplexity | × dense (95 %) | KL, nats | 8 tasks, points | LAMBADA | prefill "
        "| decode |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    order = {"dense": 0, "default": 1, "default-static": 2, "default-shuffled": 3}
    for cell in sorted(found.values(), key=lambda c: (-(c["budget"] or 0), order.get(c["row"], 9), c["row"])):
        ratio = cell["against_dense"]["perplexity"][text]
        mean, low, high = average(cell, dense)
        lambada = cell["tasks"]["tasks"]["lambada_openai"]["acc"]
        times = {one["phase"]: f"{one['speedup']:.2f}×" for one in cell["speed"] or ()}
        is_dense = cell is dense
        out.append(
            f"| {cell['row']} | {'–' if is_dense else cell['budget']} | {cell['text']['keep_ratio']['all']:.1%} | "
            f"{cell['text']['perplexity'][text]['ppl']:,.1f} | "
            + (
                "1 | 0 | 0 | "
                if is_dense
                else f"{ratio['value']:,.2f} ({ratio['low']:,.2f}–{ratio['high']:,.2f}) | {cell['text']['kl']:.3f} | "
                f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f}) | "
            )
            + f"{lambada:.1%} | {times.get('prefill', '–')} | {times.get('decode', '–')} |"
        )
    return out


if __name__ == "__main__":
    print("\n".join(lines(Path(sys.argv[1]))))
