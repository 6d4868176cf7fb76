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
    points = {}
    print("| task | metric | rows | dense | routed | difference, points (95 %) |\n|---|---|---|---|---|---|")
    for name, task in tasks.items():
        metric = task["metric"]
        before, after = 100 * dense[name][metric], 100 * task[metric]
        points[name] = after - before
        low, high = (100 * bound for bound in task["diff_vs_dense"])
        interval = f"{after - before:+.1f} ({low:+.1f} to {high:+.1f})"
        print(f"| {name} | {metric} | {task['n']} | {before:.1f} % | {after:.1f} % | {interval} |")
    for title, goal in GOALS.items():
        own = [value for name, value in points.items() if (name in IN_DOMAIN) == (title == "in domain")]
        if own:
            mean = sum(own) / len(own)
            print(f"\n{title}, mean of {len(own)}: {mean:+.2f} points (goal: at least {goal:+.2f})")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1:])
