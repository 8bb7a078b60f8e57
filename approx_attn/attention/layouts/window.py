"""How far a query sees, for mechanisms that attend to near keys."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from approx_attn.attention.budget import keys_per_query, require_budget, resolve_count
from approx_attn.attention.layouts.band import Band
from approx_attn.attention.mask import AttentionMask
from approx_attn.errors import require_count


@dataclass(frozen=True)
class Window:
    """A window around each query, by a fraction of the pairs, by keys per query, or by a half-width.

    Attributes:
        budget: the option `keep`.
        half_width: the option `window`, in place of `keep` unless None.
    """

    budget: float | int
    half_width: int | None = None

    def __post_init__(self) -> None:
        require_budget("attention.keep", self.budget)
        if self.half_width is not None:
            require_count("attention.window", self.half_width, 0)

    def reach(self, usable: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """Positions before and after itself that a query sees when the mask leaves it `usable` keys (int64)."""
        if self.half_width is not None:
            before = after = torch.full_like(usable, self.half_width)
        elif causal:
            before = after = keys_per_query(self.budget, usable) - 1
        elif isinstance(self.budget, int):
            before = after = torch.full_like(usable, (self.budget - 1) // 2)
        else:
            before = after = widest_half(self.budget, usable)
        return before, torch.zeros_like(after) if causal else after

    def widest(self, usable: int, causal: bool) -> tuple[int, int]:
        """`reach` as plain numbers, which shapes may depend on."""
        if self.half_width is not None:
            half = self.half_width
        elif causal:
            half = resolve_count(self.budget, usable) - 1
        elif isinstance(self.budget, int):
            half = (self.budget - 1) // 2
        else:
            root = usable - 0.5 - math.sqrt((1.0 - self.budget) * usable * usable + 0.25)
            half = max(0, math.floor(root + 1e-9))
        return half, 0 if causal else half

    def band(
        self, n_q: int, n_k: int, causal: bool, query_offset: int, block: int | None = None, limit: int | None = None
    ) -> Band:
        """The band that holds the window of every query, no wider than the window of a mask (`limit`, or None)."""
        before, after = self.widest(n_k, causal)
        if limit is not None:
            before, after = min(before, limit - 1), min(after, limit - 1)
        return Band.around(n_q, n_k, before, after, query_offset=query_offset, block=block)

    def allowed(self, band: Band, mask: AttentionMask, device: torch.device) -> Tensor:
        """(b | 1, h | 1, n_blocks, block, span) bool: the keys of the band in each query's own window, and masked."""
        positions = band.query_positions(device)  # (n_blocks, block)
        before, after = (x[:, None, :, :, None] for x in self.reach_at(positions, mask, band.n_k))
        distance = band.key_positions(device)[:, None, :] - positions[:, :, None]  # (n_blocks, block, span)
        return band.allowed(mask, device) & (distance >= -before) & (distance <= after)

    def reach_at(self, positions: Tensor, mask: AttentionMask, n_k: int) -> tuple[Tensor, Tensor]:
        """`reach` of queries at positions (x, y), as the mask leaves them keys: twice (b | 1, x | 1, y | 1)."""
        if mask.causal:
            seen = positions.clamp(-1, n_k - 1) + 1  # keys up to the query
            usable = seen[None]
            if mask.key_keep is not None:
                usable = F.pad(mask.key_keep.cumsum(dim=-1), (1, 0))[:, seen]  # (b, x, y)
        elif mask.key_keep is not None:
            usable = mask.key_keep.sum(dim=-1)[:, None, None]  # (b, 1, 1)
        else:
            usable = torch.full((1, 1, 1), n_k, device=positions.device)
        return self.reach(usable, mask.causal)

    def pairs(
        self, n_q: int, n_k: int, causal: bool, query_offset: int, *, first_query: int = 0, global_keys: int = 0
    ) -> int:
        """Pairs of queries from `first_query` on with keys in their window or among the first `global_keys`."""
        positions = torch.arange(first_query, n_q) + query_offset
        usable = (positions + 1).clamp(0, n_k) if causal else torch.full_like(positions, n_k)
        before, after = self.reach(usable, causal)
        first, last = (positions - before).clamp(min=global_keys), (positions + after).clamp(max=n_k - 1)
        near = (last - first + 1).clamp(min=0) + usable.clamp(max=global_keys)
        return int((near * (usable > 0)).sum())


def widest_half(keep: float, usable: Tensor) -> Tensor:
    """Largest half-width w at which the band over n keys holds at most the fraction `keep` of n² pairs.

    The band holds n(2w + 1) - w(w + 1) pairs, the corners being cut off. Solved for w, and at least 0:
    a query always sees its own position.

    Args:
        keep: fraction in (0, 1]; 1 gives n - 1, the whole.
        usable: n, int64, any shape.
    """
    n = usable.double()
    root = n - 0.5 - ((1.0 - keep) * n.square() + 0.25).sqrt()
    return (root + 1e-9).floor().long().clamp(min=0)
