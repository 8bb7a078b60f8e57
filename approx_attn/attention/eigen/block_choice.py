"""Which key blocks each block of queries scores exactly (`eigen_block`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from approx_attn.attention.eigen.kernels.block import probe_mass
from approx_attn.attention.eigen.kernels.block_inputs import straddling_blocks
from approx_attn.attention.query_chunks import blocks_wanted, most_blocks_wanted

EVERY_BLOCK = 1 << 30


class Layout(NamedTuple):
    """How n_q queries and n_k keys are cut into blocks; queries stand at key positions i + offset."""

    n_q: int
    n_k: int
    b_q: int
    b_k: int
    probe: int  # queries per mean query
    causal: bool
    offset: int

    @property
    def rows(self) -> int:
        return -(-self.n_q // self.b_q)

    @property
    def columns(self) -> int:
        return -(-self.n_k // self.b_k)


class Choice(NamedTuple):
    """Exact blocks `chosen` (b, h, Q, T) and which of them count (None: all); far blocks (b, h, Q, K) bool."""

    chosen: Tensor
    slot_open: Tensor | None
    far_open: Tensor


class Regions(NamedTuple):
    """Key blocks by where they stand, (Q, K) bool if not said otherwise.

    Attributes:
        usable: (b | 1, 1, Q | 1, K), with a key that some query of the block may use.
        past: over when the first query of the block stands; all, where attention is not causal.
        seen: begun when it stands; all, where attention is not causal.
        always: exact whatever is in them, if usable.
        diagonal: (1, Q) or (1,) int64, how many are begun and not over while the queries of the block stand.
    """

    usable: Tensor
    past: Tensor
    seen: Tensor
    always: Tensor
    diagonal: Tensor


@dataclass(frozen=True)
class BlockSelection:
    """Exact are the blocks that always are, and those in which a few mean queries of the block put the most weight.

    Attributes:
        keep: share of the blocks that a query block may use, or a number of keys, rounded up to blocks.
        neighbours: key blocks on either side of the own one that are always exact.
        first_block: whether the first key block is always exact.
    """

    keep: float | int
    neighbours: int
    first_block: bool

    @torch.no_grad()
    def choose(
        self, query: Tensor, key: Tensor, key_open: Tensor | None, query_open: Tensor | None, layout: Layout
    ) -> Choice:
        """Which blocks are exact and which are far for each query block.

        Args:
            query: (b, h, Q, b_q, d), scaled. key: (b, h_kv, K, b_k, d). Masks: (b | 1, blocks, size) or None.
        """
        regions = self._regions(layout, key_open, query.device)
        usable, past, always = regions.usable, regions.past, regions.always
        far = usable & past  # (b | 1, 1, Q, K), may enter by moments
        mass = self._mass(query, key, key_open, query_open, far, layout)  # (b, h, Q, K)
        # Blocks on the diagonal first, then those that are always exact, then by weight, then what is closed.
        mass = (mass + 2.0 * always + 2.0 * ~past).masked_fill(~usable, -1.0)
        most = self.most_exact(layout)
        index = mass.topk(most, dim=-1, sorted=True).indices
        # What lies on the diagonal is paid for as if it were full of keys, so that later keys change no choice.
        wanted = self._budget(layout.b_k, (usable & regions.seen).sum(-1)) - regions.diagonal
        count = torch.maximum(wanted, (always & far).sum(-1)) + (usable & ~past).sum(-1)
        count = count.minimum(usable.sum(-1))  # (b | 1, 1, Q)
        slot_open = torch.arange(most, device=query.device) < count[..., None]  # (b | 1, 1, Q, T)
        slot_open = slot_open.expand(index.shape)
        exact = torch.zeros_like(mass, dtype=torch.bool).scatter(-1, index, slot_open)
        every_slot = not layout.causal and key_open is None and most == min(layout.columns, self._wanted_blocks(layout))
        return Choice(index, None if every_slot else slot_open, far & ~exact)

    def most_exact(self, layout: Layout) -> int:
        """The most exact blocks that any query block can have."""
        own = 0
        if layout.causal or layout.n_q == layout.n_k:
            own = straddling_blocks(layout.b_q, layout.b_k, layout.offset) + 2 * self.neighbours
        return min(layout.columns, max(self._wanted_blocks(layout), own + self.first_block))

    def exact_pairs(self, layout: Layout, row: int, first: int, last: int) -> int:
        """Pairs with an exact score among the queries first..last of one query block, all keys real.

        At most so many, without causality, where neighbours of a block at the edge are missing.
        """
        queries, b_k = last - first + 1, layout.b_k
        if not layout.causal:
            return queries * min(self.most_exact(layout) * b_k, layout.n_k)
        start, columns = row * layout.b_q + layout.offset, layout.columns
        lefts = range(0, columns * b_k, b_k)
        diagonal = [left for left in lefts if left + b_k > start + 1 and left < start + layout.b_q]
        past = sum(left + b_k <= start + 1 for left in lefts)
        seen = sum(left <= start for left in lefts)
        reach = self.neighbours * b_k
        always = sum(
            (left + b_k > start - reach and left < start + layout.b_q) or (self.first_block and left == 0)
            for left in lefts
        )
        wanted = int(self._budget(b_k, torch.tensor(seen)))
        whole = min(max(wanted, always) - len(diagonal), past)
        pairs = queries * max(whole, 0) * b_k
        for i in range(first, last + 1):
            position = i + layout.offset
            pairs += sum(min(max(position - left + 1, 0), b_k, layout.n_k - left) for left in diagonal)
        return pairs

    def _regions(self, layout: Layout, key_open: Tensor | None, device: torch.device) -> Regions:
        """What the places of blocks and the padding of keys say, whatever is in them."""
        usable = torch.ones(1, 1, 1, layout.columns, dtype=torch.bool, device=device)
        if key_open is not None:
            usable = key_open.any(-1)[:, None, None]  # (b | 1, 1, 1, K)
        start = torch.arange(layout.rows, device=device)[:, None] * layout.b_q + layout.offset  # (Q, 1) first position
        stop = start + layout.b_q  # one past the last position
        left = torch.arange(layout.columns, device=device) * layout.b_k  # (K,)
        always = torch.zeros(layout.rows, layout.columns, dtype=torch.bool, device=device)
        past = seen = torch.ones_like(always)
        diagonal = torch.zeros(1, dtype=torch.long, device=device)
        if layout.causal:
            past, seen = left + layout.b_k <= start + 1, left <= start
            always |= (left < stop) & ~past
            usable = usable & (left < stop)  # (b | 1, 1, Q, K)
            diagonal = (((stop - 1) // layout.b_k + 1).clamp_min(0) - ((start + 1) // layout.b_k).clamp_min(0)).mT
        if layout.causal or layout.n_q == layout.n_k:
            reach = self.neighbours * layout.b_k
            always |= (left < stop + reach) & (left + layout.b_k > start - reach)
        if self.first_block:
            always |= left == 0
        return Regions(usable, past, seen, always, diagonal)

    def _budget(self, b_k: int, available: Tensor) -> Tensor:
        """Exact blocks per query block that `keep` asks for, of the `available` ones."""
        if self.keep == 1.0 and not isinstance(self.keep, int):
            return torch.full_like(available, EVERY_BLOCK)
        return blocks_wanted(self.keep, available, b_k)

    def _wanted_blocks(self, layout: Layout) -> int:
        """Exact blocks per query block that `keep` asks for where all keys can be used."""
        return most_blocks_wanted(self.keep, layout.columns, layout.b_k)

    def _mass(
        self,
        query: Tensor,
        key: Tensor,
        key_open: Tensor | None,
        query_open: Tensor | None,
        far: Tensor,
        layout: Layout,
    ) -> Tensor:
        """Share of weight that the mean queries of each query block put on each block in `far`: (b, h, Q, K)."""
        probes, counts = self._mean_queries(query, query_open, layout)  # (b, h, Q, g, d), (b | 1, Q, g)
        share = probe_mass(probes, key, key_open, far[:, 0])  # (b, h, Q, g, K)
        voters = (counts > 0)[:, None, :, :, None].to(share.dtype)
        return (share * voters).sum(-2) / voters.sum(-2).clamp_min(1.0)

    def _mean_queries(self, query: Tensor, query_open: Tensor | None, layout: Layout) -> tuple[Tensor, Tensor]:
        """Mean queries (b, h, Q, g, d) that choose for each query block, and of how many (b | 1, Q, g)."""
        rows, b_q = query.shape[2:4]
        if query_open is None:
            query_open = torch.ones(1, rows, b_q, dtype=torch.bool, device=query.device)
        if layout.causal:
            # The b_q queries up to and including the first of the block.
            late = b_q - 1
            query = F.pad(query.flatten(2, 3), (0, 0, late, 0))[:, :, : rows * b_q].unflatten(2, (rows, b_q))
            query_open = F.pad(query_open.flatten(1), (late, 0))[:, : rows * b_q].unflatten(1, (rows, b_q))
        query = query.unflatten(3, (-1, layout.probe))  # (b, h, Q, g, probe, d)
        query_open = query_open.unflatten(2, (-1, layout.probe))  # (b | 1, Q, g, probe)
        counts = query_open.sum(-1)
        kept = query_open[:, None, ..., None].to(query.dtype)
        return (query * kept).sum(-2) / counts.clamp_min(1)[:, None, ..., None], counts
