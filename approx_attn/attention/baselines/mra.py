"""Attention at two resolutions: exact in the best blocks of pairs, one number per block elsewhere.

Zeng, Pal, Kline, Fung, Singh: *Multi Resolution Analysis (MRA) for Approximate Self-Attention*,
arXiv 2207.10284; this is its MRA-2 and, with the rest dropped, MRA-2-s.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from approx_attn.attention.base import AttentionMechanism, Capabilities, Cost, Request, apply_dropout
from approx_attn.attention.budget import require_budget, resolve_count
from approx_attn.attention.mask import at_least_float32
from approx_attn.attention.registry import register_attention
from approx_attn.attention.shape import AttentionShape
from approx_attn.errors import require_count, require_one_of


@register_attention("mra")
class MRAAttention(AttentionMechanism):
    """MRA-2: the pairs are cut into blocks; a block's score is the product of its mean query and mean key.

    The blocks with the largest scores, over the whole matrix of a head, are computed exactly. In the others
    every pair has the weight exp of the block's score (`rest="coarse"`), or none (`rest="drop"`). One softmax
    normaliser covers both. The mean of a block of queries reads queries that come later, so it is not causal.
    Means are over `mask.query_keep`; where that is missing, queries as many as the keys are taken for the same
    tokens, so for cross-attention give it. Blocks are cut at fixed positions: padding on the right changes nothing,
    padding on the left moves tokens between blocks.

    Args:
        keep: exact blocks: fraction of all blocks (float), or keys per query on average (int), rounded up to blocks.
        block_size: b, queries and keys on a side of a block; the last one may be smaller.
        rest: what the other blocks contribute, `coarse` or `drop`.
    """

    capabilities = Capabilities(causal=False, arbitrary_mask=False, returns_weights=False, independent_queries=False)
    cost_formula = "keep·n²·d + (n/b)²·d"

    def __init__(
        self,
        shape: AttentionShape,
        *,
        keep: float | int = 0.25,
        block_size: int = 16,
        rest: str = "coarse",
    ) -> None:
        super().__init__(shape)
        self.keep = require_budget("attention.keep", keep)
        self.block_size = require_count("attention.block_size", block_size)
        self.rest = require_one_of("attention.rest", rest, ("coarse", "drop"))

    @classmethod
    def full_budget(cls, length: int, head_dim: int) -> dict[str, float]:
        return {"keep": 1.0}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> tuple[Tensor, Tensor | None]:
        mask, scale, dropout_p, _ = request
        if mask.query_keep is not None:  # whatever stands there must not reach a gradient, not even as 0 · NaN
            query = query.masked_fill(~mask.query_keep[:, None, :, None], 0.0)
        queries = cut(query, mask.real_queries(query.shape[-2]), self.block_size)
        keys = cut(key, mask.key_keep, self.block_size)
        values = cut(value, mask.key_keep, self.block_size)
        coarse = at_least_float32((queries.mean * scale) @ keys.mean.transpose(-2, -1))  # (b, h, n_bq, n_bk)
        row, column, is_open = self._choose(coarse, queries.length > 0, keys.length > 0)  # (b, h, m)

        # Logarithms of the weights: (b, h, m, block, block) in the chosen blocks, one number in each other.
        exact = at_least_float32(take(queries.x * scale, row) @ take(keys.x, column).transpose(-2, -1))
        keep = keys.keep[:, None].expand(*coarse.shape[:2], -1, -1)  # (b, h, n_bk, block)
        keep_exact = (take(keep, column) & is_open[..., None])[..., None, :]  # (b, h, m, 1, block)
        keep_coarse = self._rest(coarse, row, column, is_open) & (keys.length > 0)[:, None, None, :]
        lowest = torch.finfo(coarse.dtype).min
        exact, coarse = exact.masked_fill(~keep_exact, lowest), coarse.masked_fill(~keep_coarse, lowest)

        # Subtract the largest logarithm of each row of pairs, over chosen and other blocks together.
        index = row[..., None].expand(*row.shape, self.block_size)  # (b, h, m, block)
        top = coarse.detach().amax(dim=-1, keepdim=True).expand(-1, -1, -1, self.block_size)  # (b, h, n_bq, block)
        top = top.scatter_reduce(2, index, exact.detach().amax(dim=-1), "amax")
        exact = (exact - take(top, row)[..., None]).exp().masked_fill(~keep_exact, 0.0)
        coarse = (coarse[..., None, :] - top[..., None]).exp()  # (b, h, n_bq, block, n_bk)
        coarse = coarse.masked_fill(~keep_coarse[..., None, :], 0.0)

        # Normalised before the products with the values, which could overflow in 16 bits.
        coarse = coarse * keys.length[:, None, None, None, :]  # of all keys of a block together
        total = coarse.sum(dim=-1).scatter_add(2, index, exact.sum(dim=-1))
        total = total.masked_fill(total == 0, 1.0)[..., None]  # (b, h, n_bq, block, 1)
        weights = (coarse / total, exact / take(total, row))
        coarse, exact = (apply_dropout(w, dropout_p).to(value.dtype) for w in weights)
        output = at_least_float32(coarse @ values.mean[:, :, None])  # (b, h, n_bq, block, d_v)
        near = at_least_float32(exact @ take(values.x, column))  # (b, h, m, block, d_v)
        output = output.scatter_add(2, index[..., None].expand_as(near), near)
        return output.flatten(2, 3)[:, :, : query.shape[-2]], None

    def _rest(self, coarse: Tensor, row: Tensor, column: Tensor, is_open: Tensor) -> Tensor:
        """(b, h, n_bq, n_bk) bool: the blocks that contribute at the coarse resolution."""
        if self.rest == "drop":
            return torch.zeros_like(coarse, dtype=torch.bool)
        rest = torch.ones_like(coarse, dtype=torch.bool).flatten(2)
        return rest.scatter(2, row * coarse.shape[-1] + column, ~is_open).view_as(coarse)

    @torch.no_grad()
    def _choose(self, coarse: Tensor, has_queries: Tensor, has_keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The blocks to compute exactly.

        Args:
            coarse: (b, h, n_bq, n_bk) scores of the blocks.
            has_queries, has_keys: (b | 1, n_bq) and (b | 1, n_bk) bool, False for blocks of padding only.

        Returns:
            row, column: (b, h, m) int64, block of queries and block of keys, best first.
            is_open: (b, h, m) bool, False beyond the budget of a sample that is shorter than its batch.
        """
        usable = has_queries[:, None, :, None] & has_keys[:, None, None, :]  # (b | 1, 1, n_bq, n_bk)
        n_bq, n_bk = coarse.shape[-2:]
        ranked = coarse.masked_fill(~usable, float("-inf")).flatten(2)
        best = ranked.topk(self._budget(n_bq, n_bk), dim=-1).indices  # (b, h, m)
        rows, columns = has_queries.sum(dim=-1), has_keys.sum(dim=-1)  # (b | 1,)
        if isinstance(self.keep, int):
            count = rows * columns.clamp(max=self._blocks_per_query(self.keep))
        else:
            count = ((rows * columns).double() * self.keep).round().long().clamp(min=1)
        count = torch.minimum(count, rows * columns)[:, None, None]
        is_open = torch.arange(best.shape[-1], device=best.device) < count  # (b | 1, 1, m)
        return best // n_bk, best % n_bk, is_open.expand(best.shape)

    def _budget(self, n_bq: int, n_bk: int) -> int:
        """Blocks computed exactly of n_bq × n_bk."""
        if isinstance(self.keep, int):
            return n_bq * min(self._blocks_per_query(self.keep), n_bk)
        return resolve_count(self.keep, n_bq * n_bk)

    def _blocks_per_query(self, keep: int) -> int:
        """Key blocks that hold `keep` keys."""
        return -(-keep // self.block_size)

    def cost(self, query_length: int, key_length: int | None = None, *, causal: bool | None = None) -> Cost:
        n_q, n_k, pairs, _ = self._pairs(query_length, key_length, causal)
        b, d, d_v = self.block_size, self.head_dim, self.value_dim
        n_bq, n_bk = -(-n_q // b), -(-n_k // b)
        coarse, blocks = n_bq * n_bk, self._budget(n_bq, n_bk)
        exact = blocks * b * b  # multiply-adds count the padding of the last block
        return Cost(
            exact_pairs=self.num_heads * round(blocks / coarse * n_q * n_k),  # of blocks of the mean size
            total_pairs=self.num_heads * pairs,
            score_multiply_adds=self.num_heads * (coarse + exact) * d,
            value_multiply_adds=self.num_heads * (coarse * b + exact) * d_v,
            state=self.num_heads * (coarse * (b + 1) + exact + blocks * b * (2 * d + 2 * d_v)),
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, keep={self.keep}, block_size={self.block_size}, rest={self.rest}"


class Blocks(NamedTuple):
    """A sequence cut into blocks.

    Attributes:
        x: (b, h, n_blocks, block, d), zeros after the last position.
        mean: (b, h, n_blocks, d) over the kept positions, in the type of x.
        length: (b | 1, n_blocks) number of kept positions, in at least float32.
        keep: (b | 1, n_blocks, block) bool.
    """

    x: Tensor
    mean: Tensor
    length: Tensor
    keep: Tensor


def cut(x: Tensor, keep: Tensor | None, block_size: int) -> Blocks:
    """Cut (b, h, n, d) into blocks of `block_size`; `keep` is (b, n) bool or None for all."""
    if keep is None:
        keep = torch.ones(1, x.shape[-2], dtype=torch.bool, device=x.device)
    missing = -x.shape[-2] % block_size
    x = F.pad(x, (0, 0, 0, missing)).unflatten(-2, (-1, block_size))
    keep = F.pad(keep, (0, missing)).unflatten(-1, (-1, block_size))
    count = keep.sum(dim=-1, dtype=at_least_float32(x).dtype)  # (b | 1, n_blocks)
    kept = at_least_float32(x).masked_fill(~keep[:, None, :, :, None], 0.0)
    mean = kept.sum(dim=-2) / count.clamp(min=1)[:, None, :, None]
    return Blocks(x, mean.to(x.dtype), count, keep)


def take(x: Tensor, index: Tensor) -> Tensor:
    """(b, h, n_blocks, ...) and (b, h, m) -> (b, h, m, ...)."""
    shape = (*index.shape, *x.shape[3:])
    return x.gather(2, index.view(*index.shape, *(1 for _ in x.shape[3:])).expand(shape))
