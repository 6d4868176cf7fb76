"""The vocabulary head apart from the model, and its logits in float32, a few rows at a time.

A row has 50 to 260 thousand entries. All logits of a batch dwarf the model, and few of them may be looked at: so a
forward keeps what enters the head, and the head is applied to the rows that count, a chunk at a time. In float32 even
a chunk fits no cache of a CPU, and its memory goes back to the system after every pass: worked on a few rows at a
time, sums over the vocabulary take a third of the time.

Shape suffixes: B sequences, N rows, D features entering the head, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

CACHED = 1 << 18
"""Elements of the rows that a CPU works on at once: 1 MiB in float32."""

HELD = 1 << 24
"""The same of another device: 64 MiB."""

CHUNK_ELEMENTS = 1 << 24
"""Most elements of a chunk of logits."""

ToLogits = Callable[[Tensor], Tensor]
"""From what enters the head, or leaves it, `[.., D or V]`, to the model's logits `[.., V]`."""


class HeadTap:
    """While entered, keeps what goes into the head and lets only the last position through, in this thread."""

    def __init__(self, head: nn.Module) -> None:
        self.head = head
        self.entered: Tensor | None = None
        """`[B, T, D]`."""
        self.raw: Tensor | None = None
        """What the head made of the last position, `[B, 1, V]`."""
        self._thread = threading.get_ident()

    def __enter__(self) -> HeadTap:
        self._handles = [
            self.head.register_forward_pre_hook(self._before),
            self.head.register_forward_hook(self._after),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if threading.get_ident() != self._thread or not args:
            return None
        self.entered = args[0]
        # A frozen head (as under routers) multiplies a slice with an expanded copy of its weight: see `folded_input`.
        return (args[0][:, -1:].contiguous(), *args[1:])

    def _after(self, _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        if threading.get_ident() == self._thread:
            self.raw = output


def find_finish(config: Any, raw_BV: Tensor, logits_BV: Tensor) -> ToLogits | None:
    """What turns the head's output into the model's logits (both `[B, 1, V]`), or None if unknown.

    It is not trusted to a name: the candidates are compared with the model's own logits bit for bit. Where those are no
    numbers, as those of a float16 model that overflows, any is right.
    """
    config = config.get_text_config()
    candidates: list[ToLogits] = []
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2 and 3
        candidates.append(lambda x: torch.tanh(x / cap) * cap)
    if divisor := getattr(config, "logits_scaling", None):  # Granite
        candidates.append(lambda x: x / divisor)
    if factor := getattr(config, "logit_scale", None):  # Cohere
        candidates.append(lambda x: x * factor)
    candidates.append(lambda x: x)  # last: on small logits a soft cap may round to nothing
    wanted = logits_BV.nan_to_num()
    return next((finish for finish in candidates if torch.equal(finish(raw_BV).nan_to_num(), wanted)), None)


def rows_a_chunk(vocabulary: int) -> int:
    """How many rows of logits are made at once."""
    return max(1, CHUNK_ELEMENTS // max(1, vocabulary))


def logit_chunks(states_ND: Tensor, to_logits: ToLogits) -> Iterator[tuple[int, Tensor]]:
    """Yields (first position, logits `[n, V]` in the model's dtype) over all N positions, a chunk at a time."""
    n = len(states_ND)
    size = rows_a_chunk(to_logits(states_ND[:1]).shape[-1] if n else 1)
    for start in range(0, n, size):
        yield start, to_logits(states_ND[start : start + size])


def few_rows(*tensors_NV: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same few rows of each tensor, views, in order; the tensors are of one shape."""
    first = tensors_NV[0]
    elements = CACHED if first.device.type == "cpu" else HELD
    size = max(1, elements // max(1, first.shape[-1]))
    return zip(*(tensor.split(size) for tensor in tensors_NV), strict=True)


def log_sums(logits_NV: Tensor) -> Tensor:
    """The logarithm of each row's Σ exp, float32 `[N]`: a logit minus it is a log-probability."""
    return torch.cat([rows.float().logsumexp(-1) for (rows,) in few_rows(logits_NV)])
