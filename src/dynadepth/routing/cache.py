"""`RoutedCache`: the ordinary `DynamicCache`, whose layers hold the rows (or tokens) that executed and nothing else.

It differs from its base in five things. The true token count (`seen`) answers for lengths and mask sizes, since a
skipped layer stores nothing. Each layer knows which logical rows it stores. The sticky routes live here, beside the
keys and values they decide about. Under `drop` at token granularity, a layer stores keys with their positions
(`SparseLayer`); all layers keep room for the tokens to come (`roomy`). What a repeated layer stores in its second
pass lies in a layer of its own, behind those of the model.

An empty `DynamicCache` of the caller's becomes a `RoutedCache` in place: same object, same flags. Only a forward of the
routed model that it was adopted by can fill it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from dynadepth.errors import UnsupportedCacheError
from dynadepth.routing.context import current
from dynadepth.routing.memories import Memories
from dynadepth.routing.roomy import Room, make_plain, make_roomy
from dynadepth.routing.routes import RouteBook
from dynadepth.routing.sparse_layer import SparseLayer


class RoutedCache(DynamicCache):
    """See the module's contract. Made by `adopt`, never constructed."""

    layers: list[Any]
    seen: int
    book: RouteBook
    layout: tuple[Any, ...]
    """What is routed, and how keys are kept: forwards with another layout cannot read this cache."""
    stored_rows: dict[int, list[int]]
    """Logical rows held by a layer, in storage order; a layer that is not a key holds every row."""
    slots: dict[int, int]
    """Where the second pass of a repeated layer is stored: index in `layers`, by the layer's."""
    memories: Memories
    """What skip paths remember."""

    @classmethod
    def adopt(
        cls, cache: Cache, n_layers: int, layout: tuple[Any, ...] = (), sparse_layers: Iterable[int] = ()
    ) -> RoutedCache:
        """Turns an empty `DynamicCache` into a `RoutedCache` in place, or raises saying which cache to use instead."""
        if isinstance(cache, RoutedCache):
            cache._forget_interrupted()
            if cache.layout == layout:
                return cache
            if cache.seen:
                cache.refuse("it was filled by a model that routes other sublayers, or routes them otherwise")
            cache.release()
        if type(cache) is not DynamicCache:
            raise UnsupportedCacheError(
                f"Routed models keep keys and values in a DynamicCache, not in a {type(cache).__name__}: drop "
                "`cache_implementation` / `past_key_values`, or run dense with `dynadepth.disabled(model)`."
            )
        if cache.get_seq_length() > 0:
            raise UnsupportedCacheError(
                f"This cache already holds {cache.get_seq_length()} tokens of an unrouted forward: start the routed "
                "model with an empty cache, or run dense with `dynadepth.disabled(model)`."
            )
        replicate = cache.layer_class_to_replicate
        if replicate is not None:
            cache.layers.extend(replicate() for _ in range(n_layers - len(cache.layers)))
            cache.layer_class_to_replicate = None
        cache.__class__ = cls
        assert isinstance(cache, RoutedCache)
        cache.seen, cache.book, cache.stored_rows, cache.layout, cache.slots = 0, RouteBook(), {}, layout, {}
        cache.memories = Memories(any(getattr(layer, "record_past", False) for layer in cache.layers))
        make_roomy(cache)
        for index in sparse_layers:
            if index < len(cache.layers):  # an early exit makes caches of fewer layers
                cache.layers[index] = SparseLayer(cache.layers[index], cache.offloading)
        return cache

    def release(self) -> None:
        """Turns this cache, which must be empty, back into the `DynamicCache` it was, for a dense forward to fill."""
        if self.seen:
            self.refuse("a dense forward needs an empty one")
        self._forget_interrupted()
        del self.layers[len(self.layers) - len(self.slots) :]
        for index, layer in enumerate(self.layers):
            if isinstance(layer, SparseLayer):
                layer = self.layers[index] = layer.like
            make_plain(layer)
        for name in ("seen", "book", "stored_rows", "layout", "slots", "memories"):
            delattr(self, name)
        self.__class__ = DynamicCache  # type: ignore[assignment]  # the same layout

    def _forget_interrupted(self) -> None:
        """Empties a cache whose first forward did not come to its end (an error, Ctrl-C): some layers are filled."""
        if not self.seen and (self.book.decided or any(getattr(layer, "is_initialized", 0) for layer in self.layers)):
            self.reset()

    def refuse(self, reason: str) -> NoReturn:
        """Raises UnsupportedCacheError for a forward that cannot read this cache."""
        raise UnsupportedCacheError(
            f"This cache holds {self.seen} tokens of a routed forward and cannot be used here: {reason}. Pass an empty "
            "cache (or none) and the whole sequence."
        )

    # ---- lengths: the truth is `seen`, whatever a layer stores

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(key length, key offset) by positions: a sliding layer shows its last `window - 1` positions and the new
        ones."""
        layer: Any = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        window = layer.sliding_window if getattr(layer, "is_sliding", False) else None
        if window is None or self.seen < window:
            return self.seen + query_length, 0
        return window - 1 + query_length, self.seen - window + 1

    def advance(self, tokens: int) -> None:
        """Called once at the end of every forward."""
        self.seen += tokens

    # ---- storing

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        layer, context = self.layers[layer_idx], current()
        if context is None or context.cache is not self:
            self.refuse("only the routed model that it belongs to can continue it")
        if isinstance(layer, SparseLayer):
            layer.begin(self.seen)
        elif self.seen and not layer.is_initialized:
            self._fill_past(layer, key_states, value_states)
        if not self.offloading:
            return layer.update(key_states, value_states, *args, **kwargs)
        if layer.is_initialized:
            # the base class fetches the next layer ahead, which a skipped layer before this one did not
            layer.prefetch()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def second_slot(self, layer_idx: int) -> int:
        """Index of the cache layer of a repeated layer's second pass, which is made when first asked for."""
        if layer_idx not in self.slots:
            self.slots[layer_idx] = len(self.layers)
            slot = copy.copy(self.layers[layer_idx])  # the same kind, window and flags
            slot.reset()
            self.layers.append(slot)
        return self.slots[layer_idx]

    def admit(self, layer_idx: int, rows: Sequence[int]) -> None:
        """Declares the logical rows that a layer holds from now on. Rows that join late (they saw only padding so far,
        in a chunked prefill) get zero keys for that padding, which every mask hides."""
        layer, old = self.layers[layer_idx], self.stored_rows.get(layer_idx)
        self.stored_rows[layer_idx] = list(rows)
        if old is None or old == list(rows) or not layer.is_initialized:
            return
        place = torch.tensor([list(rows).index(row) for row in old], device=layer.keys.device)
        for name in ("keys", "values"):
            tensor = getattr(layer, name)
            grown = tensor.new_zeros(len(rows), *tensor.shape[1:])
            setattr(layer, name, grown.index_copy(0, place, tensor))

    def _fill_past(self, layer: Any, keys: Tensor, values: Tensor) -> None:
        """A layer first used after `seen` tokens: the earlier ones were padding in each row that it now stores."""
        layer.lazy_initialization(keys, values)
        past = self.seen
        if getattr(layer, "is_sliding", False):
            layer.cumulative_length = self.seen
            past = past if layer.record_past else min(past, layer.sliding_window - 1)
        layer.keys = keys.new_zeros(*keys.shape[:2], past, keys.shape[3])
        layer.values = values.new_zeros(*values.shape[:2], past, values.shape[3])

    # ---- rows

    def _take(self, order: list[int], device_order: Tensor) -> None:
        """Logical row `j` becomes what row `order[j]` was, in every layer that stores it."""
        for index, layer in enumerate(self.layers):
            stored = self.stored_rows.get(index)
            physical = device_order
            if stored is not None:
                place = {row: i for i, row in enumerate(stored)}
                self.stored_rows[index] = [j for j, row in enumerate(order) if row in place]
                physical = torch.tensor([place[row] for row in order if row in place], dtype=torch.long)
                if not len(physical):
                    layer.reset()
                    continue
            layer.reorder_cache(physical)
            if isinstance(layer, Room):
                layer.leave()  # before the next layer's rows are copied
        self.memories.take(order)
        self.book.take(order)

    def reorder_cache(self, beam_idx: Any) -> None:
        if self.book.uniform or not self.book.routes:
            # Rows alike: a layer holds all of them or none, so that the order can stay on the device.
            for layer in self.layers:
                layer.reorder_cache(beam_idx)
                if isinstance(layer, Room):
                    layer.leave()
            self.memories.reorder(beam_idx)
        else:
            self._take(beam_idx.tolist(), beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        indices = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        order = [index % len(self.book.decided) for index in indices.tolist()]  # -1 is the last row
        self._take(order, torch.tensor(order, dtype=torch.long))

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = len(self.book.decided)
        order = [row for row in range(rows) for _ in range(repeats)]
        self._take(order, torch.tensor(order, dtype=torch.long))

    # ---- cutting and clearing

    def activate_past_recording(self) -> None:
        super().activate_past_recording()
        self.memories.record()

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise UnsupportedCacheError(
                f"crop({tokens_to_remove}) with a positive count is not supported: pass the negative number of tokens "
                "to remove."
            )
        remaining = max(self.seen + tokens_to_remove, 0)
        if remaining == 0 and tokens_to_remove:
            self.reset()
            return
        memories = self.memories.cropped(-tokens_to_remove)
        if tokens_to_remove and (memories is None or any(_forgot(layer, -tokens_to_remove) for layer in self.layers)):
            raise UnsupportedCacheError(
                "The sliding windows or skip paths of this cache have forgotten what would come back: call "
                "`cache.activate_past_recording()` before the tokens that may be cropped, and crop only what came "
                "since."
            )
        if memories is not None:
            self.memories.restore(memories)
        for layer in self.layers:
            if isinstance(layer, SparseLayer):
                layer.crop_to(remaining)
            elif getattr(layer, "is_initialized", True):
                layer.crop(tokens_to_remove)
        self.seen = remaining

    def reset(self) -> None:
        super().reset()
        self.seen, self.stored_rows = 0, {}
        self.memories.clear()
        self.book.clear()

    # ---- accounting

    @property
    def routes(self) -> dict[Any, list[int]]:
        """Sticky decisions (how often it executes) per site and logical row (sequence granularity)."""
        return self.book.routes

    def reserved_bytes(self) -> int:
        """Bytes of the key and value tensors that are allocated, room for later tokens included."""
        return self._held_bytes() + sum(layer.spare_bytes() for layer in self.layers if isinstance(layer, Room))

    def state_bytes(self) -> int:
        """Bytes that skip paths remember: a constant size a sequence, beside the keys and values."""
        return self.memories.bytes()

    def _held_bytes(self) -> int:
        return sum(
            tensor.numel() * tensor.element_size()
            for layer in self.layers
            for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
            if tensor is not None
        )

    def kv_bytes(self) -> int:
        """Bytes of keys and values of executed rows and tokens (design: Σ over executed sites and rows of dense
        bytes)."""
        total = self._held_bytes()
        for layer in self.layers:
            if isinstance(layer, SparseLayer) and layer.positions is not None and layer.positions.numel():
                bytes_ = (
                    layer.keys.numel() * layer.keys.element_size() + layer.values.numel() * layer.values.element_size()
                )
                total -= bytes_ - bytes_ * layer.stored(self.seen) // layer.positions.numel()
        return total


def _forgot(layer: Any, count: int) -> bool:
    """Has this layer dropped states that it would need again without its last `count` tokens?"""
    if isinstance(layer, SparseLayer):
        return layer.forgot
    if not getattr(layer, "is_sliding", False) or not layer.is_initialized:
        return False
    return layer.keys.shape[2] - count < min(layer.cumulative_length - count, layer.sliding_window - 1)
