"""Token granularity for sublayers that keep keys and values: attention for some tokens, and what becomes of the others'
keys.

Two policies. `project`: skipped tokens still get keys and values (computed by the module's own projections), so nothing
is lost to later tokens. `drop`: skipped tokens are holes; keys are stored with their positions and masks are gathered
by them.

Shape suffixes: n rows with executing tokens, t tokens of the longest of them, S stored keys, K all keys.
A row with fewer than t executing tokens is filled up with tokens that skip; what is computed for those is not used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynadepth.errors import ConfigError
from dynadepth.routing.call import SublayerCall
from dynadepth.routing.context import ForwardContext
from dynadepth.routing.sparse_layer import SparseLayer

if TYPE_CHECKING:
    from dynadepth.routing.sublayer import SublayerState


def sparse_layer(state: SublayerState, context: ForwardContext) -> SparseLayer | None:
    """The `drop` store of this site, if the forward has a cache."""
    if context.cache is None:
        return None
    layer = context.cache.layers[state.site.layer]
    return layer if isinstance(layer, SparseLayer) else None


def has_holes(state: SublayerState, call: SublayerCall, context: ForwardContext) -> bool:
    """Were tokens of this layer skipped, and their keys dropped, before this forward, so that the call's mask does not
    fit the keys that are held? One more token of one sequence sees them all, and needs no mask."""
    store = sparse_layer(state, context)
    if store is None or not store.holes:
        return False
    return call.attention_mask is not None or call.hidden.shape[:2] != (1, 1) or store.is_sliding


def check_mask(mask: Tensor | None) -> None:
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 4):
        raise ConfigError(
            "Token granularity needs 4-D attention masks: load the model with attn_implementation='sdpa' or 'eager', "
            "or route at sequence granularity."
        )


def causal_mask(state: SublayerState, hidden: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Mask `[n, 1, t, K]` for query positions `[n, t]` and key positions `[n or 1, K]`, -1 where there is no key."""
    allowed = ((key[:, None, :] <= query[:, :, None]) & (key >= 0)[:, None, :]).unsqueeze(1)
    return allowed if state.config._attn_implementation != "eager" else _additive(allowed, hidden.dtype)


def mask_among(state: SublayerState, hidden: Tensor, query: Tensor, key: Tensor) -> Tensor | None:
    """The mask of tokens that see one another alone, in their order, where the host has none: there is no padding, no
    window and no packing. None for sdpa, whose causal kernel then skips what a mask would hide; fillers come last."""
    return None if state.config._attn_implementation == "sdpa" else causal_mask(state, hidden, query, key)


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)


def hide_skipped(call: SublayerCall, execute: Tensor, state: SublayerState) -> SublayerCall:
    """The whole call of the masked path with the keys of skipped tokens hidden from every token but themselves."""
    mask, hidden = call.attention_mask, call.hidden
    check_mask(mask)
    length = hidden.shape[1]
    itself = torch.eye(length, dtype=torch.bool, device=hidden.device)
    visible = (execute[:, None, :] | itself).unsqueeze(1)
    if mask is None:
        positions = torch.arange(length, device=hidden.device).unsqueeze(0)
        mask = causal_mask(state, hidden, positions, positions)
    if mask.dtype == torch.bool:
        mask = mask & visible
    else:
        mask = mask.masked_fill(~visible, torch.finfo(mask.dtype).min)
    return SublayerCall(call.forward, call.args, {**call.kwargs, "attention_mask": mask})


