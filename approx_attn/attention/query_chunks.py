"""Queries in chunks over the keys that they may see, and how many of these each query keeps."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from approx_attn.attention.base import resolve_count
from approx_attn.attention.mask import AttentionMask


def keys_per_query(keep: float | int, usable: Tensor) -> Tensor:
    """Number of keys that each query may keep.

    Args:
        keep: share of the usable keys, or a number of keys.
        usable: int64, how many keys the mask leaves each query, any shape.

    Returns:
        int64 of the same shape, at least 1. Counting usable keys rather than the length of the array makes
        a padded input equal the unpadded one.
    """
    if isinstance(keep, int):
        return torch.full_like(usable, keep)
    return (usable.double() * keep).round().long().clamp(min=1)


def kept_pairs(keep: float | int, n_q: int, n_k: int, causal: bool) -> int:
    """Pairs that `keys_per_query` leaves in one head without padding; lower-right aligned when causal."""
    usable = (min(max(i + n_k - n_q + 1, 0), n_k) for i in range(n_q)) if causal else [n_k] * n_q
    return sum(resolve_count(keep, count) if count > 0 else 0 for count in usable)


def query_chunks(n_q: int, n_k: int, chunk_size: int, causal: bool, query_offset: int | None = None) -> list[tuple]:
    """(start, stop, keys): queries start..stop-1 see only the first `keys` keys. Lower-right aligned by default."""
    offset = n_k - n_q if query_offset is None else query_offset
    chunks = []
    for start in range(0, n_q, chunk_size):
        stop = min(start + chunk_size, n_q)
        chunks.append((start, stop, max(1, min(n_k, stop + offset)) if causal else n_k))
    return chunks


def crop_keys(mask: AttentionMask, keys: int, first: int = 0) -> AttentionMask:
    """The mask over keys first..keys-1 only."""

    def columns(part: Tensor | None) -> Tensor | None:
        return part if part is None or part.shape[-1] == 1 else part[..., first:keys]

    return replace(
        mask,
        key_keep=None if mask.key_keep is None else mask.key_keep[:, first:keys],
        pair_keep=columns(mask.pair_keep),
        query_offset=mask.query_offset - first,
        bias=columns(mask.bias),
    )
