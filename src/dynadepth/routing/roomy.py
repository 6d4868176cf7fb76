"""Cache layers with room for the tokens to come: a new token is written into its place instead of copying the whole
cache behind it (`torch.cat`), as transformers' own layers do for every token.

`keys` and `values` stay what they are in the base classes, tensors of exactly the tokens held (here: views), so that
whatever reads, cuts, reorders or replaces them does as before; a layer whose tensors were replaced makes room anew.
What a view shows is never overwritten.

Shapes: keys and values `[rows, heads, tokens, head size]`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

CHUNK = 256
"""Least room, in tokens, that is made at a time; a long cache gets an eighth of its length."""


class Room:
    """Mixin of both kinds of layer, last among their bases, or a layer's class could not be changed in place.

    `_lent`: the views that `keys` and `values` are while the room is in use; `_room`: the tensors they are views of;
    `_start`: their first token's place in it.
    """

    keys: Any
    values: Any
    is_initialized: bool
    _lent: tuple[Tensor, Tensor] | None = None
    _room: tuple[Tensor, Tensor] | None = None
    _start: int = 0

    def extended(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values with `tokens` places behind them, still to be written. `accept` makes them the layer's."""
        held = self.keys.shape[2]
        room = self._room
        if (
            room is None
            or self._lent is None
            or self.keys is not self._lent[0]
            or self.values is not self._lent[1]
            or self._start + held + tokens
            >= room[0].shape[2]  # the last place stays free: strides are never a full one's
            or (room[0].is_inference() and not torch.is_inference_mode_enabled())
        ):
            length = held + tokens
            length += max(CHUNK, length // 8) + 1
            room = self._room = tuple(_moved(tensor, length) for tensor in (self.keys, self.values))  # type: ignore[assignment]  # a pair
            self._start = 0
            assert room is not None
        whole = held + tokens
        return room[0].narrow(2, self._start, whole), room[1].narrow(2, self._start, whole)

    @abstractmethod
    def accept(self, keys: Tensor, values: Tensor) -> None:
        """Takes over what `extended` gave, written."""

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self._lent = (keys, values)

    def roomy(self, keys: Tensor) -> bool:
        """Can these new keys go into room? The first ones cannot (a prefill alone needs none), nor any while gradients
        are recorded: attention keeps the views that it saw for its backward, and they must not change."""
        return (
            self.is_initialized
            and self.keys.numel() > 0
            and self.keys.dtype == keys.dtype
            and self.keys.device == keys.device
            and not torch.is_grad_enabled()
        )

    def leave(self) -> None:
        """Lets a room go whose rows are not the layer's any more, now and not with the next token."""
        if self._lent is not None and self.keys is not self._lent[0]:
            self._room = self._lent = None

    def spare_bytes(self) -> int:
        """Bytes allocated beyond the tokens held: of a room that is left, too, until it is let go."""
        if self._room is None:
            return 0
        lent = self._lent if self._lent is not None and self.keys is self._lent[0] else ()
        used = sum(held.numel() * held.element_size() for held in lent)
        return sum(room.numel() * room.element_size() for room in self._room) - used


def _own(states: Tensor) -> Tensor:
    whole = states.untyped_storage().nbytes() == states.numel() * states.element_size()  # `nbytes` has no fake tensor
    return states if whole else states.clone(memory_format=torch.contiguous_format)


def _moved(tensor: Tensor, length: int) -> Tensor:
    """A tensor `length` tokens long that begins with the given one."""
    room = tensor.new_empty(*tensor.shape[:2], length, tensor.shape[3])
    room.narrow(2, 0, tensor.shape[2]).copy_(tensor)
    return room


class RoomyLayer(DynamicLayer, Room):
    """`DynamicLayer` with room."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            return self._begin(key_states, value_states)
        if not self.roomy(key_states):
            return DynamicLayer.update(self, key_states, value_states, *args, **kwargs)
        keys, values = _written(self, key_states, value_states)
        self.accept(keys, values)
        return keys, values

    def accept(self, keys: Tensor, values: Tensor) -> None:
        self._hold(keys, values)

    def reset(self) -> None:
        self._room = self._lent = None
        super().reset()

    def _begin(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Takes the first states as they are, where the base class would join them to an empty tensor: a copy of every
        key and value of a prefill. Only views of something larger are copied, since they would keep it."""
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values = _own(keys), _own(values)
        return self.keys, self.values


class RoomySlidingLayer(DynamicSlidingWindowLayer, Room):
    """`DynamicSlidingWindowLayer` with room: the window moves along it."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.record_past or not self.roomy(key_states):
            return DynamicSlidingWindowLayer.update(self, key_states, value_states, *args, **kwargs)
        keys, values = _written(self, key_states, value_states)
        self.accept(keys, values)
        return keys, values

    def accept(self, keys: Tensor, values: Tensor) -> None:
        held: Any = self.keys
        self.cumulative_length += keys.shape[2] - held.shape[2]
        left = max(keys.shape[2] - self.sliding_window + 1, 0)
        self._start += left
        kept = keys.shape[2] - left
        self._hold(keys.narrow(2, left, kept), values.narrow(2, left, kept))

    def reset(self) -> None:
        self._room = self._lent = None
        super().reset()


def _written(layer: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    tokens = keys.shape[2]
    all_keys, all_values = layer.extended(tokens)
    held = all_keys.shape[2] - tokens
    all_keys.narrow(2, held, tokens).copy_(keys)
    all_values.narrow(2, held, tokens).copy_(values)
    return all_keys, all_values


ROOMY: dict[type, type] = {DynamicLayer: RoomyLayer, DynamicSlidingWindowLayer: RoomySlidingLayer}


def make_roomy(cache: Cache) -> None:
    """Gives a cache's layers room, in place; those of other kinds stay, and all of a cache that is offloaded."""
    if not cache.offloading:
        for layer in cache.layers:
            kind = ROOMY.get(type(layer))
            if kind is not None:
                layer.__class__ = kind


def make_plain(layer: Any) -> None:
    """Undoes `make_roomy` for a layer that is empty."""
    if isinstance(layer, Room):
        layer.__class__ = next(plain for plain, kind in ROOMY.items() if isinstance(layer, kind))
        for name in ("_lent", "_room", "_start"):
            vars(layer).pop(name, None)
