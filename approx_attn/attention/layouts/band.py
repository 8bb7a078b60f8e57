"""Keys near each query, laid out in blocks, so that banded attention is a few dense products.

Queries are cut into blocks of `block` consecutive ones. All keys that any query of a block can see in
the band are laid beside it as one slice of `span = block + before + after` keys, so scores of a band are
an array (b, h, n_blocks, block, span): linear in the number of queries, no n_q x n_k array anywhere.
Slices overlap; a slice that hangs over the ends of the sequence holds zeros there, and `Band.allowed` is
False there.

    band = Band.around(n_q, n_k, before=w, after=w, query_offset=mask.query_offset)
    scores = band.query_blocks(query) @ band.key_blocks(key).transpose(-2, -1)  # (b, h, n_blocks, block, span)
    weights = masked_softmax(scale * scores, band.allowed(mask, query.device))
    output = band.merge_queries(weights @ band.key_blocks(value))  # (b, h, n_q, d_v)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from approx_attn.attention.mask import AttentionMask

MIN_BLOCK = 16  # smaller blocks waste less on keys outside the band, but more on the overhead of small products


@dataclass(frozen=True)
class Band:
    """The keys from `before` positions before to `after` positions after each query.

    Query i stands at position p_i = i + query_offset on the axis of the keys; key j is in its band
    when -before <= j - p_i <= after.

    Attributes:
        n_q, n_k: number of queries and keys.
        before, after: width of the band on either side, in positions.
        block: queries in one block.
        query_offset: position of the first query among the keys.
    """

    n_q: int
    n_k: int
    before: int
    after: int
    block: int
    query_offset: int = 0

    @classmethod
    def around(
        cls, n_q: int, n_k: int, before: int, after: int, *, query_offset: int = 0, block: int | None = None
    ) -> Band:
        """A band no wider than the keys there are; the block size is half the width unless given."""
        before = max(0, min(before, n_q - 1 + query_offset))
        after = max(0, min(after, n_k - 1 - query_offset))
        if block is None:
            block = max(MIN_BLOCK, (before + after) // 2)
        return cls(n_q, n_k, before, after, max(1, min(block, n_q)), query_offset)

    @property
    def n_blocks(self) -> int:
        return -(-self.n_q // self.block)

    @property
    def span(self) -> int:
        """Keys beside one block of queries."""
        return self.block + self.before + self.after

    # -- where things stand --------------------------------------------------------------------------

    def query_positions(self, device: torch.device) -> Tensor:
        """(n_blocks, block) int64 positions on the axis of the keys; the last block may run past the end."""
        return torch.arange(self.n_blocks * self.block, device=device).view(self.n_blocks, -1) + self.query_offset

    def key_positions(self, device: torch.device) -> Tensor:
        """(n_blocks, span) int64 positions; below 0 or at least n_k where a slice hangs over."""
        first = torch.arange(self.n_blocks, device=device) * self.block + self.query_offset - self.before
        return first[:, None] + torch.arange(self.span, device=device)

    # -- laying out and collecting --------------------------------------------------------------------

    def query_blocks(self, x: Tensor) -> Tensor:
        """(..., n_q, d) -> (..., n_blocks, block, d), zeros after the last query."""
        x = F.pad(x, (0, 0, 0, self.n_blocks * self.block - self.n_q))
        return x.unflatten(-2, (self.n_blocks, self.block))

    def merge_queries(self, x: Tensor) -> Tensor:
        """(..., n_blocks, block, d) -> (..., n_q, d), the inverse of `query_blocks`."""
        return x.flatten(-3, -2)[..., : self.n_q, :]

    def key_blocks(self, x: Tensor) -> Tensor:
        """(..., n_k, d) -> (..., n_blocks, span, d), zeros where a slice hangs over the ends."""
        first = self.query_offset - self.before  # position of the first key of the first slice
        stop = first + (self.n_blocks - 1) * self.block + self.span
        inside = x[..., max(first, 0) : max(stop, 0), :]
        left = min(max(-first, 0), stop - first)
        pieces = -(-self.span // self.block)
        rows = (self.n_blocks - 1 + pieces) * self.block
        padded = F.pad(inside, (0, 0, left, rows - left - inside.shape[-2])).unflatten(-2, (-1, self.block))
        # Shifted copies side by side rather than `unfold`, whose compiled backward pass (torch 2.13, CPU, several
        # threads) writes past its array.
        slices = [padded[..., i : i + self.n_blocks, :, :] for i in range(pieces)]
        slices[-1] = slices[-1][..., : self.span - (pieces - 1) * self.block, :]
        return torch.cat(slices, dim=-2)

    def pair_blocks(self, x: Tensor) -> Tensor:
        """(..., n_q | 1, n_k | 1) -> (..., n_blocks, block, span): the band of a dense array over pairs.

        Where a slice hangs over the ends it repeats entries of the ends, which `allowed` closes.
        """
        x = x.expand(*x.shape[:-2], self.n_q, self.n_k)
        positions = self.key_positions(x.device).clamp(0, self.n_k - 1)  # (n_blocks, span)
        return pairs_at(self, x, positions)

    def dense(self, x: Tensor) -> Tensor:
        """(..., n_blocks, block, span), zero outside `allowed` -> (..., n_q, n_k), zeros outside the band."""
        out = x.new_zeros(*x.shape[:-3], self.n_blocks, self.block, self.n_k)
        positions = self.key_positions(x.device).clamp(0, self.n_k - 1)[:, None, :].expand_as(x)
        return self.merge_queries(out.scatter_add(-1, positions, x))

    # -- which pairs count ----------------------------------------------------------------------------

    def allowed(self, mask: AttentionMask, device: torch.device) -> Tensor:
        """(b | 1, h | 1, n_blocks, block, span) bool: in the band, not over the ends, and kept by the mask."""
        key_positions = self.key_positions(device)  # (n_blocks, span)
        distance = key_positions[:, None, :] - self.query_positions(device)[:, :, None]  # (n_blocks, block, span)
        after = 0 if mask.causal else self.after
        inside = (key_positions >= 0) & (key_positions < self.n_k)
        keep = (distance >= -self.before) & (distance <= after) & inside[:, None, :]
        return keep & allowed_in_blocks(self, mask, key_positions)

    def bias(self, mask: AttentionMask) -> Tensor | None:
        """(b | 1, h | 1, n_blocks, block, span) finite additive bias, or None."""
        bias = mask.finite_bias()
        return None if bias is None else self.pair_blocks(bias)

    def pairs(self, mask_causal: bool) -> int:
        """Pairs in the band when nothing is padded: what banded attention computes exactly, one head."""
        after = 0 if mask_causal else self.after
        total = 0
        for i in range(self.n_q):
            first, last = max(i + self.query_offset - self.before, 0), min(i + self.query_offset + after, self.n_k - 1)
            total += max(last - first + 1, 0)
        return total


def pairs_at(band: Band, x: Tensor, positions: Tensor) -> Tensor:
    """Entries of an array over pairs at given keys of each block of queries.

    Args:
        x: (..., n_q | 1, n_k | 1).
        positions: (n_blocks, e) int64 in 0..n_k-1.

    Returns:
        (..., n_blocks, block, e).
    """
    blocks = band.query_blocks(x.expand(*x.shape[:-2], band.n_q, band.n_k))  # (..., n_blocks, block, n_k)
    index = positions[:, None, :].expand(*blocks.shape[:-1], positions.shape[-1])
    return blocks.gather(-1, index)


def allowed_in_blocks(band: Band, mask: AttentionMask, positions: Tensor) -> Tensor:
    """What a mask says of given keys of each block of queries, whether in the band or not.

    Args:
        positions: (n_blocks, e) int64; positions outside 0..n_k-1 get the answer of the nearest key.

    Returns:
        (b | 1, h | 1, n_blocks, block | 1, e) bool.
    """
    nearest = positions.clamp(0, band.n_k - 1)  # (n_blocks, e)
    keep = torch.ones_like(positions, dtype=torch.bool)[None, None, :, None, :]
    if mask.causal:
        keep = keep & (positions[:, None, :] <= band.query_positions(positions.device)[:, :, None])
    if mask.window is not None:
        distance = positions[:, None, :] - band.query_positions(positions.device)[:, :, None]
        keep = keep & (distance.abs() < mask.window)
    if mask.key_keep is not None:
        keep = keep & mask.key_keep[:, nearest][:, None, :, None, :]  # (b, 1, n_blocks, 1, e)
    if not mask.is_structured:
        # Only what is not structured needs a dense array: the caller holds one already.
        unstructured = AttentionMask(pair_keep=mask.pair_keep, bias=mask.bias).dense_keep(
            band.n_q, band.n_k, keep.device
        )
        assert unstructured is not None
        keep = keep & pairs_at(band, unstructured[(None,) * (4 - unstructured.dim())], nearest)
    return keep