class TokenKV:
    """Stands in for the cache in a call for some tokens: takes their keys and values, and returns all that they may
    see."""

    def __init__(
        self, state: SublayerState, context: ForwardContext, rows: Tensor, index: Tensor, shape: torch.Size
    ) -> None:
        self.state, self.context, self.rows, self.index = state, context, rows, index
        self.batch, self.length = shape[0], shape[1]
        self.store = sparse_layer(state, context)
        if self.store is not None:
            self.store.begin(context.past)
        self.skipped: tuple[Tensor, Tensor, Tensor, Tensor] | None = None  # rows, index, keys, values under `project`
        self.new_positions: Tensor | None = None  # [B, t] under `drop`

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values `[n, heads, t, d]` of the executing tokens to `[n, heads, K, d]`."""
        if self.state.kv_policy == "drop":
            keys, values = self._append(keys, values)
        else:
            keys, values = self._merge(keys, values, *args, **kwargs)
        return (keys, values) if len(self.rows) == self.batch else (keys[self.rows], values[self.rows])

    def _merge(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        merged = []
        assert self.skipped is not None
        skip_rows, skip_index, *projected = self.skipped
        for new, skipped in zip((keys, values), projected, strict=True):
            full = skipped.new_empty(self.batch, skipped.shape[1], self.length, skipped.shape[3])
            fill_in(full, skip_rows, skip_index, skipped)  # both sources are right for every token they name
            fill_in(full, self.rows, self.index, new)
            merged.append(full)
        if self.context.cache is None:
            return merged[0], merged[1]
        return self.context.cache.update(merged[0], merged[1], self.state.site.layer, *args, **kwargs)

    def _append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        full_keys, full_values = keys, values
        if len(self.rows) != self.batch:
            full_keys = keys.new_zeros(self.batch, *keys.shape[1:]).index_copy(0, self.rows, keys)
            full_values = values.new_zeros(self.batch, *values.shape[1:]).index_copy(0, self.rows, values)
        if self.store is None:
            return full_keys, full_values
        assert self.new_positions is not None
        return self.store.append(full_keys, full_values, self.new_positions)


def fill_in(full: Tensor, rows: Tensor, index: Tensor, part: Tensor) -> None:
    """Puts keys or values `[n, heads, t, d]` of tokens `index` `[n, t]` of `rows` into all, `[B, heads, T, d]`."""
    full.transpose(1, 2)[rows[:, None], index] = part.transpose(1, 2)


def chosen(execute: Tensor, counts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Of the tokens `execute` `[B, T]` (`counts` per row on the host): the rows `[n]` that have any, theirs in their
    order `[n, t]`, and which of these places hold one, and no filler, bool `[n, t]`."""
    device = execute.device
    order = torch.argsort(execute.to(torch.int8), dim=1, descending=True, stable=True)  # executing tokens first
    rows = torch.tensor([i for i, n in enumerate(counts) if n], dtype=torch.long, device=device)
    longest = max(counts)
    valid = torch.arange(longest, device=device) < torch.tensor(counts, device=device)[rows, None]
    return rows, order[rows, :longest], valid


