"""A fixed pattern of pairs, the same for all samples and any for each head, run at the cost of about its open pairs.

Queries are cut into blocks of consecutive ones. Beside each block stand the keys that any of its queries uses, gathered
into one slice, so a block is one dense product. Blocks that stand beside about equally many keys are computed together.

    rows = lambda start, stop: keep[:, start:stop]  # (h, stop - start, n_k) bool
    pattern = Pattern.cheapest(rows, num_heads, n_q, n_k)
    output, weights = pattern.lay_out(rows).attend(query, key, value, key_keep, scale)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from approx_attn.attention.base import apply_dropout
from approx_attn.attention.mask import at_least_float32, masked_softmax

GROWTH = 4
BLOCKS = tuple(GROWTH**power for power in range(4))  # queries in one block
GATHERED = 4  # products that moving one number of a key is counted as, when blocks of different size are weighed
GROUPS = 8  # at most as many products of blocks, each as wide as its widest
ROWS_AT_ONCE = 256  # of the (h, n_q, n_k) pattern, while it is looked at; a multiple of the largest block

Rows = Callable[[int, int], Tensor]
"""(start, stop) to (h, stop - start, n_k) bool: the open pairs of queries start..stop-1."""


@dataclass(frozen=True)
class Pattern:
    """How many keys stand beside each block of queries.

    Attributes:
        n_q, n_k: queries and keys.
        block: queries in one block.
        widths: (h, n_blocks) int64, keys beside each.
    """

    n_q: int
    n_k: int
    block: int
    widths: Tensor

    @classmethod
    def cheapest(cls, rows: Rows, num_heads: int, n_q: int, n_k: int) -> Pattern | None:
        """The block size that computes and moves least; None where one dense product of all pairs does no more."""
        widths: dict[int, list[Tensor]] = {block: [] for block in BLOCKS}
        for start, stop in _chunks(n_q):
            part = rows(start, stop)
            for block in BLOCKS:
                if block > 1:
                    part = _tiles(part, GROWTH).any(dim=2)  # a union of the unions before
                widths[block].append(part.sum(dim=-1))
        patterns = [cls(n_q, n_k, block, torch.cat(found, dim=-1).cpu()) for block, found in widths.items()]
        best = min(patterns, key=lambda pattern: pattern.work)
        return best if best.work < num_heads * n_q * n_k else None

    @property
    def groups(self) -> list[Tensor]:
        """Indices head · n_blocks + block of the blocks that are computed together; those without a key are in none."""
        widths = self.widths.flatten()
        order = widths.argsort(stable=True)
        order = order[widths[order] > 0]
        return list(order.chunk(GROUPS)) if len(order) else []

    @property
    def slices(self) -> int:
        """Keys gathered, with those that fill slices up to the widest of their group; all heads."""
        widths = self.widths.flatten()
        return sum(len(group) * int(widths[group[-1]]) for group in self.groups)

    @property
    def computed_pairs(self) -> int:
        """Pairs whose score is computed, all heads."""
        return self.slices * self.block

    @property
    def work(self) -> int:
        """Computed pairs with what moving their keys is worth."""
        return self.slices * (self.block + GATHERED)

    def lay_out(self, rows: Rows) -> LaidOutPattern:
        """The pattern ready to compute; `rows` as `cheapest` had it."""
        h, n_blocks = self.widths.shape
        opened = torch.cat([_tiles(rows(*chunk), self.block) for chunk in _chunks(self.n_q)], dim=1)
        opened = opened.flatten(0, 1)  # (h · n_blocks, block, n_k)
        widths, parts = self.widths.flatten(), []
        for group in self.groups:
            width, of_group = int(widths[group[-1]]), opened[group.to(opened.device)]
            used = of_group.any(dim=1)  # (g, n_k)
            keys = (~used).byte().argsort(dim=-1, stable=True)[:, :width]  # those in use first, in order
            is_open = of_group.gather(-1, keys[:, None].expand(-1, self.block, -1))
            parts.append(TileGroup(group.to(keys.device), keys, is_open))
        return LaidOutPattern(self.n_q, self.n_k, self.block, h, n_blocks, parts)


@dataclass(frozen=True)
class TileGroup:
    """Blocks of queries with equally many keys beside them.

    Attributes:
        tiles: (g,) int64, head · n_blocks + block.
        keys: (g, width) int64 positions of keys.
        is_open: (g, block, width) bool.
    """

    tiles: Tensor
    keys: Tensor
    is_open: Tensor


@dataclass(frozen=True)
class LaidOutPattern:
    """Blocks of queries with the keys beside them; sizes as in `Pattern`."""

    n_q: int
    n_k: int
    block: int
    num_heads: int
    n_blocks: int
    groups: list[TileGroup]

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_keep: Tensor | None,
        scale: float,
        dropout_p: float = 0.0,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Softmax attention over the open pairs.

        Args:
            query, key, value: (b, h, n_q, d), (b, h, n_k, d), (b, h, n_k, d_v).
            key_keep: (b, n_k) bool, False for padded keys, or None.
            scale: factor on the products.
            dropout_p: probability of dropping a weight.
            need_weights: also return them.

        Returns:
            (b, h, n_q, d_v), zeros for queries without a key, and (b, h, n_q, n_k) weights or None.
        """
        b, d_v = query.shape[0], value.shape[-1]
        padded = torch.nn.functional.pad(query * scale, (0, 0, 0, self.n_blocks * self.block - self.n_q))
        tiles = padded.reshape(b, self.num_heads * self.n_blocks, self.block, -1)
        nothing = sum(x[..., :0].sum() for x in (query, key, value))  # gradients flow, as zeros, where no pair is open
        output = value.new_zeros(b, self.num_heads * self.n_blocks, self.block, d_v) + nothing
        dense = None
        if need_weights:
            dense = value.new_zeros(b, self.num_heads * self.n_blocks, self.block, self.n_k)
        for group in self.groups:
            heads = group.tiles[:, None] // self.n_blocks  # (g, 1)
            k, v = key[:, heads, group.keys], value[:, heads, group.keys]  # (b, g, width, d)
            keep = group.is_open  # (g, block, width)
            if key_keep is not None:
                keep = keep & key_keep[:, group.keys][:, :, None]  # (b, g, block, width)
            scores = at_least_float32(tiles[:, group.tiles] @ k.transpose(-2, -1))  # (b, g, block, width)
            weights = apply_dropout(masked_softmax(scores, keep), dropout_p).to(value.dtype)
            output = output.index_copy(1, group.tiles, weights @ v)
            if dense is not None:
                at = group.keys[:, None].expand_as(group.is_open)
                rows = torch.zeros_like(dense[:, group.tiles]).scatter(-1, at.expand(b, -1, -1, -1), weights)
                dense = dense.index_copy(1, group.tiles, rows)
        return self._merge(output), None if dense is None else self._merge(dense)

    def _merge(self, x: Tensor) -> Tensor:
        """(b, h · n_blocks, block, d) -> (b, h, n_q, d)."""
        return x.reshape(x.shape[0], self.num_heads, self.n_blocks * self.block, -1)[:, :, : self.n_q]


def _tiles(x: Tensor, block: int) -> Tensor:
    """(h, n, n_k) bool -> (h, n_blocks, block, n_k), closed after the last row."""
    missing = -x.shape[1] % block
    return torch.nn.functional.pad(x, (0, 0, 0, missing)).unflatten(1, (-1, block))


def _chunks(n_q: int) -> Iterator[tuple[int, int]]:
    for start in range(0, n_q, ROWS_AT_ONCE):
        yield start, min(start + ROWS_AT_ONCE, n_q)
