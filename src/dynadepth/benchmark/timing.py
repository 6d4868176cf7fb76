"""Interleaved timing: several models do the same work in turns, so that drift of the machine hits all of them alike.

One round prefills every model and then decodes with all of them, one after the other, each on its own filled cache. The
tokens fed while decoding are the text's own, so that all models read the same. The order of the models rotates.

Shape suffixes: B sequences, T tokens.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from dynadepth.architectures import decoder_layers
from dynadepth.benchmark.memory import cache_bytes, keeping_freed, peak_watch
from dynadepth.cost import PARTS
from dynadepth.routing.cache import RoutedCache
from dynadepth.routing.decision import Site
from dynadepth.routing.sparse_layer import SparseLayer

FEWEST = 3
"""Rounds that run however long they take: prefills of a minute need no more to agree, or to show that they do not."""


@dataclass
class Samples:
    """Seconds of one model in one cell, a sample a round (prefill, generate) or a token step (decode)."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    generate: list[float] = field(default_factory=list)
    kv_bytes: dict[str, int] = field(default_factory=dict)
    """Held by the cache after the prefill and after the last step."""
    state_bytes: int = 0
    """Of the skip paths, beside them."""
    reserved_bytes: int | None = None
    """Of the keys and values with the room for later tokens, after the last step; None of a cache that is not ours."""
    peak_bytes: int | None = None
    """Of a prefill, its cache included, beyond what was in use before; None where the system cannot tell."""
    routes: dict[Site, list[int]] = field(default_factory=dict)
    """Sticky decisions (how often it executes) by row, as the cache holds them."""


@dataclass(frozen=True)
class Work:
    """A prompt and the tokens that follow it: `ids_BT` holds `context + ahead + new_tokens` of them, on the model's
    device. The `ahead` ones are read at once, untimed, so that the steps after them meet a longer cache."""

    ids_BT: Tensor
    context: int
    ahead: int = 0

    @property
    def new_tokens(self) -> int:
        return self.ids_BT.shape[1] - self.filled

    @property
    def filled(self) -> int:
        """Tokens in the cache before the first step."""
        return self.context + self.ahead

    def prefill(self, model: PreTrainedModel) -> Cache:
        """The whole context at once, logits of the last token only, as `generate` does."""
        return self._forward(model, None, 0, self.context)

    def go_ahead(self, model: PreTrainedModel, cache: Cache) -> None:
        """Reads what stands between the context and the first step."""
        if self.ahead:
            self._forward(model, cache, self.context, self.filled)

    def step(self, model: PreTrainedModel, cache: Cache, index: int) -> None:
        """Token `index` of the new ones; the cache grows by one."""
        self._forward(model, cache, self.filled + index, self.filled + index + 1)

    def generate(self, model: PreTrainedModel) -> None:
        """`generate()` of as many tokens as follow the context, greedy, never stopping early."""
        ids, n = self.ids_BT[:, : self.context], self.ahead + self.new_tokens
        generator: Any = model  # generation is mixed into the classes that have a head
        pad = generator.generation_config.pad_token_id
        out = generator.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n,
            min_new_tokens=n,
            do_sample=False,
            pad_token_id=0 if pad is None else pad,
        )
        assert out.shape[1] == self.context + n

    def _forward(self, model: PreTrainedModel, cache: Cache | None, start: int, end: int) -> Cache:
        ids = self.ids_BT[:, start:end]  # without a mask, as `generate` runs what has no padding
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.past_key_values


def measure(
    models: Mapping[str, PreTrainedModel],
    work: Work,
    *,
    repeats: int,
    at_most: float | None = None,
    generate: Sequence[str] = (),
    progress: Callable[[str], object] | None = None,
) -> dict[str, Samples]:
    """Times prefill and decode of all models, and `generate()` of those named, after an untimed round of each (the
    first prefill of a size takes the page faults of what earlier sizes gave back, and may compile).

    In the end a prefill of each looks at memory alone. `repeats` rounds, or fewer (but `FEWEST`) where they take longer
    than `at_most` seconds. Every cache is checked to hold the context before its first step, and all tokens after the
    last one. Freed memory stays with the process meanwhile (`keeping_freed`), for all models alike.
    """
    samples = {name: Samples() for name in models}
    device = work.ids_BT.device
    with torch.no_grad(), _quiet_collector(), keeping_freed():
        started = time.perf_counter()
        for round_ in range(-1, repeats):  # round -1 warms up
            if round_ == 0:
                started = time.perf_counter()
            if at_most is not None and round_ >= FEWEST and time.perf_counter() - started > at_most:
                break
            if progress is not None and round_ >= 0:
                progress(f"round {round_ + 1} of {repeats}")
            steps = work.new_tokens if round_ >= 0 else min(work.new_tokens, 2)
            caches: dict[str, Cache] = {}
            for name in _rotated(models, round_):
                seconds, caches[name] = _timed(partial(work.prefill, models[name]), device)
                if round_ >= 0:
                    samples[name].prefill.append(seconds)
                check_length(models[name], caches[name], work.context)
                samples[name].kv_bytes["prefill"] = held_bytes(caches[name])
                work.go_ahead(models[name], caches[name])
            for name in _rotated(models, round_):
                for index in range(steps):  # one model's after each other, as `generate` runs them
                    seconds, _ = _timed(partial(work.step, models[name], caches[name], index), device)
                    if round_ >= 0:
                        samples[name].decode.append(seconds)
            for name, cache in caches.items():
                check_length(models[name], cache, work.filled + steps)
                samples[name].kv_bytes["decode"] = held_bytes(cache)
                if isinstance(cache, RoutedCache):
                    samples[name].state_bytes = cache.state_bytes()
                    samples[name].reserved_bytes = cache.reserved_bytes()
            caches.clear()
            for name in _rotated(generate, round_):
                seconds, _ = _timed(partial(work.generate, models[name]), device)
                if round_ >= 0:
                    samples[name].generate.append(seconds)
        _look_at_memory(models, work, samples)
    return samples