def project_skipped(
    state: SublayerState, call: SublayerCall, execute: Tensor, counts: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows `[n]`, tokens `[n, t]`, keys and values `[n, heads, t, d]`, by the module's own projections, of what
    is not in `execute` `[B, T]` (`counts` per row on the host)."""
    rows, index, _ = chosen(~execute, [execute.shape[1] - count for count in counts])
    part = call.tokens(rows, index, None)
    assert state.project is not None
    return rows, index, *state.project(part.hidden, part.kwargs.get("position_embeddings"))


def queries_of(mask: Tensor, batch: int, rows: Tensor, index: Tensor) -> Tensor:
    """Of a mask `[B or 1, 1, T, K]` what tokens `index` of `rows` see: `[n, 1, t, K]`."""
    return mask.expand(batch, -1, -1, -1).transpose(1, 2)[rows[:, None], index].transpose(1, 2)


def run_tokens(
    state: SublayerState,
    call: SublayerCall,
    context: ForwardContext,
    execute: Tensor,
    counts: list[int],
    weight: Tensor | None = None,
) -> Any:
    """Runs the base module for the tokens `execute` (`[B, T]`, `counts` per row on the host) and skips the others.

    `weight`: float32 `[B, T]`, the factor of what the executing ones contribute; None: 1.
    """
    hidden, mask = call.hidden, call.attention_mask
    check_mask(mask)
    batch, length = hidden.shape[:2]
    device = hidden.device
    if not any(counts):
        if (store := sparse_layer(state, context)) is not None:
            store.holes = True
        elif state.kv_policy == "project" and context.cache is not None:
            assert state.project is not None
            keys, values = state.project(hidden, call.kwargs.get("position_embeddings"))
            context.cache.update(keys, values, state.site.layer)
        return state.skip_all(call, context)
    rows, index, valid = chosen(execute, counts)
    longest = index.shape[1]
    kv = TokenKV(state, context, rows, index, hidden.shape)
    if state.kv_policy == "project":
        kv.skipped = project_skipped(state, call, execute, counts)
    elif kv.store is not None:
        kv.store.holes = True

    query = context.past + index
    if state.kv_policy == "drop":
        positions = torch.full((batch, longest), -1, dtype=torch.long, device=device)
        positions[rows] = torch.where(valid, query, -1)
        kv.new_positions = positions
        earlier = None if kv.store is None else kv.store.positions
        alone = earlier is None
        key_positions = (positions if earlier is None else torch.cat([earlier, positions], 1))[rows]
    else:
        alone = False
        key_positions = torch.arange(context.past + length, device=device).unsqueeze(0)
    if mask is None:
        gathered = (mask_among if alone else causal_mask)(state, hidden, query, key_positions)
    else:
        gathered = queries_of(mask, batch, rows, index)
        if state.kv_policy == "drop":
            gathered = gather_keys(gathered, key_positions, state, context, length)
    context.running[state.site.layer] = valid
    result = call.tokens(rows, index, gathered).with_cache(kv)()
    return put_back(state, call, context, execute, result, rows, index, valid, key_positions, weight)


def put_back(
    state: SublayerState,
    call: SublayerCall,
    context: ForwardContext,
    execute: Tensor,
    result: Any,
    rows: Tensor,
    index: Tensor,
    valid: Tensor,
    key_positions: Tensor,
    weight: Tensor | None,
) -> Any:
    """What the module returned for tokens `index` of `rows` (of which `valid` were to execute) as its output for all
    tokens."""
    hidden = call.hidden
    output = state.target.canvas(hidden)
    place(state, hidden, output, result, rows, index, valid, weight)
    output = finished(state, hidden, output, execute, context)
    return state.wrap(output, _full_weights(state, context, result, rows, index, valid, key_positions, hidden.shape))


def place(
    state: SublayerState,
    hidden: Tensor,
    output: Tensor,
    result: Any,
    rows: Tensor,
    index: Tensor,
    valid: Tensor,
    weight: Tensor | None,
) -> None:
    """Puts what the module returned for tokens `index` of `rows` into the `output` `[B, T, D]` of all tokens, where
    `valid`."""
    executed = state.hidden_of(result)
    if weight is not None:
        executed = state.target.weighted(hidden[rows[:, None], index], executed, weight[rows[:, None], index])
    executed = executed.to(output.dtype)
    if len(rows) > 1:  # one row has no fillers
        executed = torch.where(valid.unsqueeze(-1), executed, output[rows[:, None], index])
    output[rows[:, None], index] = executed


def finished(state: SublayerState, hidden: Tensor, output: Tensor, execute: Tensor, context: ForwardContext) -> Tensor:
    """The output of executing tokens with the skip path's part for the others."""
    contribution = state.contribution(hidden, context)
    if contribution is None:
        return output
    return state.blend(output, state.target.skipped(hidden, contribution), execute, context)


def gather_keys(mask: Tensor, positions: Tensor, state: SublayerState, context: ForwardContext, length: int) -> Tensor:
    """Columns of a mask `[n, 1, t, K]` at stored key positions `[n, S]`; what has left a sliding window is hidden."""
    offset = 0 if context.cache is None else context.cache.get_mask_sizes(length, state.site.layer)[1]
    columns = positions - offset
    visible = (columns >= 0)[:, None, None, :]
    index = columns.clamp(min=0)[:, None, None, :].expand(*mask.shape[:3], -1)
    gathered = mask.gather(3, index)
    if mask.dtype == torch.bool:
        return gathered & visible
    return gathered.masked_fill(~visible, torch.finfo(mask.dtype).min)


def _full_weights(
    state: SublayerState,
    context: ForwardContext,
    result: Any,
    rows: Tensor,
    index: Tensor,
    valid: Tensor,
    key_positions: Tensor,
    shape: torch.Size,
) -> Tensor | None:
    """Attention weights of the executing tokens as those of all tokens over all keys, zeros elsewhere."""
    if not state.wants_weights(context):
        return None
    keys = state.key_length(shape[1], context)
    offset = context.past + shape[1] - keys

    def fix(weights: Tensor) -> Tensor:
        full = weights.new_zeros(shape[0], shape[1], weights.shape[1], keys)
        part = weights.transpose(1, 2) * valid[:, :, None, None]  # [n, t, heads, S]
        if part.shape[-1] != keys or state.kv_policy == "drop":
            columns = key_positions - offset
            part = part * (columns >= 0)[:, None, None, :]
            place = columns.clamp(min=0)[:, None, None, :].expand_as(part)
            part = part.new_zeros(*part.shape[:3], keys).scatter_add(3, place, part)
        full[rows[:, None], index] = torch.where(valid[:, :, None, None], part, full[rows[:, None], index])
        return full.transpose(1, 2)

    if state.target.name == "block":
        context.attention_fixes[state.site.layer] = fix
        return None
    return fix(result[1])
