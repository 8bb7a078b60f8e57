"""Exact scores by tiles: a block of queries scores a few blocks of keys exactly, chosen by estimates of all scores.

Choosing and scoring single pairs costs a partial sort per query and gathers of single keys; of tiles, a sort of few
numbers per block and products large enough for a matrix unit. What is left is the estimate of every pair.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from approx_attn.attention.mask import AttentionMask, at_least_float32, masked_softmax
from approx_attn.attention.query_chunks import blocks_wanted, most_blocks_wanted


class TileLayout(NamedTuple):
    """How n_q queries and n_k keys are cut into tiles; queries stand at key positions i + offset.

    Under a causal mask a choice must not depend on later inputs: a block is chosen for by its b_q `probes`, the
    queries up to and including its first, among the key blocks that are over when that query stands. Without one,
    its own queries choose.
    """

    n_q: int
    n_k: int
    b_q: int
    b_k: int
    causal: bool
    offset: int
    window: int
    global_tokens: int
    spare: int  # 1: one closed block of keys behind those in use, where slots write that no tile is left for

    @classmethod
    def of(cls, size: int, n_q: int, n_k: int, mask: AttentionMask, window: int, global_tokens: int) -> TileLayout:
        """Tiles of size x size, or less where there are fewer tokens."""
        uniform = mask.is_structured and not mask.causal and mask.key_keep is None and window == 0
        sizes = (min(size, n_q), min(size, n_k))
        return cls(n_q, n_k, *sizes, mask.causal, mask.query_offset, window, global_tokens, 0 if uniform else 1)

    @property
    def rows(self) -> int:
        return -(-self.n_q // self.b_q)

    @property
    def columns(self) -> int:
        return -(-self.n_k // self.b_k)

    @property
    def lead(self) -> int:
        """Probes before the first query of a block."""
        return self.b_q - 1 if self.causal else 0

    def chunks(self, chunk_size: int) -> list[tuple[int, int]]:
        """(begin, stop) of runs of query blocks with about `chunk_size` queries."""
        step = max(1, chunk_size // self.b_q)
        return [(begin, min(begin + step, self.rows)) for begin in range(0, self.rows, step)]

    def columns_for(self, stop: int) -> int:
        """Key blocks that the query blocks before `stop` may use, and the spare one."""
        if not self.causal:
            return self.columns + self.spare
        last = stop * self.b_q - 1 + self.offset
        return min(max(last // self.b_k + 1, 1), self.columns) + self.spare

    def pad_queries(self, x: Tensor) -> Tensor:
        """(..., n_q | 1, d) -> (..., lead + rows·b_q, d), zeros before and behind; constant over queries: unchanged."""
        if x.shape[-2] != self.n_q:
            return x
        return F.pad(x, (0, 0, self.lead, self.rows * self.b_q - self.n_q))

    def pad_keys(self, x: Tensor) -> Tensor:
        """(..., n_k, d) -> (..., (columns + spare)·b_k, d), filled up with zeros."""
        return F.pad(x, (0, 0, 0, (self.columns + self.spare) * self.b_k - self.n_k))

    def pad_mask(self, mask: AttentionMask, device: torch.device) -> AttentionMask:
        """The mask over padded queries and keys; padding is closed."""
        before, behind = self.lead, self.rows * self.b_q - self.n_q
        right = (self.columns + self.spare) * self.b_k - self.n_k
        key_keep, query_keep = mask.key_keep, mask.real_queries(self.n_q)
        if key_keep is None and right:
            key_keep = torch.ones(1, self.n_k, dtype=torch.bool, device=device)
        if query_keep is None and before + behind:
            query_keep = torch.ones(1, self.n_q, dtype=torch.bool, device=device)

        def around(pairs: Tensor | None, closed: float) -> Tensor | None:
            if pairs is None:
                return None
            columns, rows = (0, right * (pairs.shape[-1] > 1)), (before, behind)
            return F.pad(pairs, (*columns, *(rows if pairs.shape[-2] > 1 else (0, 0))), value=closed)

        return AttentionMask(
            key_keep=None if key_keep is None else F.pad(key_keep, (0, right)),
            query_keep=None if query_keep is None else F.pad(query_keep, (before, behind)),
            causal=mask.causal,
            query_offset=mask.query_offset - before,
            pair_keep=around(mask.pair_keep, False),
            bias=around(mask.bias, float("-inf")),
        )

    def most_exact(self, keep: float | int) -> int:
        """The most exact tiles that any block of queries can have."""
        first = -(-self.global_tokens // self.b_k)
        if self.window > 0:
            first += (self.b_q + 2 * self.window + self.b_k - 2) // self.b_k + 1
        elif self.causal:
            first += (self.b_q + self.b_k - 2) // self.b_k + 1
        return min(self.columns, max(most_blocks_wanted(keep, self.columns, self.b_k), first))

    def places(self, begin: int, stop: int, columns: int, device: torch.device | None = None) -> Places:
        """Where the tiles of query blocks begin..stop-1 with the leading key blocks stand."""
        start = torch.arange(begin, stop, device=device)[:, None] * self.b_q + self.offset  # (Q, 1)
        left = torch.arange(columns, device=device) * self.b_k  # (K,)
        end = start + self.b_q
        past = seen = reached = torch.ones(stop - begin, columns, dtype=torch.bool, device=device)
        if self.causal:
            past, seen, reached = left + self.b_k <= start + 1, left <= start, left < end
        first = reached & ~past
        if self.window > 0:
            first = first | (reached & (left < end + self.window) & (left + self.b_k > start - self.window))
        if self.global_tokens > 0:
            first = first | (reached & (left < self.global_tokens))
        return Places(past, seen, reached, first)


class Places(NamedTuple):
    """Tiles (Q, K): wholly in the past; begun when the first query stands; usable at all; exact in any case."""

    past: Tensor
    seen: Tensor
    reached: Tensor
    first: Tensor


class TileChoice(NamedTuple):
    """Exact tiles of each query block: `picked` key blocks (b, h, Q, T), and which of these slots count, alike."""

    picked: Tensor
    is_open: Tensor

    def selected(self, columns: int) -> Tensor:
        """(b, h, Q, columns) bool."""
        empty = torch.zeros(*self.picked.shape[:-1], columns, dtype=torch.bool, device=self.picked.device)
        return empty.scatter(-1, self.picked, self.is_open)


@torch.no_grad()
def choose_tiles(
    layout: TileLayout,
    places: Places,
    estimate: Tensor,
    hidden: Tensor | None,
    mask: AttentionMask,
    own_keep: Tensor | None,
    keep: float | int,
) -> TileChoice:
    """The tiles in which leaving pairs at their estimates would cost the most.

    The expected error of a pair is its estimated weight times the norm of the part of its key that the basis cannot
    see; it is summed over the keys of a tile and the probes of its queries.

    Args:
        estimate: (b, h, Q·b_q, K·b_k), estimated scores of the probes.
        hidden: (b, h, 1, K·b_k), log of the norm of what the basis cannot see; None: weights alone choose.
        mask: of the probes over these keys.
        own_keep: what the blocks' own queries may use: (b | 1, h | 1, Q·b_q | 1, K·b_k), or None for all.
        keep: share of the tiles that a block may use, or number of keys.
    """
    rows, columns = places.past.shape
    usable = places.reached
    if own_keep is not None:
        by_tile = own_keep.unflatten(-1, (columns, -1)).any(-1)  # (b | 1, h | 1, Q·b_q | 1, K)
        if by_tile.shape[-2] > 1:
            by_tile = by_tile.unflatten(-2, (rows, -1)).any(-2)
        usable = usable & by_tile
    usable = usable.expand(*estimate.shape[:2], -1, -1)  # (b, h, Q, K)

    open_pairs = own_keep
    if layout.causal:
        open_pairs = places.past.repeat_interleave(layout.b_q, 0).repeat_interleave(layout.b_k, 1)
        kept = replace(mask, causal=False).dense_keep(estimate.shape[-2], estimate.shape[-1], estimate.device)
        open_pairs = open_pairs if kept is None else open_pairs & kept
    weights = masked_softmax(estimate, open_pairs)
    if mask.query_keep is not None:
        weights = weights.masked_fill(~mask.query_keep[:, None, :, None], 0.0)  # also of NaN in padded queries
    worth = weights.unflatten(-2, (rows, -1)).sum(-2)  # (b, h, Q, K·b_k)
    if hidden is not None:
        worth = worth * hidden.exp()
    worth = worth.unflatten(-1, (columns, -1)).sum(-1)  # (b, h, Q, K)
    worth = worth.masked_fill(places.first, float("inf")).masked_fill(~usable, -1.0)

    index = worth.topk(min(layout.most_exact(keep), columns), dim=-1).indices
    count = blocks_wanted(keep, (usable & places.seen).sum(-1, keepdim=True), layout.b_k)
    count = count.maximum((usable & places.first).sum(-1, keepdim=True)).minimum(usable.sum(-1, keepdim=True))
    return TileChoice(index, torch.arange(index.shape[-1], device=index.device) < count)


def with_exact_tiles(
    layout: TileLayout,
    estimate: Tensor,
    choice: TileChoice,
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    scale: float,
) -> Tensor:
    """The estimates with exact scores in the chosen tiles.

    Args:
        estimate: (b, h, Q·b_q, K·b_k); written in place.
        query: (b, h, Q·b_q, d). key: (b, h_kv, K·b_k, d). bias: broadcastable to `estimate`, or None.
    """
    b, h, rows, slots = choice.picked.shape
    key_heads, columns = key.shape[1], key.shape[2] // layout.b_k
    device = key.device
    heads = torch.arange(b * h, device=device) // (h // key_heads) * columns  # first key block of each head
    in_all_heads = choice.picked + heads.view(b, h, 1, 1)
    # Whole blocks are rows of this array, so that each is copied at once.
    blocks = key.reshape(b * key_heads * columns, -1).index_select(0, in_all_heads.flatten())
    keys = blocks.view(b, h, rows, slots * layout.b_k, -1)
    exact = at_least_float32((query * scale).unflatten(2, (rows, -1)) @ keys.mT)  # (b, h, Q, b_q, T·b_k)
    exact = exact.unflatten(-1, (slots, -1)).transpose(3, 4)  # (b, h, Q, T, b_q, b_k)

    index = choice.picked
    if layout.spare:
        index = index.masked_fill(~choice.is_open, columns - 1)
    sample, head, row = (
        torch.arange(size, device=device).view(shape)
        for size, shape in ((b, (-1, 1, 1, 1)), (h, (-1, 1, 1)), (rows, (-1, 1)))
    )
    place = (sample, head, row, index)
    if bias is not None:
        exact = exact + _by_tile(bias.expand_as(estimate), rows, columns)[place]
    _by_tile(estimate, rows, columns)[place] = exact.to(estimate.dtype)
    return estimate


def selected_pairs(layout: TileLayout, selected: Tensor) -> Tensor:
    """(b, h, Q, K) bool -> (b, h, Q·b_q, K·b_k)."""
    return selected.repeat_interleave(layout.b_q, 2).repeat_interleave(layout.b_k, 3)


def count_exact_pairs(layout: TileLayout, keep: float | int) -> int:
    """Exact pairs of one head with all keys usable; a ragged last block counts as full."""
    exact = 0
    for row in range(layout.rows):
        queries = min(layout.b_q, layout.n_q - row * layout.b_q)
        _, seen, reached, first = (part[0] for part in layout.places(row, row + 1, layout.columns))
        own = int(first.sum())
        wanted = most_blocks_wanted(keep, int(seen.sum()), layout.b_k)
        whole = min(max(wanted, own), int(reached.sum())) - own
        exact += queries * whole * layout.b_k + _pairs_in(layout, row, queries, first.nonzero().flatten().tolist())
    return exact


def _pairs_in(layout: TileLayout, row: int, queries: int, columns: list[int]) -> int:
    pairs = 0
    for column in columns:
        left, right = column * layout.b_k, min((column + 1) * layout.b_k, layout.n_k)
        if not layout.causal:
            pairs += queries * (right - left)
            continue
        start = row * layout.b_q + layout.offset
        pairs += sum(min(max(position - left + 1, 0), right - left) for position in range(start, start + queries))
    return pairs


def _by_tile(pairs: Tensor, rows: int, columns: int) -> Tensor:
    """View (b, h, Q·b_q, K·b_k) as (b, h, Q, K, b_q, b_k)."""
    return pairs.unflatten(3, (columns, -1)).unflatten(2, (rows, -1)).transpose(3, 4)
