"""Queries routed to blocks of keys: dense products per block, whatever blocks each query has chosen.

The queries that chose a block are laid beside it in tiles of a few rows, so that a sparse choice becomes dense products
(tiles, rows, block), n·m·block scores for m blocks per query, and a query is copied once per block, not once per key.
The blocks of one query meet afterwards by the logarithms of their sums of exponentials. The backward pass computes the
scores again, as in FlashAttention (Dao et al., arXiv 2205.14135): what is held in between is linear in the routes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from approx_attn.attention.mask import at_least_float32

LEAST_TILE, LARGEST_TILE = 16, 64
"""Rows of a tile: few waste less on the last tile of a block, many make larger products."""
CHUNK = 2**18  # scores computed at once: they stay in the cache of one core


def in_blocks(x: Tensor, block_size: int) -> Tensor:
    """(..., n, d) -> (..., n_blocks, block, d), zeros after the last row."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % block_size)).unflatten(-2, (-1, block_size))


def open_keys(key_keep: Tensor | None, n_k: int, block_size: int, device: torch.device) -> Tensor:
    """(b | 1, n_blocks, block) bool: the keys of each block that exist and are not padded."""
    keep = torch.ones(1, n_k, dtype=torch.bool, device=device) if key_keep is None else key_keep
    return F.pad(keep, (0, -n_k % block_size)).unflatten(-1, (-1, block_size))


