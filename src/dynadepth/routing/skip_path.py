"""What a skipped sublayer contributes to the residual stream instead of its own output.

Shape suffixes: n rows, T tokens of this forward, D hidden size, r rank. A path is causal and streams: what it needs of
earlier tokens is a `Memory` of constant size, which the cache holds between forwards.

A new path is one new subclass in one new module of this package; `skip_path_named` finds it by `name`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dynadepth.routing.registry import named_subclass


@dataclass(frozen=True)
class Reality:
    """Which tokens of a forward are real, and what follows from it: all `[n, T]`."""

    real: Tensor
    """bool"""
    previous: Tensor
    """int64: column of the nearest real token before this one, -1 where this forward has none."""
    count: Tensor
    """float32: real tokens up to this one, itself included."""

    @staticmethod
    def of(mask: Tensor) -> Reality:
        """From a bool mask `[n, T]`."""
        column = torch.arange(mask.shape[1], device=mask.device)
        latest = torch.where(mask, column, -1).cummax(1).values
        previous = torch.cat([latest.new_full((len(mask), 1), -1), latest[:, :-1]], 1)
        return Reality(mask, previous, mask.float().cumsum(1))

    def rows(self, index: Tensor) -> Reality:
        """Of some rows."""
        return Reality(self.real[index], self.previous[index], self.count[index])


@dataclass(frozen=True)
class Memory:
    """What a path remembers of the tokens so far, per row; padding leaves no trace in it."""

    last: Tensor
    """`[n, r]`: of the latest real token, zeros before the first."""
    total: Tensor
    """`[n, r]` float32: sum over all real tokens."""
    count: Tensor
    """`[n]` float32: how many they are."""
    origin: Memory | None = None
    """Where recording of the past began; None where nothing is recorded."""
    past: tuple[Tensor, ...] | None = None
    """Recorded `last` and `total` summands `[n, t, r]` and which tokens were real `[n, t]`, so that they can be taken
    back."""

    def map(self, change: Any) -> Memory:
        """`change` applied to every tensor, all of which have the rows in front."""
        return Memory(
            change(self.last),
            change(self.total),
            change(self.count),
            None if self.origin is None else self.origin.map(change),
            None if self.past is None else tuple(change(t) for t in self.past),
        )

    def bytes(self) -> int:
        """Of what has constant size."""
        return sum(t.numel() * t.element_size() for t in (self.last, self.total, self.count))

    def stepped(self, last: Tensor, summand: Tensor) -> Memory:
        """After one more real token of every row, `[n, r]`, where nothing is recorded."""
        return Memory(last.contiguous(), self.total + summand.float(), self.count + 1)

    def unless(self, real: Tensor, after: Memory) -> Memory:
        """`after` in rows whose token is real (bool `[n, 1]`), this one in the others."""
        last, total = torch.where(real, after.last, self.last), torch.where(real, after.total, self.total)
        return Memory(last, total, torch.where(real[:, 0], after.count, self.count))

    def without(self, tokens: int) -> Memory | None:
        """As it was before the latest `tokens` tokens, recording anew; None where they were not recorded."""
        if self.origin is None or self.past is None or self.past[0].shape[1] < tokens:
            return None
        past = tuple(t[:, : t.shape[1] - tokens] for t in self.past)
        return self.origin.recording().extended(*past).recording()

    def recording(self) -> Memory:
        """This memory, recording from now on."""
        n, r = self.last.shape
        nothing = self.last.new_zeros(n, 0, r)
        real = torch.zeros(n, 0, dtype=torch.bool, device=self.last.device)
        origin = Memory(self.last, self.total, self.count)
        return Memory(self.last, self.total, self.count, origin, (nothing, nothing.float(), real))

    def extended(self, lasts: Tensor, totals: Tensor, real: Tensor) -> Memory:
        """After more tokens: `lasts`, `totals` `[n, t, r]` (of padding they count for nothing), `real` `[n, t]`."""
        here = Reality.of(real)
        last = self.last
        if real.shape[1]:
            column = torch.where(real[:, -1], real.shape[1] - 1, here.previous[:, -1])
            found = lasts.gather(1, column.clamp(min=0)[:, None, None].expand(-1, 1, lasts.shape[2]))[:, 0]
            last = torch.where((column >= 0)[:, None], found, self.last)
        past = self.past and tuple(
            torch.cat([old, new], 1) for old, new in zip(self.past, (lasts, totals, real), strict=True)
        )
        total = self.total + totals.float().masked_fill(~real.unsqueeze(-1), 0).sum(1)
        return Memory(last, total, self.count + real.sum(1), self.origin, past)


class AbstractSkipPath(nn.Module, ABC):
    """Cheap stand-in of one sublayer."""

    name: ClassVar[str]
    streams: ClassVar[bool] = False
    """Does it need a memory of earlier tokens?"""

    @staticmethod
    @abstractmethod
    def build(hidden_size: int, rank: int, unit_input: bool) -> AbstractSkipPath:
        """A new path, which contributes nothing yet. `unit_input`: the states it gets are no norm's output."""

    @abstractmethod
    def forward(
        self, hidden: Tensor, reality: Reality | None = None, memory: Memory | None = None
    ) -> tuple[Tensor | None, Memory | None]:
        """The contribution `[n, T, D]` for the sublayer's input `[n, T, D]`, and the memory after it.

        A contribution of None is zero, without computing it. `reality`: which tokens are real (None: all); what comes
        out for the others is of no use. `memory`: None at a beginning, and where nothing is remembered.
        """

    def begin(self, rows: int, like: Tensor) -> Memory | None:
        """The memory of `rows` rows before their first token, on the device of `like`; None for a path without."""
        return None

    def advance(self, hidden: Tensor, reality: Reality | None, memory: Memory | None) -> Memory | None:
        """The memory alone, after tokens that did not take the path."""
        return None


