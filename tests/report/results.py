"""The results of a demo that never ran: plain data for the table, the figures and the page."""

from __future__ import annotations

import copy
from typing import Any

LAYERS = 6


def answer(text: str, route: dict[str, float] | None = None) -> dict[str, Any]:
    keep = None if route is None else {"routed": sum(route.values()) / len(route), "all": 0.7}
    return {"prompt": "Why?", "text": text, "tokens": [1, 2], "route": route, "keep_ratio": keep}


def cell(phase: str, speedup: float) -> dict[str, Any]:
    return {
        "phase": phase, "context": 2048, "dense_s": 0.5, "routed_s": 0.5 / speedup, "speedup": speedup,
        "kv_bytes_dense": 40_000_000, "kv_bytes_routed": 30_000_000,
    }  # fmt: skip


ROUTE = {f"{layer}.attention": float(layer % 2) for layer in range(1, LAYERS)}
_RESULTS: dict[str, Any] = {
    "settings": {"model": "tiny", "budget": 0.75},
    "target": "attention",
    "granularity": "sequence",
    "layers": LAYERS,
    "routed_sites": list(ROUTE),
    "static_skip": [2, 4],
    "tuning": {"seconds": 61.0, "n_trainable": 1234, "n_train": 64, "losses": [3.0, 2.0, 1.5], "data_seconds": 9.0},
    "variants": {
        "dense": {"perplexity": 20.0, "kl": 0.0, "agreement": 1.0, "accuracy": 0.5, "keep_all": 1.0},
        "routed": {
            "perplexity": 25.0, "kl": 0.3, "agreement": 0.8, "accuracy": 0.48, "keep_all": 0.75, "questions": 160,
            "accuracy_difference": [-0.05, 0.01],
        },
        "static": {"perplexity": 24.0, "kl": 0.4, "agreement": 0.8, "accuracy": 0.45, "keep_all": 0.75},
    },
    "site_keep": dict.fromkeys(ROUTE, 0.5),
    "samples": [
        {
            "prompt": "Why?",
            "answers": {"dense": answer("Dense."), "routed": answer("Routed.", ROUTE), "static": answer("Static.")},
        }
    ],
    "speed": {
        "routed": [cell("prefill", 1.1), cell("decode", 1.2)],
        "static": [cell("prefill", 1.15), cell("decode", 1.25)],
    },
    "steps": [{"title": "Tuning", "seconds": 61.0}],
    "provenance": {"dynadepth": "0.1.0", "commit": None, "hardware": {"cpu": "A processor", "gpu": None}},
}  # fmt: skip


def results(**changes: Any) -> dict[str, Any]:
    """A fresh copy with top-level keys replaced."""
    return copy.deepcopy(_RESULTS) | changes
