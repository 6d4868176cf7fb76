"""Prints the Markdown table of a committed frontier: `python benchmarks/frontier/table.py benchmarks/frontier/MODEL`.

Perplexity as a multiple of the dense model's, and the difference of the mean of the eight tasks (LAMBADA apart), each
with a 95 % bootstrap interval paired by window or row; rows of a task are drawn within it.
"""

import json
import sys
from pathlib import Path

import torch

TASKS = ("arc_challenge", "boolq", "hellaswag", "mmlu", "openbookqa", "piqa", "rte", "winogrande")
LAMBADA, GSM8K = "lambada_openai", "gsm8k_test"
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
    """The table, with columns for what the folder's cells have."""
    found = cells(folder)
    dense = next(cell for cell in found.values() if cell["row"] == "dense")
    text = next(iter(dense["text"]["perplexity"]))
    tasks, timed = set(dense["tasks"]["tasks"]), any(cell["speed"] for cell in found.values())
    columns = ["method", "budget", "executed", "perplexity", "× dense (95 %)", "KL, nats"]
    columns += ["8 tasks, points"] if tasks.issuperset(TASKS) else []
    columns += ["LAMBADA"] if LAMBADA in tasks else []
    columns += ["GSM8K"] if GSM8K in tasks else []
    columns += ["prefill", "decode"] if timed else []
    out = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    order = {"dense": 0, "default": 1, "default-static": 2, "default-shuffled": 3}
    for cell in sorted(found.values(), key=lambda c: (-(c["budget"] or 0), order.get(c["row"], 9), c["row"])):
        is_dense, ratio = cell is dense, cell["against_dense"]["perplexity"][text]
        shown = {
            "method": cell["row"],
            "budget": "–" if is_dense else str(cell["budget"]),
            "executed": f"{cell['text']['keep_ratio']['all']:.1%}",
            "perplexity": f"{cell['text']['perplexity'][text]['ppl']:,.1f}",
            "× dense (95 %)": f"{ratio['value']:,.2f} ({ratio['low']:,.2f}–{ratio['high']:,.2f})",
            "KL, nats": f"{cell['text']['kl']:.3f}",
        }
        if "8 tasks, points" in columns:
            mean, low, high = average(cell, dense)
            shown["8 tasks, points"] = f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
        if is_dense:
            shown |= dict.fromkeys(("KL, nats", "8 tasks, points"), "0") | {"× dense (95 %)": "1"}
        if LAMBADA in tasks:
            shown["LAMBADA"] = f"{cell['tasks']['tasks'][LAMBADA]['acc']:.1%}"
        if GSM8K in tasks:
            score = cell["tasks"]["tasks"][GSM8K]
            shown["GSM8K"] = f"{round(score['acc'] * score['n'])} of {score['n']}"
        shown |= {one["phase"]: f"{one['speedup']:.2f}×" for one in cell["speed"] or ()}
        out.append(f"| {' | '.join(shown.get(name, '–') for name in columns)} |")
    return out


if __name__ == "__main__":
    print("\n".join(lines(Path(sys.argv[1]))))
