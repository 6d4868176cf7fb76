"""What tuning costs: router-only tuning against LoRA and full fine-tuning, same data, batch and optimiser.

    python benchmarks/speed/tuning_cost.py smollm2-135m --out tuning-cost.json
    python benchmarks/speed/tuning_cost.py --table tuning-cost.json

Each kind has a process of its own, for its peak memory; they take turns, a few steps a round. A step is one batch of
passages that ship with the package, each exactly `--length` tokens: forward, backward, AdamW. Memory is the largest
resident set of a step less that of the process before it loaded the model: weights, gradients, optimiser states and
activations. Kinds:

    full       all parameters, cross-entropy, in the checkpoint's dtype throughout
    lora       peft, rank 16 on every linear layer of the decoder, cross-entropy
    routers    MindSkip's routers alone (the deeper half, no skip path), cross-entropy: Router-Tuning's own setting
    default    the default recipe while routers and skip paths learn (KL to the dense model, which is a second forward)
    paths      the default recipe afterwards, at its budget: skip paths learn, what is skipped is not run
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from workers import Worker, serve

KINDS = ("full", "lora", "routers", "default", "paths")
WARM = 2
"""Untimed steps: optimiser states are made in the first."""


class Steps:
    """One kind's model, optimiser and batches; `run` does some steps and times their parts."""

    def __init__(self, kind: str, model, batches: list[dict], learning_rate: float = 1e-4) -> None:
        import torch

        from dynadepth.tuning.objectives import OBJECTIVES

        self.model, self.batches, self.share, self.count = prepared(kind, model), batches, 1.0, 0
        self.objective, self.routed = None, kind not in ("full", "lora")
        if self.routed:
            recipe = recipe_of(kind)
            self.objective, self.share = OBJECTIVES[recipe.objective], recipe.kl_share
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate)
        self.entered: list[float] = []
        self.reached: list[float] = []
        if self.routed:
            self._watch()

    def run(self, steps: int) -> list[dict[str, float]]:
        """Seconds of each step: `forward`, `backward`, `optimiser`, and `below` of the forward, the part spent under
        the first routed layer (None where nothing is routed)."""
        found = []
        for _ in range(steps):
            batch = self.batches[self.count % len(self.batches)]
            self.count += 1
            start = time.perf_counter()
            loss = self.loss(batch)
            forward = time.perf_counter()
            loss.backward()
            backward = time.perf_counter()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            end = time.perf_counter()
            below = self.reached[-1] - self.entered[-1] if self.reached else None  # of a teacher's two, the student's
            times = {"forward": forward - start, "backward": backward - forward, "optimiser": end - backward}
            found.append({**times, "step": end - start, "below": below, "loss": float(loss.detach())})
        return found

    def loss(self, batch: dict):
        if self.objective is not None:
            return self.objective(self.model, batch, None, self.share)[0]
        return self.model(**{k: v for k, v in batch.items() if k != "prompt_mask"}, use_cache=False).loss

    def _watch(self) -> None:
        """Notes when a forward enters the layers, and when it reaches the first routed one."""
        from dynadepth.architectures import decoder_layers
        from dynadepth.routed import routing_of

        layers = decoder_layers(self.model)
        first = min(site.layer for site in routing_of(self.model).sites)
        layers[0].register_forward_pre_hook(lambda *_: self.entered.append(time.perf_counter()))
        layers[first].register_forward_pre_hook(lambda *_: self.reached.append(time.perf_counter()))


def recipe_of(kind: str):
    from dynadepth.tuning import load_recipe

    return load_recipe("mindskip-paper" if kind == "routers" else "default")


