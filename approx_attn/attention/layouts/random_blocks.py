"""Random blocks of keys for each block of queries: the third part of BigBird's pattern, beside window and globals.

Zaheer et al.: *Big Bird: Transformers for Longer Sequences*, arXiv 2007.14062.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from approx_attn.attention.mask import AttentionMask
from approx_attn.errors import require_count


@dataclass(frozen=True)
class RandomBlocks:
    """`count` random key blocks for the queries that stand in one block of positions, in each head.

    The choice is a fixed function of seed, head and position, not of the lengths: of all blocks of keys in a
    fixed random order, the first ones before the last usable key. So an input comes out the same whether padded
    on the right or not, and a token of a causal text the same whatever follows. Padding on the left moves
    tokens into other blocks, of which others are chosen.

    Attributes:
        count: r, key blocks per query block.
        block_size: positions in one block.
        seed: of the order.
    """

    count: int
    block_size: int
    seed: int

    def __post_init__(self) -> None:
        require_count("attention.random_blocks", self.count, 0)
        require_count("attention.block_size", self.block_size)
        require_count("attention.seed", self.seed, 0)

    @property
    def width(self) -> int:
        """e = r·block_size, random keys per query."""
        return self.count * self.block_size

    def choose(
        self, heads: int, n_q: int, n_k: int, mask: AttentionMask, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """The key blocks of each query block.

        Returns:
            index: (b | 1, h, n_query_blocks, r) int64 number of a key block.
            is_open: the same shape, bool, False where there are fewer usable blocks than r.
        """
        first = mask.query_offset // self.block_size  # block of positions in which the first query stands
        n_query_blocks = (mask.query_offset + n_q - 1) // self.block_size - first + 1
        queries = torch.arange(n_query_blocks, device=device)[:, None] + first  # (n_query_blocks, 1)
        keys = torch.arange(max(-(-n_k // self.block_size), self.count), device=device)  # (n_key_blocks,)
        head = scrambled(torch.arange(heads, device=device) + 7919 * self.seed)[:, None, None]
        order = scrambled(scrambled(head + queries + 2**20) + keys)  # (h, n_query_blocks, n_key_blocks)
        end = torch.full((1,), n_k, device=device)
        if mask.key_keep is not None:
            end = (mask.key_keep * torch.arange(1, n_k + 1, device=device)).amax(dim=-1)  # (b,) after the last key
        usable = keys * self.block_size < end[:, None, None, None]  # (b | 1, 1, 1, n_key_blocks)
        usable = usable & ((keys < queries) if mask.causal else (keys != queries))  # its own block is in the window
        lowest = order.masked_fill(~usable, 2**31).topk(self.count, dim=-1, largest=False)
        return lowest.indices, lowest.values < 2**31

    # -- between queries in order and queries in blocks of positions --------------------------------------

    def query_blocks(self, x: Tensor, query_offset: int) -> Tensor:
        """(..., n_q, d) -> (..., n_query_blocks, block_size, d), zeros before the first and after the last query."""
        lead = query_offset % self.block_size
        tail = -(x.shape[-2] + lead) % self.block_size
        return F.pad(x, (0, 0, lead, tail)).unflatten(-2, (-1, self.block_size))

    def merge_queries(self, x: Tensor, n_q: int, query_offset: int) -> Tensor:
        """(..., n_query_blocks, block_size, d) -> (..., n_q, d)."""
        lead = query_offset % self.block_size
        return x.flatten(-3, -2)[..., lead : lead + n_q, :]

    def take(self, x: Tensor, index: Tensor) -> Tensor:
        """(b, h, n_k, d) and (b | 1, h, n_query_blocks, r) -> (b, h, n_query_blocks, r·block_size, d)."""
        missing = max(-(-x.shape[-2] // self.block_size), self.count) * self.block_size - x.shape[-2]
        blocks = F.pad(x, (0, 0, 0, missing)).unflatten(-2, (-1, self.block_size))
        blocks = blocks.flatten(-2)  # (b, h, n_key_blocks, block_size·d)
        rows = index.flatten(2)[..., None].expand(x.shape[0], -1, -1, blocks.shape[-1])
        chosen = blocks.gather(2, rows)  # (b, h, n_query_blocks·r, block_size·d)
        return chosen.view(*x.shape[:2], index.shape[2], self.width, x.shape[-1])

    def positions(self, index: Tensor, n_q: int, query_offset: int) -> Tensor:
        """(b | 1, h, n_query_blocks, r) -> (b | 1, h, n_q, e): the random keys of each query, by position."""
        inside = torch.arange(self.block_size, device=index.device)
        keys = (index[..., None] * self.block_size + inside).flatten(-2)  # (b | 1, h, n_query_blocks, e)
        rows = keys[..., None, :].expand(*keys.shape[:-1], self.block_size, -1)
        return self.merge_queries(rows, n_q, query_offset)

    def allowed(self, positions: Tensor, is_open: Tensor, n_k: int, mask: AttentionMask) -> Tensor:
        """(b | 1, h, n_q, e) bool: which random keys of each query exist and are kept by the mask."""
        n_q = positions.shape[-2]
        rows = is_open.repeat_interleave(self.block_size, dim=-1)[..., None, :]  # (b | 1, h, n_query_blocks, 1, e)
        rows = rows.expand(*rows.shape[:-2], self.block_size, -1)
        return self.merge_queries(rows, n_q, mask.query_offset) & allowed_at(mask, positions, n_k)


def allowed_at(mask: AttentionMask, positions: Tensor, n_k: int) -> Tensor:
    """What a mask over n_k keys says of the keys (b | 1, h | 1, n_q, e) of each query; False for those past the end."""
    n_q = positions.shape[-2]
    keep = positions < n_k
    allowed = mask.dense_keep(n_q, n_k, positions.device) if not mask.is_structured else None
    if allowed is not None:
        return keep & gather_pairs(allowed, positions)
    if mask.key_keep is not None:
        keep = keep & gather_pairs(mask.key_keep[:, None, None, :], positions)
    if mask.causal:
        keep = keep & (positions <= mask.query_positions(n_q, positions.device)[:, None])
    if mask.window is not None:
        keep = keep & ((positions - mask.query_positions(n_q, positions.device)[:, None]).abs() < mask.window)
    return keep


def gather_pairs(x: Tensor, positions: Tensor) -> Tensor:
    """Entries of (b | 1, h | 1, n_q | 1, n_k | 1) at the keys (b | 1, h, n_q, e) of each query; ends repeated."""
    n_k = x.shape[-1]
    shape = torch.broadcast_shapes(x.shape[:-1], positions.shape[:-1])
    index = positions.clamp(max=n_k - 1).expand(*shape, -1)
    return x.expand(*shape, -1).gather(-1, index)


def scrambled(x: Tensor) -> Tensor:
    """A fixed pseudo-random int64 in 0..2³¹-1 for each whole number: multiply, shift and mix, three times over."""
    x = x & 0x7FFFFFFF
    for factor in (0x2C1B3C6D, 0x297A2D39, 0x1B873593):
        x = ((x ^ (x >> 15)) * factor) & 0x7FFFFFFF
    return x ^ (x >> 15)
