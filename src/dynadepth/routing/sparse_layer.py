"""`SparseLayer`: the cache layer of an attention whose skipped tokens leave no keys (`drop` at token granularity)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dynadepth.routing.roomy import RoomyLayer


class SparseLayer(RoomyLayer):
    """Keys and values of executed tokens only: `keys` `[B, heads, S, d]` with `positions` int64 `[B, S]`, -1 where a
    slot of a ragged batch is empty. `holes` tells whether any real token was ever skipped. In an `offloaded` cache it
    keeps no room, since tensors come and go.

    A sliding layer forgets what has left the window, from time to time; never while it records its past (see
    `Cache.activate_past_recording`). `forgot` tells whether it did.
    """

    def __init__(self, like: Any, offloaded: bool = False) -> None:
        super().__init__()
        self.like, self.offloaded = like, offloaded
        self.is_sliding = getattr(like, "is_sliding", False)
        if self.is_sliding:
            self.sliding_window = like.sliding_window
        self.record_past = getattr(like, "record_past", False)
        self.keys: Any = None
        self.values: Any = None
        self.positions: Tensor | None = None
        self.holes = self.forgot = False
        self.start = 0

    def roomy(self, keys: Tensor) -> bool:
        return not self.offloaded and super().roomy(keys)

    def activate_past_recording(self) -> None:
        self.record_past = True

    def begin(self, seen: int) -> None:
        """Before a forward's first write: `seen` tokens came before. Forgets what no later token of a window can
        see."""
        self.start = seen
        if self.is_initialized:
            self.prefetch()
            if self.is_sliding and not self.record_past and self.keys.shape[2] > 2 * self.sliding_window:
                self._keep_from(seen - self.sliding_window + 1)
                self.forgot = True

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Adds `[B, heads, t, d]` at positions `[B, t]` and returns all keys and values."""
        self.positions = positions if self.positions is None else torch.cat([self.positions, positions], dim=1)
        return super().update(keys, values)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The dense case, without holes: every token of every row. Returns what the host's mask has columns for."""
        batch, _, tokens, _ = key_states.shape
        positions = torch.arange(self.start, self.start + tokens, device=key_states.device).expand(batch, -1)
        keys, values = self.append(key_states, value_states, positions)
        if self.is_sliding:
            visible = min(self.start, self.sliding_window - 1) + tokens
            keys, values = keys[:, :, -visible:], values[:, :, -visible:]
        return keys, values

    def _keep_from(self, first: int) -> None:
        """Drops the slots that no row uses for a position >= `first`."""
        assert self.positions is not None
        kept = (self.positions >= first).any(0).nonzero().flatten()
        self.positions = self.positions[:, kept]
        self.keys, self.values = self.keys[:, :, kept], self.values[:, :, kept]

    def crop_to(self, length: int) -> None:
        """Drops the tokens at positions >= `length`."""
        if self.positions is not None:
            self.positions = torch.where(self.positions < length, self.positions, -1)
            self._keep_from(0)

    def reorder_cache(self, beam_idx: Any) -> None:
        if self.positions is not None:  # with no slot left, too: the number of rows must still follow
            before = len(self.positions)
            self.positions = self.positions.index_select(0, beam_idx.to(self.positions.device))
            self.keys = self.keys.index_select(0, beam_idx.to(self.keys.device))
            self.values = self.values.index_select(0, beam_idx.to(self.values.device))
            if len(self.positions) == 1 < before:
                self._keep_from(0)  # one sequence has no empty slots: its next token may see all of them

    def stored(self, seen: int) -> int:
        """Token slots really used after `seen` tokens, over all rows; what has left a window is not counted."""
        if self.positions is None:
            return 0
        first = max(seen - self.sliding_window + 1, 0) if self.is_sliding else 0
        return int((self.positions >= first).sum())

    def reset(self) -> None:
        super().reset()
        self.positions, self.holes, self.forgot = None, False, False