def prepared(kind: str, model):
    """The model as this kind trains it."""
    from dynadepth import attach, routing_of
    from dynadepth.benchmark.variants import drawn_skip

    model.train()
    if kind == "full":
        return model
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        return get_peft_model(
            model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    recipe = recipe_of(kind)
    attach(model, recipe.config())
    if kind == "paths":  # as the second phase of tuning: routers are frozen, a share of the sites skips
        routing = routing_of(model)
        skip = drawn_skip(routing.n_layers, recipe.budget)
        for site, router in routing.routers().items():
            router.requires_grad_(False)
            router.threshold.fill_(float("inf") if site.layer in skip else float("-inf"))
    return model


def batches_of(name: str, batch: int, length: int, count: int) -> list[dict]:
    """Padded to no one's gain: every row has exactly `length` tokens."""
    from dynadepth import hub
    from dynadepth.tuning.data import Collator, Example, pad_token_id
    from dynadepth.tuning.self_data import plain_passages

    tokenizer = hub.load_tokenizer(name)
    ids = [i for e in plain_passages(tokenizer, n=8 * batch * count, max_length=length, seed=0) for i in e.input_ids]
    rows = [ids[i * length : (i + 1) * length] for i in range(batch * count)]
    if len(rows[-1]) < length:
        raise SystemExit(f"the passages are too short for {count} batches of {batch} rows of {length} tokens")
    collator = Collator(pad_token_id(tokenizer))
    examples = [Example(row, 0) for row in rows]
    return [collator(examples[i * batch : (i + 1) * batch]) for i in range(count)]


def work(kind: str, name: str, batch: int, length: int, seed: int = 0) -> None:
    """The worker: loads everything at the first request, then does the steps asked for."""
    import torch

    import dynadepth.tuning  # noqa: F401  # so that importing is no part of the memory
    from dynadepth import hub
    from dynadepth.benchmark.memory import reset_resident_peak, resident_peak

    torch.manual_seed(seed)
    data = batches_of(name, batch, length, count=4)
    base = reset_resident_peak() or 0
    steps = Steps(kind, hub.load_model(name), data)
    reset_resident_peak()

    def answer(steps_asked: int) -> dict:
        return {
            "steps": steps.run(steps_asked),
            "memory": (resident_peak() or 0) - base,
            "trainable": sum(p.numel() for p in steps.parameters),
            "dtype": str(steps.model.dtype).removeprefix("torch."),
        }

    serve(answer)


def measured(arguments: argparse.Namespace) -> dict:
    """The document: figures of every kind, and their share of full fine-tuning's."""
    import torch  # noqa: F401  # whose threads are named

    from dynadepth.provenance import provenance

    asked = [arguments.model, "--batch", str(arguments.batch), "--length", str(arguments.length)]
    workers = {kind: Worker(sys.executable, __file__, *asked, "--worker", kind) for kind in KINDS}
    samples: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    last: dict[str, dict] = {}
    try:
        for round_ in range(-1, arguments.rounds):
            for kind, worker in workers.items():
                print(f"{kind}: round {round_ + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
                last[kind] = worker.ask(steps_asked=WARM if round_ < 0 else arguments.steps)
                samples[kind] += last[kind]["steps"] if round_ >= 0 else []
    finally:
        for worker in workers.values():
            worker.__exit__()
    tokens = arguments.batch * arguments.length
    return {
        "kinds": {kind: figures(samples[kind], last[kind], tokens) for kind in KINDS},
        "batch": arguments.batch,
        "length": arguments.length,
        "provenance": provenance(seed=0, dtype=last["full"]["dtype"], model={"name": arguments.model}),
    }


def figures(samples: list[dict], last: dict, tokens: int) -> dict:
    """Medians over the steps, the spread of a step (interquartile range over median), memory and tokens a second."""
    found = {f"{part}_s": statistics.median(s[part] for s in samples) for part in ("forward", "backward", "optimiser")}
    times = [s["step"] for s in samples]
    step = statistics.median(times)
    low, _, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else (step, step, step)
    below = [s["below"] for s in samples if s["below"] is not None]
    return {
        "step_s": step,
        "spread": (high - low) / step,
        **found,
        "below_s": statistics.median(below) if below else None,
        "tokens_per_s": tokens / step,
        "peak_bytes": last["memory"],
        "trainable": last["trainable"],
        "samples": len(samples),
    }


def table(document: dict) -> str:
    """Markdown."""
    full = document["kinds"]["full"]
    lines = [
        f"Batch {document['batch']}, {document['length']} tokens a row, {document['provenance']['dtype']}.",
        "",
        "| | trained | step, of full | forward + backward + optimiser, ms | tokens/s | peak memory | of full |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, one in document["kinds"].items():
        parts = " + ".join(f"{1000 * one[f'{part}_s']:,.0f}" for part in ("forward", "backward", "optimiser"))
        lines.append(
            f"| {kind} | {one['trainable']:,} | {one['step_s'] / full['step_s']:.0%} (spread {one['spread']:.0%}) | "
            f"{parts} | {one['tokens_per_s']:,.0f} | {one['peak_bytes'] / 2**20:,.0f} MiB | "
            f"{one['peak_bytes'] / full['peak_bytes']:.0%} |"
        )
    routers = document["kinds"]["routers"]
    below = routers["below_s"] / routers["step_s"]
    lines += [
        "",
        f"Below its first routed layer `routers` spends {below:.0%} of a step: what cached states could save.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="smollm2-135m, gemma3-270m, a folder or a hub id")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--table", type=Path, help="print the table of this file and measure nothing")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2, help="a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments.worker, arguments.model, arguments.batch, arguments.length)
    if arguments.table:
        return print(table(json.loads(arguments.table.read_text())))
    if arguments.model is None:
        parser.error("name a model, or give --table FILE")
    document = measured(arguments)
    if arguments.out:
        arguments.out.write_text(json.dumps(document, indent=2) + "\n")
    print(table(document))


if __name__ == "__main__":
    main()
