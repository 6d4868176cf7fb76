"""Decode under `dynadepth.compile` against plain transformers, in one interleaved run.

    python benchmarks/speed/compiled.py smollm2-135m --context 512 --out compiled.json
    python benchmarks/speed/compiled.py --table compiled.json

Every model reads the same real prompt and then the same tokens, one at a time; a sample is one step. They take turns of
eight steps, the first of which is not counted: generation runs the steps of one model after another.

    plain           the model as transformers runs it
    compiled        the same under `dynadepth.compile`
    routed          a static route that skips every second attention, uncompiled
    routed-compiled the same under `dynadepth.compile`
    linear-compiled the same with linear skip paths of rank 64 in the model's dtype
    pruned-compiled the skipped attentions physically absent, compiled: what routing could cost nothing beside
    int8, ...       with --int8: torchao's int8 weights, plain and compiled, dense and routed

`first_s` is each model's first step, which compiles; PyTorch keeps what it compiled, so that a second run takes less.
`agrees` is the share of greedy choices that are those of `plain` on these tokens (rounding tips some).
"""

import argparse
import json
import statistics
import time
from pathlib import Path

TURN = 8
"""Steps that a model takes before the next one's turn."""


def models(model, int8: bool) -> dict:
    """The models to time, on shared weights."""
    import torch

    import dynadepth
    from dynadepth.architectures import decoder_layers
    from dynadepth.benchmark.pruned import pruned_twin, shared_copy
    from dynadepth.routed import routing_of

    skip = tuple(range(1, len(decoder_layers(model)), 2))

    def routed(base, **options):
        dynadepth.attach(base, dynadepth.StaticConfig(skip=skip, **options))
        for path in routing_of(base).paths().values():
            path.to(model.dtype)
        return base

    made = {
        "plain": shared_copy(model),
        "compiled": dynadepth.compile(shared_copy(model)),
        "routed": routed(shared_copy(model)),
        "routed-compiled": dynadepth.compile(routed(shared_copy(model))),
        "linear-compiled": dynadepth.compile(routed(shared_copy(model), skip_path="linear", skip_rank=64)),
        "pruned-compiled": dynadepth.compile(pruned_twin(model, routing_of(routed(shared_copy(model))).sites)),
    }
    if int8:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        for name, build in {
            "int8": lambda base: base,
            "int8-compiled": dynadepth.compile,
            "int8-routed-compiled": lambda base: dynadepth.compile(routed(base)),
        }.items():
            base = shared_copy(model)
            quantize_(base, Int8WeightOnlyConfig(version=2), lambda module, _: type(module) is torch.nn.Linear)
            made[name] = build(base)
    return made


def measure(made: dict, ids, context: int, cpu_time: bool) -> dict:
    """Times of every step of every model; the first ones compile and are kept apart."""
    import torch

    clock = time.process_time if cpu_time else time.perf_counter
    caches, steps, first, choices = {}, {}, {}, {}
    with torch.no_grad():
        for name, model in made.items():
            caches[name] = model(input_ids=ids[:, :context], use_cache=True, logits_to_keep=1).past_key_values
            steps[name], choices[name] = [], []
        for begin in range(context, ids.shape[1], TURN):
            order = list(made)
            shift = begin // TURN % len(order)
            for name in order[shift:] + order[:shift]:
                for place in range(begin, min(begin + TURN, ids.shape[1])):
                    mask = torch.ones(len(ids), place + 1, dtype=torch.long)
                    start = clock()
                    out = made[name](
                        input_ids=ids[:, place : place + 1],
                        attention_mask=mask,
                        past_key_values=caches[name],
                        use_cache=True,
                        logits_to_keep=1,
                    )
                    seconds = clock() - start
                    choices[name].append(out.logits[:, -1].argmax(-1).tolist())
                    if place < context + 3:
                        first[name] = first.get(name, 0.0) + seconds
                    elif place > begin:
                        steps[name].append(seconds)
    plain = steps["plain"]
    return {
        name: {
            "step_s": statistics.median(own),
            "speedup": statistics.median(a / b for a, b in zip(plain, own, strict=True)),
            "spread": _spread(own),
            "first_s": first[name],
            "agrees": statistics.mean(a == b for a, b in zip(choices[name], choices["plain"], strict=True)),
        }
        for name, own in steps.items()
    }


def _spread(values: list[float]) -> float:
    low, mid, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / mid


def show(result: dict) -> None:
    """Prints the table."""
    print(f"batch {result['batch']}, context {result['context']}, {result['provenance']['dtype']}, {result['clock']}\n")
    print("| model | ms a token | against plain | spread | tokens/s | first three steps | same choices |")
    print("|---|---|---|---|---|---|---|")
    for name, row in result["models"].items():
        print(
            f"| {name} | {1000 * row['step_s']:.2f} | {row['speedup']:.2f}× | {100 * row['spread']:.0f} % "
            f"| {result['batch'] / row['step_s']:.1f} | {row['first_s']:.1f} s | {100 * row['agrees']:.0f} % |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=100, help="tokens decoded; the first three are not counted")
    parser.add_argument("--models", help="only these, separated by commas; plain always")
    parser.add_argument("--int8", action="store_true", help="with torchao's int8 weights, too")
    parser.add_argument("--cpu-time", action="store_true", help="time of this process's threads, for a busy machine")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="print the table of a result and stop")
    given = parser.parse_args()
    if given.table:
        return show(json.loads(given.table.read_text()))

    if given.steps < 5:
        parser.error("--steps must be at least 5: the first three are not counted")
    from dynadepth import hub
    from dynadepth.benchmark import cut_prompts
    from dynadepth.provenance import provenance

    model = hub.load_model(given.model)
    model.eval().requires_grad_(False)
    made = models(model, given.int8)
    if given.models:
        if unknown := set(given.models.split(",")) - set(made):
            parser.error(f"no model {', '.join(sorted(unknown))} here; there are {', '.join(made)}")
        made = {name: one for name, one in made.items() if name in ("plain", *given.models.split(","))}
    ids = cut_prompts(hub.load_tokenizer(given.model), count=given.batch, length=given.context + given.steps)
    result = {
        "context": given.context,
        "batch": given.batch,
        "clock": "CPU time" if given.cpu_time else "wall clock",
        "models": measure(made, ids, given.context, given.cpu_time),
        "provenance": provenance(dtype=model.dtype, model={"name": given.model}),
    }
    show(result)
    if given.out:
        given.out.write_text(json.dumps(result, indent=2) + "\n")
    return None


if __name__ == "__main__":
    main()
