"""Streamed principal components of whole score matrices, in memory that grows neither with the data nor as n⁴.

A score matrix of n × n is a vector of n² entries, whose covariance has n⁴ and is never formed. Kept are the K leading
rows of a sketch R with RᵀR ≈ the sum of the outer products of all deviations: an incremental singular value
decomposition (Brand, Linear Algebra and its Applications 2006; the update of the mean after Ross, Lim, Lin and Yang,
International Journal of Computer Vision 2008). A batch is appended to the sketch, the K leading components of both are
found through their inner products, and what falls off is added up per entry. Dropping components only takes away, so
RᵀR is below the true sum in the order of positive matrices: eigenvalues found are lower bounds, each short by no more
than the trace that fell off, which is known (`MatrixSketch.lost`) and counted as variance outside the basis.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from approx_attn.attention.base import repeat_heads
from approx_attn.attention.eigen.position_fit import PositionFit
from approx_attn.attention.mask import AttentionMask

SPARE = 16  # components kept beyond those that are wanted: they make the wanted ones close
AT_ONCE = 16  # matrices per head appended to the sketch at once


class MatrixSketch:
    """Mean and leading components of vectors that come in batches and may miss entries.

    A missing entry counts as equal to the mean; each variance is over the vectors that have the entry.

    Args:
        groups: how many streams of vectors, g.
        length: the vectors are length × length matrices, laid out by rows.
        components: K, rows that are kept.

    Attributes:
        mean, count, lost: (g, n²): of every entry its mean, how many vectors had it, and the squares that fell off.
        rows: (g, up to K, n²): the sketch.
    """

    def __init__(self, groups: int, length: int, components: int) -> None:
        self.length, self.components = length, components
        self.mean, self.count, self.lost = (torch.zeros(groups, length**2, dtype=torch.float64) for _ in range(3))
        self.rows = self.mean.new_zeros(groups, 0, length**2)

    def absorb(self, rows: Tensor, mean: Tensor, count: Tensor, lost: Tensor | None = None) -> None:
        """Add vectors of which deviations `rows` (g, m, n²) from their own `mean` (g, n²) are given.

        Args:
            count: (g, n²), how many of them have each entry; what is not there has deviation and mean zero.
            lost: (g, n²), squares of deviations that `rows` leave out.
        """
        both = self.count + count
        # Two means joined: their distance is one more deviation, and the mean moves towards the new one.
        distance = (mean - self.mean) * (count > 0)
        shift = distance * (self.count * count / both.clamp_min(1.0)).sqrt()
        self.mean = self.mean + distance * count / both.clamp_min(1.0)
        self.count = both
        rows = torch.cat([self.rows, rows, shift[:, None]], dim=1)
        if lost is not None:
            self.lost = self.lost + lost
        if rows.shape[1] <= self.components:
            self.rows = rows
            return
        _, vectors = torch.linalg.eigh(rows @ rows.mT)  # (g, m, m), smallest first
        self.rows = vectors[..., -self.components :].mT @ rows
        self.lost = self.lost + (rows.square().sum(1) - self.rows.square().sum(1)).clamp_min(0.0)

    def grow(self, length: int) -> None:
        """Make room for longer inputs: entries that were not seen so far."""

        def padded(part: Tensor) -> Tensor:
            extra = length - self.length
            return F.pad(part.unflatten(-1, (self.length, self.length)), (0, extra, 0, extra)).flatten(-2)

        if length > self.length:
            self.mean, self.count, self.lost, self.rows = map(padded, (self.mean, self.count, self.lost, self.rows))
            self.length = length

    def fit(self, max_rank: int | None = None) -> PositionFit:
        """Probabilistic PCA of the matrices, laid out by rows: P = n² positions."""
        root = self.count.clamp_min(1.0).sqrt()
        _, singular, vectors = torch.linalg.svd(self.rows / root[:, None], full_matrices=False)
        rank = singular.shape[-1] if max_rank is None else min(max_rank, singular.shape[-1])
        eigenvalues = singular.square()
        seen = (self.count > 0).unflatten(-1, (self.length, self.length))
        # The mean of every row of scores is taken out.
        dimensions = seen.sum((-2, -1)) - seen.any(-1).sum(-1)
        return PositionFit(
            mean=self.mean,
            vectors=vectors[:, :rank].mT.contiguous(),
            eigenvalues=eigenvalues[:, :rank].contiguous(),
            variance=eigenvalues.sum(-1) + (self.lost / root.square()).sum(-1),
            dimensions=dimensions.double().clamp_min(1.0),
        )


def join(sketches: Sequence[MatrixSketch]) -> MatrixSketch:
    """One sketch of the vectors of all groups of several sketches of one length."""
    joined = MatrixSketch(1, sketches[0].length, sketches[0].components)
    for sketch in sketches:
        for i in range(len(sketch.mean)):
            group = slice(i, i + 1)
            joined.absorb(sketch.rows[group], sketch.mean[group], sketch.count[group], sketch.lost[group])
    return joined


class MatrixMoments:
    """Mean and leading components of whole score matrices of one layer, for the basis of `eigen_matrix`.

    Rows of scores have their own mean taken out, as `eigen_matrix` has a free offset per row. Memory per head is
    (`max_rank` + 16) · n² numbers in float64, and twice that while a batch is added.

    Args:
        max_rank: components that will be asked for.
    """

    def __init__(self, max_rank: int) -> None:
        self.max_rank = max_rank
        self.sketch: MatrixSketch | None = None
        self.seen_rows = 0

    @torch.no_grad()
    def update(self, query: Tensor, key: Tensor, mask: AttentionMask, scale: float) -> None:
        """Add a batch: query (b, h, n_q, d), key (b, h_kv, n_k, d)."""
        length = max(key.shape[-2], query.shape[-2] + mask.query_offset)
        if self.sketch is None:
            self.sketch = MatrixSketch(query.shape[1], length, self.max_rank + SPARE)
        self.sketch.grow(length)
        scores, used = centred_scores(query, key, mask, scale)
        self.seen_rows += int(used.any(-1).sum())
        after_keys, after_queries = self.sketch.length - key.shape[-2], self.sketch.length - query.shape[-2]
        place = (0, after_keys, mask.query_offset, after_queries - mask.query_offset)  # a negative pad crops
        for each, present in zip(scores.cpu().split(AT_ONCE), used.cpu().split(AT_ONCE), strict=True):
            x, w = (F.pad(part, place).flatten(2).transpose(0, 1) for part in (each, present.double()))  # (h, b, n²)
            count = w.sum(1)
            mean = x.sum(1) / count.clamp_min(1.0)
            self.sketch.absorb((x - mean[:, None]) * w, mean, count)

    def fit(self, scope: str = "head", max_rank: int | None = None) -> PositionFit:
        """The basis of matrices: per head, or one for the heads of the layer."""
        assert self.sketch is not None
        rank = self.max_rank if max_rank is None else min(max_rank, self.max_rank)
        return (join([self.sketch]) if scope == "layer" else self.sketch).fit(rank)

    @classmethod
    def fit_model(cls, layers: Sequence[MatrixMoments], max_rank: int | None = None) -> PositionFit | None:
        sketches = [layer.sketch for layer in layers if layer.sketch is not None]
        if len({sketch.length for sketch in sketches}) != 1:
            return None
        rank = min(layer.max_rank for layer in layers)
        return join(sketches).fit(rank if max_rank is None else min(max_rank, rank))


def centred_scores(query: Tensor, key: Tensor, mask: AttentionMask, scale: float) -> tuple[Tensor, Tensor]:
    """Scores less the mean of their row, zero where they are not used, and where they are: (b, h, n_q, n_k) each.

    Args:
        query: (b, h, n_q, d).
        key: (b, h_kv, n_k, d). Both may hold anything where the mask says padding.
        scale: factor on query-key products.
    """
    b, h, n_q, _ = query.shape
    scores = (query @ repeat_heads(key, h).mT).double() * scale
    keep = mask.dense_keep(n_q, key.shape[-2], query.device)
    used = torch.ones((), dtype=torch.bool, device=query.device) if keep is None else keep
    real = mask.real_queries(n_q)
    if real is not None:
        used = used & real[:, None, :, None]
    used = used.expand(b, h, n_q, key.shape[-2])
    scores = scores.masked_fill(~used, 0.0)  # not a product: padding may hold anything, NaN too
    mean = scores.sum(-1, keepdim=True) / used.sum(-1, keepdim=True).clamp_min(1)
    return (scores - mean).masked_fill(~used, 0.0), used