class IdentityPath(AbstractSkipPath):
    """The residual stream passes untouched, as in MindSkip (arXiv 2410.13184, Eq. 3 with M = 0)."""

    name = "identity"

    @staticmethod
    def build(hidden_size: int, rank: int, unit_input: bool) -> IdentityPath:
        return IdentityPath()

    def forward(
        self, hidden: Tensor, reality: Reality | None = None, memory: Memory | None = None
    ) -> tuple[None, None]:
        return None, None


class LinearPath(AbstractSkipPath):
    """A low-rank linear map of the current state, the previous one, and the mean of all so far.

    contribution_t = write · (read_now · h_t + read_before · h_(t-1) + mean over s ≤ t of read_mean · h_s) + bias.
    The mean is taken behind the projection, so that a token costs 4·r·D multiply-adds and a row remembers 2·r numbers.
    Parameters are float32 while they are tuned; afterwards they follow the model's dtype. `unit_input`: h is the state
    scaled to a root mean square of 1 (for sublayers that read the residual stream itself).
    """

    name = "linear"
    streams = True

    def __init__(self, hidden_size: int, rank: int, unit_input: bool = False) -> None:
        super().__init__()
        self.rank, self.unit_input = rank, unit_input
        self.read = nn.Parameter(torch.randn(hidden_size, 3 * rank, dtype=torch.float32) / hidden_size**0.5)
        """`[D, 3r]`: now, before, mean."""
        self.write = nn.Parameter(torch.zeros(rank, hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=torch.float32))

    @staticmethod
    def build(hidden_size: int, rank: int, unit_input: bool) -> LinearPath:
        return LinearPath(hidden_size, min(rank, hidden_size), unit_input)

    def begin(self, rows: int, like: Tensor) -> Memory:
        total = torch.zeros(rows, self.rank, dtype=torch.float32, device=like.device)
        return Memory(total.to(like.dtype), total, total.new_zeros(rows))

    def forward(
        self, hidden: Tensor, reality: Reality | None = None, memory: Memory | None = None
    ) -> tuple[Tensor, Memory | None]:
        if memory is not None and memory.past is None and hidden.shape[1] == 1:
            return self._step(hidden, reality, memory)
        dtype = hidden.dtype
        now, before, summand = (self.scaled(hidden) @ self.read.to(dtype)).split(self.rank, dim=-1)
        start = self.begin(len(hidden), hidden) if memory is None else memory
        if reality is None:
            previous = torch.cat([start.last.unsqueeze(1), before[:, :-1]], 1)
            count = torch.arange(1, hidden.shape[1] + 1, device=hidden.device) + start.count[:, None]
            total = summand.float().cumsum(1)
        else:
            index = reality.previous.clamp(min=0).unsqueeze(-1).expand_as(before)
            found = (reality.previous >= 0).unsqueeze(-1)
            previous = torch.where(found, before.gather(1, index), start.last.unsqueeze(1))
            count = (reality.count + start.count[:, None]).clamp(min=1)
            total = summand.float().masked_fill(~reality.real.unsqueeze(-1), 0).cumsum(1)
        mean = (total + start.total.unsqueeze(1)) / count.unsqueeze(-1)
        mixed = now + previous + mean.to(dtype)
        contribution = mixed @ self.write.to(dtype) + self.bias.to(dtype)
        return contribution, None if memory is None else self._after(before, summand, reality, memory)

    def _step(self, hidden: Tensor, reality: Reality | None, memory: Memory) -> tuple[Tensor, Memory]:
        """The same of one token a row, in a quarter of the operations: where a model decodes each takes longer to
        start than to run."""
        dtype = hidden.dtype
        now, before, summand = (self.scaled(hidden[:, 0]) @ self.read.to(dtype)).split(self.rank, dim=-1)
        after = memory.stepped(before, summand)
        mixed = now + memory.last + (after.total / after.count[:, None]).to(dtype)
        contribution = mixed @ self.write.to(dtype) + self.bias.to(dtype)
        return contribution.unsqueeze(1), after if reality is None else memory.unless(reality.real, after)

    def advance(self, hidden: Tensor, reality: Reality | None, memory: Memory | None) -> Memory | None:
        if memory is None:
            return None
        read = self.read[:, self.rank :].to(hidden.dtype)
        before, summand = (self.scaled(hidden) @ read).split(self.rank, dim=-1)
        return self._after(before, summand, reality, memory)

    def scaled(self, hidden: Tensor) -> Tensor:
        """The states that the features are made of."""
        return nn.functional.rms_norm(hidden, hidden.shape[-1:], eps=1e-6) if self.unit_input else hidden

    @staticmethod
    def _after(before: Tensor, summand: Tensor, reality: Reality | None, memory: Memory) -> Memory:
        if memory.past is None and before.shape[1] == 1:
            after = memory.stepped(before[:, 0], summand[:, 0])
            return after if reality is None else memory.unless(reality.real, after)
        if reality is None and memory.past is None:
            total = memory.total + summand.float().sum(1)
            return Memory(before[:, -1].contiguous(), total, memory.count + before.shape[1])
        real = torch.ones(before.shape[:2], dtype=torch.bool, device=before.device) if reality is None else reality.real
        return memory.extended(before, summand.float(), real)


def skip_path_named(name: str) -> type[AbstractSkipPath]:
    """The skip path called `name`; ConfigError with the near names otherwise."""
    return named_subclass(AbstractSkipPath, name, package="dynadepth.routing")  # type: ignore[type-abstract]  # a subclass comes out
