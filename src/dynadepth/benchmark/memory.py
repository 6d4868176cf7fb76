"""Memory: the peak of a call above the resting level, and the bytes a key-value cache really holds."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Cache


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that `call` needs at its highest point beyond those in use before it; None where the system cannot tell.

    On CUDA the allocator's own count. On Linux the resident set: its high-water mark is reset first, and the C
    library gives freed memory back, so that earlier calls hide nothing. The result of `call` is dropped.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
        before = _status_bytes("VmRSS")
        call()
        return max(_status_bytes("VmHWM") - before, 0)
    except (OSError, AttributeError):
        return None


def cache_bytes(cache: Cache) -> int:
    """Bytes of the keys and values in an ordinary cache; of views, only the elements they show."""
    layers: list[Any] = cache.layers
    tensors = [t for layer in layers for t in (layer.keys, layer.values) if t is not None]
    return sum(t.numel() * t.element_size() for t in tensors)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")
