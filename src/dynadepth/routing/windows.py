"""Windowed pooling: a prompt as a few contiguous windows, each the mean of its tokens (Dr.LLM, arXiv 2510.12773)."""

from __future__ import annotations

import torch
from torch import Tensor


def pool_windows(hidden: Tensor, mask: Tensor | None, windows: int) -> Tensor:
    """Hidden states `[B, T, D]` to `[B, W, D]` float32: means of W windows over the tokens of `mask` (bool `[B, T]`;
    None: all).

    A row of n tokens has windows of ⌊n / W⌋, as in the paper: the last n mod W tokens are in none. A row of fewer than
    W tokens has windows of one token, some of them twice. Sums of bfloat16 states without padding are rounded once to
    bfloat16, those under a mask are not.
    """
    tokens = hidden.shape[1]
    place = torch.arange(windows, device=hidden.device)
    if mask is None:
        length = tokens // windows
        if length == 0:
            return hidden[:, place * tokens // windows].float()
        parts = hidden[:, : length * windows].unflatten(1, (windows, length))
        total = parts.sum(2) if hidden.dtype == torch.bfloat16 else parts.float().sum(2)
        return total.float() / length
    count = mask.sum(1, keepdim=True)  # [B, 1]
    length_B1 = (count // windows).clamp(min=1)
    start_BW = torch.where(count >= windows, place * length_B1, place * count // windows)
    rank_BT = mask.cumsum(1) - 1
    after_BWT = rank_BT[:, None, :] - start_BW[:, :, None]
    inside_BWT = (after_BWT >= 0) & (after_BWT < length_B1[:, :, None])
    # Padding adds zeros. What it computes may be nan, which no weight of zero hides.
    states = hidden.to(torch.float32, copy=True).masked_fill_(~mask.unsqueeze(-1), 0)
    return torch.bmm(inside_BWT.float(), states) / length_B1[:, :, None]