def _look_at_memory(models: Mapping[str, PreTrainedModel], work: Work, samples: Mapping[str, Samples]) -> None:
    for name, model in models.items():
        peak = peak_watch(work.ids_BT.device)
        cache = work.prefill(model)
        samples[name].peak_bytes = peak()
        samples[name].routes = dict(getattr(cache, "routes", {}))
        del cache


def check_length(model: PreTrainedModel, cache: Cache, length: int) -> None:
    """Asserts that a cache is really filled: it answers `length`, and each layer that stores keys stores that many;
    where keys of skipped tokens are dropped, at most that many a row."""
    if isinstance(cache, RoutedCache):
        assert cache.seen == length, f"the cache saw {cache.seen} tokens, not {length}"
        sticky = {site.layer for site in cache.routes if "attention" in PARTS[site.target]}
        for number, layer in enumerate(cache.layers):
            if isinstance(layer, SparseLayer):
                rows = 0 if layer.positions is None else len(layer.positions)
                assert layer.stored(length) <= rows * length, f"layer {number} holds more than {length} tokens a row"
            elif number not in sticky and hasattr(layer, "keys"):
                assert layer.keys is not None, f"layer {number} was left empty"
                _check_keys(layer, length)
        for site, route in cache.routes.items():
            keys = getattr(cache.layers[site.layer], "keys", None)
            if "attention" in PARTS[site.target] and any(route):
                assert keys is not None, f"{site} was left empty"
                rows = sum(map(bool, route))
                assert keys.shape[0] == rows, f"{site} holds {keys.shape[0]} rows where {rows} execute"
                _check_keys(cache.layers[site.layer], length)
        return
    filled: list[Any] = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    others = sum(not hasattr(layer, "keys") for layer in cache.layers)  # linear attention keeps a state
    assert len(filled) in (len(decoder_layers(model)) - others, 0), "a layer of the cache was left empty"
    for layer in filled:
        assert layer.get_seq_length() == length, f"the cache answers {layer.get_seq_length()} tokens, not {length}"
        _check_keys(layer, length)


def _check_keys(layer: Any, length: int) -> None:
    window = layer.sliding_window if getattr(layer, "is_sliding", False) else length + 1
    held = layer.keys.shape[-2]
    assert held == min(length, window - 1), f"{held} keys for {length} tokens"


def held_bytes(cache: Cache) -> int:
    """Bytes of keys and values in a cache: of a routed one those of executed rows and tokens."""
    return cache.kv_bytes() if isinstance(cache, RoutedCache) else cache_bytes(cache)


def median(values: Sequence[float]) -> float:
    """The median of at least one value."""
    return statistics.median(values)


def spread(values: Sequence[float]) -> float | None:
    """Interquartile range over median; None of fewer than two values."""
    if len(values) < 2:
        return None
    low, mid, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / mid


def _timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    _synchronise(device)
    start = time.perf_counter()
    result = call()
    _synchronise(device)
    return time.perf_counter() - start, result


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _rotated(names: Mapping[str, Any] | Sequence[str], round_: int) -> list[str]:
    """Their order in a round: in any `FEWEST` that follow one another from a multiple of it on, each of many stands
    early, late and between; of a few another one comes first each time."""
    order = list(names)
    turn, place = divmod(round_, FEWEST)
    shift = round_ if len(order) <= FEWEST else place * len(order) // FEWEST + turn
    shift %= max(len(order), 1)
    return order[shift:] + order[:shift]


@contextmanager
def _quiet_collector() -> Iterator[None]:
    """No garbage collection in the middle of a sample."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
