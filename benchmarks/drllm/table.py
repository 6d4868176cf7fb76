"""In and out of domain against the goals, from `dynadepth eval --compare-dense --json`: `table.py EVAL.json ..`."""

import json
import sys
from pathlib import Path

IN_DOMAIN = ("arc_easy", "arc_challenge", "gsm8k_test")
GOALS = {"in domain": 2.0, "out of domain": -0.85}
"""Least difference of the mean accuracy from dense, in points."""


def main(files):
    tasks, dense = {}, {}
    for file in files:
        result = json.loads(Path(file).read_text(encoding="utf-8"))
        tasks |= result["tasks"]
        dense |= result["dense"]["tasks"]
    points = {metric: {} for metric in ("acc", "usual")}
    print("| task | rows | metric | dense | routed | difference, points (95 %) |\n|---|---|---|---|---|---|")
    for name, task in tasks.items():
        usual = task["metric"]
        for metric in dict.fromkeys((usual, "acc")):
            before, after = 100 * dense[name][metric], 100 * task[metric]
            low, high = (100 * bound for bound in task["diff_vs_dense" if metric == usual else "acc_diff_vs_dense"])
            interval = f"{after - before:+.1f} ({low:+.1f} to {high:+.1f})"
            print(f"| {name} | {task['n']} | {metric} | {before:.1f} % | {after:.1f} % | {interval} |")
            for kind in ("acc",) * (metric == "acc") + ("usual",) * (metric == usual):
                points[kind][name] = after - before
    for title, goal in GOALS.items():
        for kind, values in points.items():
            own = [value for name, value in values.items() if (name in IN_DOMAIN) == (title == "in domain")]
            if own:
                mean, label = sum(own) / len(own), "`acc`" if kind == "acc" else "each task's usual metric"
                print(f"\n{title}, {label}, mean of {len(own)}: {mean:+.2f} points (goal: at least {goal:+.2f})")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1:])
