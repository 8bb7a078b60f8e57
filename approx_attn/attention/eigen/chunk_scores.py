"""Pieces of score computations on chunks of queries: grouped heads, chosen pairs, row means, sampled pairs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from approx_attn.attention.base import repeat_heads
from approx_attn.attention.mask import AttentionMask, at_least_float32


def grouped_matmul(left: Tensor, right: Tensor) -> Tensor:
    """left @ right where every head of `right` serves a group of heads of `left`, without copies of it.

    Args:
        left: (b, h, n, m).
        right: (b, h_kv, m, p), h_kv a divisor of h.

    Returns:
        (b, h, n, p).
    """
    h, h_kv = left.shape[1], right.shape[1]
    if h == h_kv:
        return left @ right
    b, _, n, m = left.shape
    return (left.reshape(b, h_kv, h // h_kv * n, m) @ right).reshape(b, h, n, -1)


def mean_residual(query: Tensor, key: Tensor, query_low: Tensor, key_low: Tensor, keep: Tensor | None) -> Tensor:
    """Mean over the usable keys of q·k − (qA)·(zB), for any mask: (b, h, c, 1)."""
    key = repeat_heads(key, query.shape[1])
    both = torch.cat([key, key_low], dim=-1)
    if keep is None:
        mean = both.mean(-2, keepdim=True)
    else:
        used = keep.to(both.dtype)  # (b | 1, h | 1, c | 1, n)
        mean = (used @ both) / used.sum(-1, keepdim=True).clamp_min(1.0)
    mean_key, mean_low = mean.split([query.shape[-1], query_low.shape[-1]], dim=-1)
    return at_least_float32((query * mean_key).sum(-1, keepdim=True) - (query_low * mean_low).sum(-1, keepdim=True))


@torch.library.custom_op("approx_attn::kth_largest", mutates_args=())
def kth_largest(values: Tensor, count: Tensor, most: int) -> Tensor:
    """The count-th largest of every row, one operator to compiled graphs.

    Args:
        values: (..., n) float32 or float64.
        count: int64, (..., 1) or broadcastable to it; what is below 1 counts as 1, and above `most` as `most`.
        most: bound on `count`, at most n.

    Returns:
        (..., 1).
    """
    n, count = values.shape[-1], count.clamp(1, most)
    if values.device.type != "cpu":
        return values.topk(most, dim=-1).values.gather(-1, (count - 1).expand(*values.shape[:-1], 1))
    # NumPy selects with vector instructions, ten times faster than torch.topk on a CPU, where selection would take
    # more time than all products together.
    array = values.detach().numpy()
    if count.numel() == 1:
        place = n - int(count)
        return torch.from_numpy(np.partition(array, place, axis=-1)[..., place : place + 1].copy())
    largest = np.sort(np.partition(array, n - most, axis=-1)[..., n - most :], axis=-1)
    return torch.from_numpy(largest).gather(-1, (most - count).expand(*values.shape[:-1], 1))


@kth_largest.register_fake
def _(values: Tensor, count: Tensor, most: int) -> Tensor:
    return values.new_empty(*values.shape[:-1], 1)


def log_mean_exp(scores: Tensor, among: Tensor) -> Tensor:
    """Log of the mean of exp(scores) over the entries in `among`, per row: (b, h, c, 1). Finite for empty rows."""
    closed = scores.masked_fill(~among, torch.finfo(scores.dtype).min / 2)
    return closed.logsumexp(-1, keepdim=True) - among.sum(-1, keepdim=True).clamp_min(1).to(scores.dtype).log()


def sampled_keep(mask: AttentionMask, i: Tensor, j: Tensor, like: Tensor) -> Tensor:
    """Which pairs of sampled queries i and keys j may be used: 0/1 of the shape and type of `like`."""
    keep = torch.ones_like(like, dtype=torch.bool)
    if mask.key_keep is not None:
        keep = keep & mask.key_keep[:, None, None, j]
    if mask.query_keep is not None:
        keep = keep & mask.query_keep[:, None, i, None]
    if mask.causal:
        keep = keep & (j <= i[:, None] + mask.query_offset)
    if mask.window is not None:
        keep = keep & ((j - i[:, None] - mask.query_offset).abs() < mask.window)
    for part in (mask.pair_keep, None if mask.bias is None else mask.bias > torch.finfo(mask.bias.dtype).min):
        if part is not None:
            rows = i if part.shape[-2] > 1 else torch.zeros_like(i)
            columns = j if part.shape[-1] > 1 else torch.zeros_like(j)
            keep = keep & part[..., rows[:, None], columns]
    return keep.to(like.dtype)
