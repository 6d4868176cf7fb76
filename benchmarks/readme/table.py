"""Prints README's measured table from the JSON files beside this script, and draws `figure.svg`."""

import json
from math import exp
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "dynadepth"

HERE = Path(__file__).parent
TASKS = {"arc_easy": "acc_norm", "piqa": "acc_norm", "lambada_openai": "acc"}


def read(name: str) -> dict:
    return json.loads((HERE / name).read_text())


def row(block: dict, kl: float, keep: float) -> dict:
    (text,) = block["perplexity"].values()
    tasks = {name: block["tasks"][name][metric] for name, metric in TASKS.items() if name in block["tasks"]}
    return {"keep": keep, "nll": text["nll"], "kl": kl, **tasks}


def rows() -> dict[str, dict]:
    found = {"dense": row(read("eval-routed-75.json")["dense"], 0.0, 1.0)}
    for budget in (75, 50):
        for kind, name in (("routed", "routed"), ("static", "static twin"), ("random", "random twin")):
            if (HERE / f"eval-{kind}-{budget}.json").is_file():
                block = read(f"eval-{kind}-{budget}.json")
                found[f"{name}, budget 0.{budget}"] = row(block, block["kl"], block["keep_ratio"]["all"])
    return found


def table(found: dict[str, dict]) -> str:
    lines = [
        "| of 30 attentions | executed | WikiText-2 perplexity | KL to dense, nats | ARC-Easy | PIQA | LAMBADA |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, r in found.items():
        tasks = " | ".join(f"{100 * r[task]:.0f} %" if task in r else "–" for task in TASKS)
        lines.append(f"| {name} | {100 * r['keep']:.1f} % | {exp(r['nll']):.1f} | {r['kl']:.3f} | {tasks} |")
    return "\n".join(lines)


def speed() -> str:
    lines = ["| | context | speed-up over dense | skip efficiency | KV bytes |", "|---|---|---|---|---|"]
    for cell in read("bench.json")["cells"]:
        if cell["variant"] == "routed":
            efficiency = cell["skip_efficiency"]
            share = cell["kv_bytes_routed"] / cell["kv_bytes_dense"]
            shown = "–" if efficiency is None else f"{efficiency:.2f}"
            speedup = f"{cell['speedup']:.2f}× (spread {100 * cell['spread']:.0f} %)"
            lines.append(f"| {cell['phase']} | {cell['context']:,} | {speedup} | {shown} | {100 * share:.0f} % |")
    return "\n".join(lines)


def figure(found: dict[str, dict]) -> None:
    cells = [cell for cell in read("bench.json")["cells"] if cell["variant"] == "routed"]
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
    names = list(found)
    colours = {"dense": "#777777", "routed": "#1f77b4", "static twin": "#ff7f0e", "random twin": "#bbbbbb"}
    shown = [colours[n.partition(",")[0]] for n in names[::-1]]
    left.barh(names[::-1], [exp(found[n]["nll"]) for n in names[::-1]], color=shown)
    left.set_xscale("log")
    left.set_title("WikiText-2 perplexity (log scale, lower is better)", fontsize=9)
    labels = [f"{c['phase']}, context {c['context']:,}" for c in cells]
    right.barh(labels[::-1], [c["speedup"] for c in cells[::-1]], color="#1f77b4")
    right.axvline(1.0, color="#777777", linewidth=1)
    right.set_title("speed-up over dense (higher is better)", fontsize=9)
    fig.suptitle("SmolLM2-135M-Instruct; speed at three quarters of all attentions", fontsize=10)
    fig.savefig(HERE / "figure.svg", metadata={"Date": None})


if __name__ == "__main__":
    all_rows = rows()
    print(table(all_rows), speed(), sep="\n\n")
    figure(all_rows)
