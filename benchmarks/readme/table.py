"""Prints README's table of times from the JSON file beside this script."""

import json
from pathlib import Path

HERE = Path(__file__).parent


def speed() -> str:
    lines = ["| | context | speed-up over dense | skip efficiency | KV bytes |", "|---|---|---|---|---|"]
    for cell in json.loads((HERE / "bench.json").read_text())["cells"]:
        if cell["variant"] == "routed":
            efficiency = cell["skip_efficiency"]
            share = (cell["kv_bytes_routed"] + (cell.get("state_bytes_routed") or 0)) / cell["kv_bytes_dense"]
            shown = "–" if efficiency is None else f"{efficiency:.2f}"
            speedup = f"{cell['speedup']:.2f}× (spread {100 * cell['spread']:.0f} %)"
            lines.append(f"| {cell['phase']} | {cell['context']:,} | {speedup} | {shown} | {100 * share:.0f} % |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(speed())
