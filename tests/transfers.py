"""How often the host waits for the device."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Transfers(TorchDispatchMode):
    """Counts operators that make the host wait for the device; `transfers` adds `.tolist()` and its like."""

    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function.overloadpacket.__name__.split("::")[-1] in self.NAMES
        return function(*args, **(kwargs or {}))


@contextmanager
def transfers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Transfers]:
    counted = Transfers()

    def patched(name: str) -> Any:
        original = getattr(torch.Tensor, name)

        def call(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            before = counted.count
            result = original(self, *args, **kwargs)
            counted.count = before + 1  # one transfer, however many numbers
            return result

        return call

    with monkeypatch.context() as patch, counted:
        for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(torch.Tensor, name, patched(name))
        yield counted


@contextmanager
def host_transfers() -> Iterator[list[str]]:
    """What the package's own code asks of a tensor's values on the host: one entry a question, with the line that
    asked."""
    asked: list[str] = []
    names = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(torch.Tensor, name, _noting(name, getattr(torch.Tensor, name), asked))
        yield asked


def _noting(name: str, method: Any, asked: list[str]) -> Any:
    def noted(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        frame = sys._getframe(1)
        if frame.f_globals["__name__"].startswith("dynadepth"):
            asked.append(f"{name} in {frame.f_globals['__name__']}:{frame.f_lineno}")
        return method(self, *args, **kwargs)

    return noted
