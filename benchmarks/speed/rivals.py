"""What users could pick instead: plain transformers, its compiled form, llama.cpp, a static prune, in one run.

    python benchmarks/speed/rivals.py smollm2-135m --llama-python LLAMA_VENV/bin/python --gguf DIR --out rivals.json
    python benchmarks/speed/rivals.py --table rivals.json

Every rival has a process of its own and does the same in turns: greedy generation, batch 1, from the same real prompts
of `--context` tokens. Time to the first token is a call for one token; a further token's time is the difference to a
call for `--new-tokens` more, over their number: what a user of `generate` waits for, sampling and all.

    transformers            the model as transformers loads it, eager
    transformers-compiled   torch.compile of its forward, with a static cache (shapes never change here: its best case)
    pruned                  half of the attentions physically absent, eager: no routing, no way back
    dynadepth               routed: half of the attentions skipped, the same ones for every prompt
    compiled, compiled-routed   dense and routed under `dynadepth.compile`
    llama.cpp-bf16, llama.cpp-q8_0   llama-cpp-python on the same weights, given an environment that has it

The weights of llama.cpp are the embedded GGUF file's, dequantised as those of transformers are and rounded to bfloat16;
Q8_0 is quantised from these. `ready` is the time from starting a process to its first answers: importing, loading,
compiling. `agrees` is the share of a rival's tokens, up to the first that differs, that are those of `transformers`:
near 1 for the same weights (rounding tips some choices), low where sublayers are skipped.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from workers import Worker, serve

COMPILED = ("compiled", "compiled-routed")
TORCH = ("transformers", "transformers-compiled", "pruned", "dynadepth", *COMPILED)
"""Those of this environment."""
LLAMA = {"llama.cpp-bf16": "bf16", "llama.cpp-q8_0": "q8_0"}
KEEP = 0.5


class Generator:
    """A model of transformers that answers with greedy tokens."""

    def __init__(self, name: str, model, length: int) -> None:
        self.model, self.cache = prepared(name, model), None
        if name == "transformers-compiled":
            import torch
            from transformers import StaticCache

            self.cache = StaticCache(config=self.model.config, max_cache_len=length)
            self.model.forward = torch.compile(self.model.forward, dynamic=False)

    def tokens(self, prompt: list[int], new_tokens: int) -> list[int]:
        import torch

        ids = torch.tensor([prompt])
        extra = {}
        if self.cache is not None:
            self.cache.reset()
            extra["past_key_values"] = self.cache
        pad = self.model.generation_config.pad_token_id
        with torch.no_grad():
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0 if pad is None else pad,
                **extra,
            )
        return out[0, len(prompt) :].tolist()


def prepared(name: str, model):
    """The model as this rival runs it."""
    import dynadepth
    from dynadepth.benchmark.pruned import pruned_twin
    from dynadepth.benchmark.variants import Variant, build, drawn_sites

    if name == "pruned":
        return pruned_twin(model, drawn_sites(model, KEEP))
    if name in ("dynadepth", "compiled-routed"):
        model = build(model, Variant("sequence", KEEP))
    if name in COMPILED:
        model = dynadepth.compile(model)
    return model.eval()


def work(rival: str, name: str, length: int) -> None:
    """A worker of this environment."""
    from transformers.utils import logging

    from dynadepth import hub
    from dynadepth.benchmark.memory import resident_peak

    logging.set_verbosity_error()
    generator = Generator(rival, hub.load_model(name), length)

    def answer(prompt: list[int], new_tokens: int) -> dict:
        start = time.perf_counter()
        tokens = generator.tokens(prompt, new_tokens)
        return {"seconds": time.perf_counter() - start, "tokens": tokens, "peak": resident_peak()}

    serve(answer)


def measured(arguments: argparse.Namespace) -> dict:
    """The document."""
    from dynadepth import hub
    from dynadepth.benchmark import cut_prompts
    from dynadepth.provenance import provenance

    prompts = cut_prompts(hub.load_tokenizer(arguments.model), count=arguments.rounds + 1, length=arguments.context)
    length = arguments.context + arguments.new_tokens + 1
    commands = {
        rival: [sys.executable, __file__, arguments.model, "--worker", rival, "--length", str(length)]
        for rival in (arguments.only or TORCH)
    }
    if arguments.llama_python:
        from weights import gguf_files

        files = gguf_files(arguments.model, arguments.gguf, tuple(LLAMA.values()))
        script = str(Path(__file__).with_name("llama_worker.py"))
        threads = str(provenance()["hardware"]["threads"])
        for rival, kind in LLAMA.items():
            commands[rival] = [arguments.llama_python, script, str(files[kind]), str(length), threads]
    first, *others = prompts.tolist()
    workers: dict[str, Worker] = {}
    ready: dict[str, float] = {}
    try:
        for rival, command in commands.items():
            print(f"{rival}: getting ready", file=sys.stderr, flush=True)
            start = time.perf_counter()
            workers[rival] = Worker(*command)
            for new_tokens in (1, arguments.new_tokens + 1):
                workers[rival].ask(prompt=first, new_tokens=new_tokens)
            ready[rival] = time.perf_counter() - start
        samples, last = rounds(workers, others, arguments.new_tokens)
    finally:
        for worker in workers.values():
            worker.__exit__()
    return {
        "rivals": {
            rival: {**figures(samples[rival]), "ready_s": ready[rival], "peak_rss_bytes": last[rival].get("peak")}
            for rival in workers
        },
        "versions": {rival: one["version"] for rival, one in last.items() if "version" in one},
        "context": arguments.context,
        "new_tokens": arguments.new_tokens,
        "keep": KEEP,
        "provenance": provenance(dtype="bfloat16", model={"name": arguments.model}),
    }


def rounds(workers, prompts: list[list[int]], new_tokens: int) -> tuple[dict, dict]:
    """A sample of each rival a prompt: (`first_s`, `token_s`, `agrees`) each; and each rival's last answer."""
    samples = {rival: [] for rival in workers}
    last: dict[str, dict] = {}
    for index, prompt in enumerate(prompts):
        print(f"prompt {index + 1} of {len(prompts)}", file=sys.stderr, flush=True)
        reference: list[int] = []
        for rival, worker in workers.items():
            first = worker.ask(prompt=prompt, new_tokens=1)
            last[rival] = worker.ask(prompt=prompt, new_tokens=new_tokens + 1)
            reference = reference or last[rival]["tokens"]
            token_s = (last[rival]["seconds"] - first["seconds"]) / new_tokens
            samples[rival].append((first["seconds"], token_s, agreement(last[rival]["tokens"], reference)))
    return samples, last


