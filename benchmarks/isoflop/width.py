"""How much of the FLOPs that Mixture-of-Depths saves a prefill gains by the clock, as models grow wider.

Nothing is trained, since how many tokens execute decides the time, not which: random Llama-shaped models, whose
thresholds let 12.5 % of the tokens through.

    python benchmarks/isoflop/width.py --out benchmarks/isoflop/width.json
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from statistics import mean, median

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dynadepth import MoDConfig, attach, routing_of
from dynadepth.provenance import provenance
from dynadepth.records import write_json

LAYERS, VOCABULARY, CAPACITY = 8, 512, 0.125


def built(width: int, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    heads = max(2, width // 64)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=-(-8 * width // 24) * 8,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def fewer_flops(model: LlamaForCausalLM, tokens: int) -> float:
    """The dense layers' FLOPs over the routed ones', of which every other runs on a share of the tokens."""
    width, weights = model.config.hidden_size, sum(p.numel() for p in model.model.layers[0].parameters())

    def layer(count: float) -> float:
        return 2 * weights * count + 2 * width * count * (count + 1)  # products with weights; causal attention

    return 2 * layer(tokens) / (layer(tokens) + layer(CAPACITY * tokens))


@torch.no_grad()
def calibrate(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    """Thresholds by which so many tokens of `ids` execute, from the lowest site up, as each changes what is above."""
    for site, router in routing_of(model).routers().items():
        router.threshold.fill_(torch.quantile(model(ids, use_cache=True).depth_logits[site].float(), 1 - CAPACITY))


@torch.no_grad()
def seconds(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    began = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--shapes", nargs="+", default=["8x256", "1x2048"], help="rows x tokens")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    random.seed(0)
    cells = []
    for width in options.widths:
        dense, routed = built(width), attach(built(width), MoDConfig(capacity=CAPACITY))
        for shape in options.shapes:
            rows, tokens = map(int, shape.split("x"))
            ids = torch.randint(0, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(width))
            calibrate(routed, ids)
            with torch.no_grad():
                trace = routed(ids, use_cache=True).depth_trace
            shares = [decision.execute.float().mean().item() for decision in trace.decisions.values()]
            times: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(options.repeats + 1):
                for is_routed in random.sample([False, True], 2):
                    times[is_routed].append(seconds(routed if is_routed else dense, ids))
            ratios = sorted(d / r for d, r in zip(times[False][1:], times[True][1:], strict=True))
            quarter = len(ratios) // 4
            cells.append(
                {
                    "width": width,
                    "rows": rows,
                    "tokens": tokens,
                    "executed": mean(shares),
                    "fewer_flops": fewer_flops(dense, tokens),
                    "prefill": median(ratios),
                    "quartiles": [ratios[quarter], ratios[-1 - quarter]],
                }
            )
            print(
                f"width {width}, {shape}: {mean(shares):.1%} execute, prefill {median(ratios):.2f}x as fast", flush=True
            )
    write_json(options.out, {"capacity": CAPACITY, "layers": LAYERS, "cells": cells, "provenance": provenance()})


if __name__ == "__main__":
    main()