def blocks_per_query(budget: float | int, block_size: int, usable: Tensor) -> Tensor:
    """Number of blocks that each query may choose of those it can use (int64, any shape), rounded up, at least 1."""
    if isinstance(budget, int):
        return torch.full_like(usable, -(-budget // block_size))
    return (usable.double() * budget - 1e-9).ceil().long().clamp(min=1)


def most_blocks(budget: float | int, block_size: int, n_blocks: int) -> int:
    """`blocks_per_query` of a query that can use all blocks, as a plain number, which shapes may depend on."""
    return min(n_blocks, -(-budget // block_size) if isinstance(budget, int) else math.ceil(n_blocks * budget - 1e-9))


def unpadded_routes(
    budget: float | int, block_size: int, n_q: int, n_k: int, causal: bool, least: int = 1
) -> tuple[Tensor, Tensor]:
    """Number of blocks of each query, at least `least` where there are so many, and of keys that it sees in them.

    Of one head without padding, lower-right aligned if causal. The query's own block is among the blocks; if not
    causal, blocks are of the mean size.

    Returns:
        (n_q,) int64 and (n_q,) float64.
    """
    position, n_blocks = torch.arange(n_q) + n_k - n_q, -(-n_k // block_size)
    usable = (position // block_size + 1).clamp(min=0) if causal else torch.full_like(position, n_blocks)
    count = torch.minimum(blocks_per_query(budget, block_size, usable).clamp(min=least), usable)
    if not causal:
        return count, count.double() * n_k / n_blocks
    behind = usable * block_size - (position + 1).clamp(min=0)  # keys of its own block that come later
    return count, (count * block_size - behind).double()


@torch.no_grad()
def choose_blocks(scores: Tensor, forced: Tensor, usable: Tensor, count: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The forced blocks of each query and then those of the largest scores.

    Args:
        scores: (b, h, n_q, n_blocks), in at least float32.
        forced, usable: bool that broadcast to them; a block that is not usable is never open.
        count: int64, (b | 1, 1, n_q | 1, 1), blocks of each query.
        most: the largest count.

    Returns:
        block: (b, h, n_q, m) int64, distinct blocks, and is_open: the same shape, bool.
    """
    ranked = scores.masked_fill(forced, float("inf")).masked_fill(~usable, float("-inf"))
    best, block = ranked.topk(min(most, scores.shape[-1]), dim=-1)
    return block, (torch.arange(block.shape[-1], device=block.device) < count) & (best > float("-inf"))


@torch.compiler.disable
def routed_attention(
    query: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    keys_open: Tensor,
    block: Tensor,
    is_open: Tensor,
    *,
    dropout_p: float = 0.0,
    causal_offset: int | None = None,
) -> Tensor:
    """Softmax attention of each query over the keys of its blocks together.

    Args:
        query: (b, h, n_q, d), scaled.
        key_blocks, value_blocks: (b, h_kv, n_blocks, block, d) and (..., d_v).
        keys_open: (b | 1, h_kv | 1, n_blocks, block) bool, False for keys that nobody may use.
        block, is_open: (b, h, n_q, m), the blocks of each query, distinct, and which of them count.
        dropout_p: probability of dropping a weight.
        causal_offset: position of the first query; later keys than a query's position are closed. None for all open.

    Returns:
        (b, h, n_q, d_v) in at least float32; zeros for a query without an open key. Gradient flows through scores
        and values, not through the choice.
    """
    shape = key_blocks.shape[:4]
    closed = None
    if not bool(keys_open.all()):
        closed = ~keys_open.expand(shape).reshape(-1, shape[-1])
    tiles = lay_out(block, is_open, shape, closed, causal_offset)
    rows = query.reshape(-1, query.shape[-1])
    with torch.autocast(query.device.type, enabled=False):  # the products are in the type of what was given
        output = _Routed.apply(rows, key_blocks.flatten(0, 2), value_blocks.flatten(0, 2), tiles, dropout_p)
    return output.view(*query.shape[:3], -1)


# -- tiles -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiles:
    """Which queries stand beside which blocks. Queries are b·h·n_q rows, blocks b·h_kv·n_blocks.

    Attributes:
        rows: (t, tile) int64, the query in each row of a tile; any where `is_row` is False.
        is_row: (t, tile) bool.
        block: (t,) int64, the block beside each tile.
        place: (b·h·n_q, m) int64, the row t·tile of each route; the one after the last if it is not open.
        closed: (b·h_kv·n_blocks, block) bool, the keys that nobody may use, or None.
        n_q, n_blocks, block_size: queries and blocks of one sequence, and keys of a block.
        on_edge: (t,) bool, tiles in which some query may not see some key for what is causal, or None.
        offset: position of the first query, where it is causal.
    """

    rows: Tensor
    is_row: Tensor
    block: Tensor
    place: Tensor
    closed: Tensor | None
    n_q: int
    n_blocks: int
    block_size: int
    on_edge: Tensor | None = None
    offset: int = 0

    def chunks(self) -> Iterator[tuple[Tensor, bool]]:
        """Numbers of tiles that are computed at once, and whether they are on the causal edge."""
        count = max(1, CHUNK // (self.rows.shape[1] * self.block_size))
        if self.on_edge is None:
            parts = [(torch.arange(len(self.rows), device=self.rows.device), False)]
        else:
            parts = [(self.on_edge.nonzero()[:, 0], True), ((~self.on_edge).nonzero()[:, 0], False)]
        for numbers, edge in parts:
            for part in numbers.split(count):
                if len(part) > 0:
                    yield part, edge

    def scores(self, numbers: Tensor, edge: bool, query: Tensor, key: Tensor) -> Tensor:
        """(c, tile, block) in at least float32, minus infinity where closed; query (c, tile, d), key (c, block, d)."""
        scores = at_least_float32(query @ key.transpose(-2, -1))
        if self.closed is not None:
            scores.masked_fill_(self.closed[self.block[numbers]][:, None, :], float("-inf"))
        if edge:
            inside = torch.arange(self.block_size, device=scores.device)
            keys = (self.block[numbers] % self.n_blocks * self.block_size)[:, None] + inside  # (c, block)
            queries = self.rows[numbers] % self.n_q + self.offset  # (c, tile)
            scores.masked_fill_(keys[:, None, :] > queries[:, :, None], float("-inf"))
        return scores


def lay_out(
    block: Tensor, is_open: Tensor, shape: tuple[int, ...], closed: Tensor | None, causal_offset: int | None
) -> Tiles:
    """Sort the routes (b, h, n_q, m) by block, a counting sort; `shape` is (b, h_kv, n_blocks, block)."""
    n_q, m, device = *block.shape[-2:], block.device
    n_blocks, block_size = shape[2:]
    block, is_open = (x.reshape(shape[0] * shape[1], -1, m) for x in (block, is_open))  # (s, queries, m)
    s, queries = block.shape[:2]
    tile = LEAST_TILE
    while tile < LARGEST_TILE and 8 * tile <= queries * m // n_blocks:  # an eighth of the rows that a block has
        tile *= 2
    chosen = torch.zeros(s, queries, n_blocks, dtype=torch.int32, device=device)
    rank = chosen.scatter_(-1, block, is_open.int()).cumsum(dim=1, dtype=torch.int32)  # from 1, among rows of its block
    tiles_of = (rank[:, -1].long() + tile - 1).flatten() // tile  # (s·n_blocks,)
    total = int(tiles_of.sum())
    first = tiles_of.cumsum(dim=0) - tiles_of  # tile
    block_row = torch.arange(s, device=device)[:, None, None] * n_blocks + block
    place = first[block_row] * tile + rank.gather(-1, block).long() - 1
    place = place.masked_fill(~is_open, total * tile).view(-1, m)

    rows = torch.full((total * tile + 1,), -1, device=device)
    rows.scatter_(0, place.flatten(), torch.arange(s * queries, device=device).repeat_interleave(m))
    rows = rows[:-1].view(total, tile)
    is_row, rows = rows >= 0, rows.clamp(min=0)
    block_of = torch.repeat_interleave(torch.arange(s * n_blocks, device=device), tiles_of, output_size=total)
    on_edge = None
    if causal_offset is not None:
        last = (block_of % n_blocks + 1) * block_size - 1  # key
        on_edge = ((rows % n_q + causal_offset < last[:, None]) & is_row).any(dim=-1)
    sizes = (n_q, n_blocks, block_size)
    return Tiles(rows, is_row, block_of, place, closed, *sizes, on_edge, causal_offset or 0)


# -- the computation -------------------------------------------------------------------------------------


class _Routed(torch.autograd.Function):
    """Attention of the rows of all tiles, the parts of one query put together."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tiles: Tiles, dropout_p: float) -> Tensor:
        """(r, d), (blocks, block, d), (blocks, block, d_v) -> (r, d_v)."""
        dtype = at_least_float32(query[:0]).dtype
        lowest, tiny = torch.finfo(dtype).min, torch.finfo(dtype).tiny
        (t, tile), end = tiles.rows.shape, tiles.rows.numel()
        parts = query.new_zeros(end + 1, value.shape[-1], dtype=dtype)  # closed routes are at the end: nothing
        log_sums = query.new_full((end + 1,), float("-inf"), dtype=dtype)
        by_tile, sums_by_tile = (x[:end].unflatten(0, (t, tile)) for x in (parts, log_sums))
        kept = query.new_empty(t, tile, tiles.block_size, dtype=torch.bool) if dropout_p > 0.0 else None
        for numbers, edge in tiles.chunks():
            block = tiles.block[numbers]
            weights = tiles.scores(numbers, edge, query[tiles.rows[numbers]], key[block])  # (c, tile, block)
            top = weights.amax(dim=-1, keepdim=True).clamp_(min=lowest)  # finite where all keys are closed
            total = weights.sub_(top).exp_().sum(dim=-1, keepdim=True)
            sums_by_tile[numbers] = (top + total.log()).squeeze(-1)
            weights.div_(total.clamp_(min=tiny))  # before the product with the values, which 16 bits might not hold
            if kept is not None:
                kept[numbers] = keep = torch.rand_like(weights) >= dropout_p
                weights.mul_(keep).mul_(dropout_factor(dropout_p))
            by_tile[numbers] = (weights.to(value.dtype) @ value[block]).to(dtype)
        share = log_sums[tiles.place]  # (r, m)
        top = share.amax(dim=-1, keepdim=True).clamp_(min=lowest)
        total = share.sub_(top).exp_().sum(dim=-1, keepdim=True)
        share.div_(total.clamp(min=tiny))
        output = (share[:, None, :] @ parts[tiles.place]).squeeze(-2)
        log_sum = (top + total.log()).squeeze(-1)
        log_sum = log_sum.masked_fill(total.squeeze(-1) == 0, float("inf"))  # weights of such a query are zero
        ctx.save_for_backward(query, key, value, output, log_sum, kept)
        ctx.tiles, ctx.dropout_p = tiles, dropout_p
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sum, kept = ctx.saved_tensors
        tiles, kind, dtype = ctx.tiles, value.dtype, output.dtype
        end = tiles.rows.numel()
        mean = (grad_output * output).sum(dim=-1)  # (r,), of the gradients of a query's weights
        log_sum = log_sum[tiles.rows].masked_fill(~tiles.is_row, float("inf"))  # (t, tile)
        grad_output = grad_output.to(kind)
        parts = query.new_zeros(end + 1, query.shape[-1], dtype=dtype)
        by_tile = parts[:end].unflatten(0, tiles.rows.shape)
        grad_key, grad_value = (torch.zeros_like(x, dtype=dtype) for x in (key, value))
        for numbers, edge in tiles.chunks():
            block, rows = tiles.block[numbers], tiles.rows[numbers]
            q, k, grad = query[rows], key[block], grad_output[rows]
            weights = tiles.scores(numbers, edge, q, k).sub_(log_sum[numbers][..., None]).exp_()
            grads = at_least_float32(grad @ value[block].transpose(-2, -1))  # (c, tile, block) of the weights
            applied = weights
            if kept is not None:
                factor = kept[numbers] * dropout_factor(ctx.dropout_p)
                applied, grads = weights * factor, grads * factor
            grad_value.index_add_(0, block, (applied.to(kind).transpose(-2, -1) @ grad).to(dtype))
            grads = grads.sub_(mean[rows][..., None]).mul_(weights).to(kind)  # of the scores
            by_tile[numbers] = (grads @ k).to(dtype)
            grad_key.index_add_(0, block, (grads.transpose(-2, -1) @ q).to(dtype))
        grad_query = parts[tiles.place].sum(dim=-2)
        return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(kind), None, None


def dropout_factor(dropout_p: float) -> float:
    """What the weights that are not dropped are multiplied by."""
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
