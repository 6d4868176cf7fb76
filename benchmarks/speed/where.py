"""Where the time of a prefill or of a decode step goes, by PyTorch's profiler.

    python benchmarks/speed/where.py smollm2-135m --phase decode --batch 8 --context 128 --compare route,mixed --out F
    python benchmarks/speed/where.py --table where.json

Beside dense and *pruned* (the skipped attentions physically absent) stand kinds of routing as `dynadepth bench
--compare` names them, on the same prompts. Each row of the table is a kind of operation in milliseconds a call, the
last one what is in none of them: Python, and starting them. The profiler makes small operations longer: what is to be
compared is one model with the other.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

KINDS = {
    "products": ("mm", "addmm", "bmm", "baddbmm", "linear", "mv", "addmv"),
    "attention": ("scaled_dot_product", "flash_attention"),
    "gathering and scattering": ("index", "gather", "scatter", "cat", "sort", "nonzero", "where", "masked_fill"),
    "copies": ("copy_", "clone", "_to_copy", "contiguous", "fill_", "zero_"),
}
"""Kinds of operations by parts of their names, the first that fits; all others work element by element."""
ELEMENTS, REST = "element by element (norms, rotary, sums)", "Python and dispatch"
ROUNDS, CALLS = 5, 8
"""Rounds in which the models take turns, and calls of a turn; a prefill is called once."""


def kind_of(name: str) -> str:
    """Of an operation such as `aten::index_select`."""
    own = name.removeprefix("aten::")
    for kind, parts in KINDS.items():
        if kind == "products" and own in parts:
            return kind
        if kind != "products" and any(part in own for part in parts):
            return kind
    return ELEMENTS


def measured(models: dict, work, phase: str) -> dict:
    """Seconds a call by kind of operation, of each model; `total_s` is without the profiler."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    found = {name: {"total_s": [], "profiled_s": [], "kinds": []} for name in models}
    calls = CALLS if phase == "decode" else 1

    def turn(model, cache) -> float:
        start = time.perf_counter()
        for index in range(calls):
            if phase == "decode":
                work.step(model, cache, index)
            else:
                work.prefill(model)
        return (time.perf_counter() - start) / calls

    with torch.no_grad():
        for round_ in range(-1, ROUNDS):  # the first warms up
            print(f"round {round_ + 1} of {ROUNDS}", file=sys.stderr, flush=True)
            for name, model in models.items():
                seconds = turn(model, work.prefill(model) if phase == "decode" else None)
                cache = work.prefill(model) if phase == "decode" else None
                with profile(activities=[ProfilerActivity.CPU]) as profiled:
                    slow = turn(model, cache)
                if round_ < 0:
                    continue
                kinds: dict[str, float] = {}
                for event in profiled.key_averages():
                    kind = kind_of(event.key)
                    kinds[kind] = kinds.get(kind, 0.0) + event.self_cpu_time_total / 1e6 / calls
                found[name]["total_s"].append(seconds)
                found[name]["profiled_s"].append(slow)
                found[name]["kinds"].append({**kinds, REST: slow - sum(kinds.values())})
    return {
        name: {
            "total_s": statistics.median(one["total_s"]),
            "profiled_s": statistics.median(one["profiled_s"]),
            "kinds": {
                kind: statistics.median(kinds.get(kind, 0.0) for kinds in one["kinds"])
                for kind in (*KINDS, ELEMENTS, REST)
            },
        }
        for name, one in found.items()
    }


def show(document: dict) -> None:
    models = document["models"]
    print(f"{document['phase']}, batch {document['batch']}, context {document['context']:,}; ms a call\n")
    print(f"| | {' | '.join(models)} |")
    print("|---" * (len(models) + 1) + "|")
    for kind in next(iter(models.values()))["kinds"]:
        print(f"| {kind} | " + " | ".join(f"{1000 * one['kinds'][kind]:.1f}" for one in models.values()) + " |")
    for label, key in (("profiled", "profiled_s"), ("not profiled", "total_s")):
        print(f"| {label} | " + " | ".join(f"{1000 * one[key]:.1f}" for one in models.values()) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--phase", choices=("prefill", "decode"), default="decode")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--compare", default="route", help="kinds of routing, separated by commas")
    parser.add_argument("--skip-path", default="identity")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="print the table of a result and stop")
    given = parser.parse_args()
    if given.table:
        return show(json.loads(given.table.read_text()))

    from dynadepth import hub
    from dynadepth.benchmark import cut_prompts
    from dynadepth.benchmark.pruned import bare_twin, pruned_twin
    from dynadepth.benchmark.timing import Work
    from dynadepth.benchmark.variants import Variant, build, drawn_sites, settling
    from dynadepth.errors import DynadepthError
    from dynadepth.provenance import provenance

    try:
        variants = [Variant.parse(name, given.skip_path) for name in given.compare.split(",")]
    except DynadepthError as error:
        parser.error(str(error))
    model = hub.load_model(given.model)
    model.eval()  # not frozen: torch copies the head of a frozen plain model (see folded_input in model.py)
    prompts = cut_prompts(hub.load_tokenizer(given.model), count=given.batch, length=given.context + CALLS)
    work, plain = Work(prompts, given.context), bare_twin(model)
    models = {"dense": plain, "pruned": pruned_twin(plain, drawn_sites(plain, variants[0].keep))}
    for variant in variants:
        models[str(variant)] = build(plain, variant)
        with settling(models[str(variant)], variant):
            work.prefill(models[str(variant)])
    document = {
        "phase": given.phase,
        "batch": given.batch,
        "context": given.context,
        "skip_path": given.skip_path,
        "models": measured(models, work, given.phase),
        "provenance": provenance(dtype=model.dtype, model={"name": given.model}),
    }
    show(document)
    if given.out:
        given.out.write_text(json.dumps(document, indent=2) + "\n")
    return None


if __name__ == "__main__":
    main()