def agreement(tokens: list[int], reference: list[int]) -> float:
    """Share of the tokens before the first that differs."""
    same = next((i for i, (a, b) in enumerate(zip(tokens, reference, strict=True)) if a != b), len(tokens))
    return same / len(tokens)


def figures(samples: list[tuple[float, float, float]]) -> dict:
    """Medians and spreads (interquartile range over median) over the prompts."""
    found = {}
    for name, values in zip(("first", "token"), list(zip(*samples, strict=True))[:2], strict=True):
        middle = statistics.median(values)
        low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (middle,) * 3
        found |= {f"{name}_s": middle, f"{name}_spread": (high - low) / middle}
    return {**found, "agrees": statistics.mean(sample[2] for sample in samples), "samples": len(samples)}


def table(document: dict) -> str:
    """Markdown."""
    base = document["rivals"]["transformers"]
    lines = [
        f"Batch 1, prompts of {document['context']} tokens, {document['new_tokens']} more; of 1 attention in "
        f"{1 / document['keep']:g} where sublayers are skipped.",
        "",
        "| | time to the first token | × transformers | tokens/s after it | × transformers | peak memory | ready after "
        "| agrees |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for rival, one in document["rivals"].items():
        peak = one["peak_rss_bytes"]
        lines.append(
            f"| {rival} | {1000 * one['first_s']:,.0f} ms (spread {one['first_spread']:.0%}) | "
            f"{base['first_s'] / one['first_s']:.2f}× | {1 / one['token_s']:,.0f} (spread {one['token_spread']:.0%}) | "
            f"{base['token_s'] / one['token_s']:.2f}× | {'–' if peak is None else f'{peak / 2**20:,.0f} MiB'} | "
            f"{one['ready_s']:,.0f} s | {one['agrees']:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="smollm2-135m or gemma3-270m; without llama.cpp any folder or hub id")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--table", type=Path, help="print the table of this file and measure nothing")
    parser.add_argument("--llama-python", help="the interpreter of an environment that has llama-cpp-python")
    parser.add_argument("--gguf", type=Path, default=Path("."), help="folder of llama.cpp's weights, made once")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8, help="prompts, beside the one that warms up")
    parser.add_argument("--only", nargs="+", help="some of this environment's rivals; transformers comes first")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments.worker, arguments.model, arguments.length)
    if arguments.table:
        return print(table(json.loads(arguments.table.read_text())))
    if arguments.model is None:
        parser.error("name a model, or give --table FILE")
    if arguments.only and (arguments.only[0] != "transformers" or set(arguments.only) - set(TORCH)):
        parser.error(f"--only starts with transformers and names some of {', '.join(TORCH)}")
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    document = measured(arguments)
    if arguments.out:
        arguments.out.write_text(json.dumps(document, indent=2) + "\n")
    print(table(document))


if __name__ == "__main__":
    main()
