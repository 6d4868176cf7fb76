"""Memory: the peak of a call above the resting level, and the bytes a key-value cache really holds."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import Cache

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""Names of `mallopt(3)`."""


@contextlib.contextmanager
def keeping_freed() -> Iterator[None]:
    """Inside, the C library keeps the memory that tensors of this process give back (glibc alone).

    By default large activations go back to the system and cost fresh pages at the next prefill, more or fewer by what
    else lies in the heap: a tenth of its time and more, which hides what is to be compared. Afterwards the limits are
    those that glibc's own adaptation ends at, and what was kept is given back.
    """
    _tell_malloc({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1})
    try:
        yield
    finally:
        _tell_malloc({M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 2**25, M_TRIM_THRESHOLD: 2**26})
        reset_resident_peak()


def _tell_malloc(settings: dict[int, int]) -> None:
    with contextlib.suppress(OSError, AttributeError):
        c = ctypes.CDLL("libc.so.6")
        for name, value in settings.items():
            c.mallopt(name, value)


def peak_watch(device: torch.device) -> Callable[[], int | None]:
    """Starts to watch memory. The function given answers the bytes in use at the highest point since, beyond those in
    use now; None where the system cannot tell.

    On CUDA the allocator's own count. On Linux the resident set: its high-water mark is reset, and the C library gives
    freed memory back, so that what was done earlier hides nothing but uncollected cycles.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)

        def on_device() -> int | None:
            torch.cuda.synchronize(device)
            return torch.cuda.max_memory_allocated(device) - allocated

        return on_device
    before = reset_resident_peak()

    def resident() -> int | None:
        after = resident_peak()
        return None if before is None or after is None else max(after - before, 0)

    return resident


def reset_resident_peak() -> int | None:
    """Gives freed memory back and starts the high-water mark of the resident set anew, at the bytes that it returns;
    None where the system is not Linux or forbids it."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
        return _status_bytes("VmRSS")
    except (OSError, AttributeError):
        return None


def resident_peak() -> int | None:
    """The largest resident set since `reset_resident_peak`, in bytes; None where the system cannot tell."""
    try:
        return _status_bytes("VmHWM")
    except OSError:
        return None


def cache_bytes(cache: Cache) -> int:
    """Bytes of the keys and values in an ordinary cache; of views, only the elements they show."""
    held = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(t.numel() * t.element_size() for t in held if t is not None)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")
