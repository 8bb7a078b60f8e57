"""Streaming statistics of attention inputs, in float64 and in memory that does not grow with the data.

Every class takes the inputs of one attention call at a time and can be read at any time. What the mask closes is
counted nowhere: padded keys and queries, and pairs that no query may use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from approx_attn.attention.base import repeat_heads
from approx_attn.attention.eigen.content_basis import ContentFit, fit_content_basis
from approx_attn.attention.eigen.position_fit import PositionFit, fit_position_basis
from approx_attn.attention.mask import AttentionMask
from approx_attn.conversion.calibration.matrix_moments import MatrixMoments


class Moments(Protocol):
    """Statistics of one layer to which bases of one kind are fitted."""

    @property
    def seen_rows(self) -> int:
        """Rows of scores (content: queries) that were taken in."""

    def update(self, query: Tensor, key: Tensor, mask: AttentionMask, scale: float) -> None:
        """Add a batch: query (b, h, n_q, d), key (b, h_kv, n_k, d), and the factor on their products."""

    def fit(self, scope: str = "head", max_rank: int | None = None) -> Any:
        """The basis of every `head`, or one for the heads of the `layer`: a dataclass of tensors."""

    @classmethod
    def fit_model(cls, layers: Sequence[Any], max_rank: int | None = None) -> Any:
        """One basis for all layers; None where their shapes differ."""


class ContentMoments:
    """Second moment of the queries and covariance of the keys of one layer, for the content basis.

    Keys are centred on the mean of their own sequence: a row of scores is only defined up to a constant, and
    the mechanisms take the mean of a row exactly, so only what differs within a sequence must be estimated.
    The mean key over all data is kept as well.
    """

    def __init__(self) -> None:
        self.queries = self.keys = 0.0
        self.query_product = self.key_product = self.key_total = torch.zeros(())

    @property
    def seen_rows(self) -> int:
        return int(self.queries)

    @torch.no_grad()
    def update(self, query: Tensor, key: Tensor, mask: AttentionMask, scale: float = 1.0) -> None:
        """Add a batch: query (b, h, n_q, d), key (b, h_kv, n_k, d)."""
        query_keep, key_keep = used_tokens(mask, query, key)  # (b, n_q), (b, n_k)
        # masked_fill and not a product: padding may hold anything, NaN too.
        q = query.double().masked_fill(~query_keep[:, None, :, None], 0.0)
        k = key.double().masked_fill(~key_keep[:, None, :, None], 0.0)
        count = key_keep.sum(-1).double()  # (b,)
        mean = k.sum(-2) / count.clamp_min(1.0)[:, None, None]  # (b, h_kv, d)
        centred = (k - mean[:, :, None]) * key_keep[:, None, :, None]
        self.query_product = self.query_product + torch.einsum("bhnd,bhne->hde", q, q).cpu()
        self.key_product = self.key_product + torch.einsum("bhnd,bhne->hde", centred, centred).cpu()
        self.key_total = self.key_total + k.sum((0, 2)).cpu()
        self.queries += float(query_keep.sum())
        self.keys += float(count.sum())

    def add(self, other: ContentMoments) -> None:
        """Add what another layer of the same head dimension has seen, its heads pooled."""
        self.query_product = self.query_product + other.query_product.sum(0, keepdim=True)
        self.key_product = self.key_product + other.key_product.sum(0, keepdim=True)
        self.key_total = self.key_total + other.key_total.sum(0, keepdim=True)
        self.queries += other.queries * other.query_product.shape[0]
        self.keys += other.keys * other.key_product.shape[0]

    def statistics(self, scope: str = "head") -> tuple[Tensor, Tensor, Tensor]:
        """(query second moment (h | 1, d, d), key covariance (h_kv | 1, d, d), mean key (h_kv, d))."""
        query_product, key_product = self.query_product / self.queries, self.key_product / self.keys
        if scope == "layer":
            query_product, key_product = query_product.mean(0, keepdim=True), key_product.mean(0, keepdim=True)
        return query_product, key_product, self.key_total / self.keys

    def fit(self, scope: str = "head", max_rank: int | None = None) -> ContentFit:
        """The basis of all ranks, whatever `max_rank`: per head, or one for the heads of the layer."""
        query_moment, key_covariance, key_mean = self.statistics(scope)
        return fit_content_basis(query_moment, key_covariance, key_mean)

    @classmethod
    def fit_model(cls, layers: Sequence[ContentMoments], max_rank: int | None = None) -> ContentFit | None:
        if len({layer.query_product.shape[-1] for layer in layers}) != 1:
            return None
        pooled = cls()
        for layer in layers:
            pooled.add(layer)
        return pooled.fit("layer")


class PositionMoments:
    """Mean and covariance over positions of single rows of scores of one layer, for the position basis.

    Rows may miss entries (padding, the future): every mean and every covariance is over the rows that have the
    entries it needs.

    Args:
        alignment: `absolute` indexes a row by key position, `relative` by key position − query position.
        centred: subtract from every row its own mean over the keys that it may use.
        rows: queries per call whose rows are taken, drawn at random; all if None. The work per call is
            rows·n² multiply-adds per head and sequence.
        seed: of the draw.
    """

    def __init__(self, alignment: str, *, centred: bool = True, rows: int | None = None, seed: int = 0) -> None:
        self.alignment, self.centred, self.rows = alignment, centred, rows
        self.length = 0  # longest input so far
        self.total = self.count = torch.zeros(1, 0, dtype=torch.float64)  # (h, P), (h | 1, P)
        self.product = self.pair_count = torch.zeros(1, 0, 0, dtype=torch.float64)  # (h, P, P), (h | 1, P, P)
        self.seen_rows = 0
        self._generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def update(self, query: Tensor, key: Tensor, mask: AttentionMask, scale: float) -> None:
        """Add a batch: query (b, h, n_q, d), key (b, h_kv, n_k, d)."""
        h, n_q, n_k = query.shape[1], query.shape[-2], key.shape[-2]
        self._grow(h, max(n_k - min(mask.query_offset, 0), n_q + mask.query_offset))
        drawn = torch.arange(n_q)
        if self.rows is not None and self.rows < n_q:
            drawn = torch.randperm(n_q, generator=self._generator)[: self.rows].sort().values
        drawn = drawn.to(query.device)

        scores, keep = rows_of_scores(query, key, mask, scale, drawn)
        used = keep.double()
        if self.centred:
            scores = scores - (scores * used).sum(-1, keepdim=True) / used.sum(-1, keepdim=True).clamp_min(1.0)
        self._add(scores * used, used, drawn + mask.query_offset)
        self.seen_rows += int(keep.any(-1).sum()) * (h // keep.shape[1])

    def _add(self, scores: Tensor, used: Tensor, positions: Tensor) -> None:
        """Add rows (b, h, rows, n_k), zero where `used` (b, h | 1, rows, n_k) is zero."""
        if used.shape[1] > self.count.shape[0]:
            self.count = self.count.repeat(used.shape[1], 1)
            self.pair_count = self.pair_count.repeat(used.shape[1], 1, 1)
        elif used.shape[1] < self.count.shape[0]:
            used = used.expand(-1, self.count.shape[0], -1, -1)
        n_k = scores.shape[-1]
        if self.alignment == "absolute":
            groups = [(0, scores, used)]
        else:  # the row of position p lies at offsets −p … n_k − 1 − p
            groups = [
                (self.length - 1 - int(p), scores[:, :, i : i + 1], used[:, :, i : i + 1])
                for i, p in enumerate(positions)
            ]
        for low, x, w in groups:
            entries = slice(low, low + n_k)
            self.total[:, entries] += x.sum((0, 2)).cpu()
            self.count[:, entries] += w.sum((0, 2)).cpu()
            self.product[:, entries, entries] += torch.einsum("bhij,bhik->hjk", x, x).cpu()
            self.pair_count[:, entries, entries] += torch.einsum("bhij,bhik->hjk", w, w).cpu()

    def _grow(self, heads: int, length: int) -> None:
        """Make room for inputs of this length."""
        if self.length == 0:
            self.total, self.product = self.total.new_zeros(heads, 0), self.product.new_zeros(heads, 0, 0)
        size = length if self.alignment == "absolute" else 2 * length - 1
        extra = size - self.total.shape[-1]
        if extra <= 0:
            return
        before = 0 if self.alignment == "absolute" else extra // 2  # offset 0 stays in the middle
        line, square = (before, extra - before), (before, extra - before) * 2
        self.total, self.count = F.pad(self.total, line), F.pad(self.count, line)
        self.product, self.pair_count = F.pad(self.product, square), F.pad(self.pair_count, square)
        self.length = length

    def statistics(self, scope: str = "head") -> tuple[Tensor, Tensor]:
        """(mean (h | 1, P), covariance (h | 1, P, P)); zero where nothing was seen."""
        return position_statistics(*(self.pooled_sums() if scope == "layer" else self._sums()))

    def pooled_sums(self) -> list[Tensor]:
        """Sums of entries and pairs and their counts over all heads, each with a leading axis of 1."""
        return [part.sum(0, keepdim=True) for part in self._sums()]

    def _sums(self) -> list[Tensor]:
        heads = self.total.shape[0]
        return [self.total, self.product, self.count.expand(heads, -1), self.pair_count.expand(heads, -1, -1)]

    def fit(self, scope: str = "head", max_rank: int | None = None) -> PositionFit:
        """The position basis: per head, or one for the heads of the layer."""
        return fit_position_basis(*self.statistics(scope), centred=self.centred, max_rank=max_rank)

    @classmethod
    def fit_model(cls, layers: Sequence[PositionMoments], max_rank: int | None = None) -> PositionFit | None:
        if len({layer.total.shape[-1] for layer in layers}) != 1:
            return None
        sums = [sum(parts) for parts in zip(*(layer.pooled_sums() for layer in layers), strict=True)]
        return fit_position_basis(*position_statistics(*sums), centred=layers[0].centred, max_rank=max_rank)


KINDS: dict[str, Callable[[int | None, int, int], Moments]] = {
    "content": lambda rows, seed, max_rank: ContentMoments(),
    "absolute": lambda rows, seed, max_rank: PositionMoments("absolute", rows=rows, seed=seed),
    "relative": lambda rows, seed, max_rank: PositionMoments("relative", rows=rows, seed=seed),
    "absolute_raw": lambda rows, seed, max_rank: PositionMoments("absolute", centred=False, rows=rows, seed=seed),
    "relative_raw": lambda rows, seed, max_rank: PositionMoments("relative", centred=False, rows=rows, seed=seed),
    "matrix": lambda rows, seed, max_rank: MatrixMoments(max_rank),
}
"""Kinds of bases that can be fitted, which mechanisms name as `basis_kind`, and the statistics that each is fitted to,
made from the number of rows of scores to draw per batch (None: all), the seed of the draw and the columns kept."""

STATISTICS = tuple(KINDS)


def position_statistics(total: Tensor, product: Tensor, count: Tensor, pair_count: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (g, P) and covariance (g, P, P) from sums over rows that may miss entries."""
    mean = total / count.clamp_min(1.0)
    covariance = product / pair_count.clamp_min(1.0) - mean[:, :, None] * mean[:, None, :]
    return mean, covariance.masked_fill(pair_count == 0, 0.0)


def rows_of_scores(
    query: Tensor, key: Tensor, mask: AttentionMask, scale: float, drawn: Tensor
) -> tuple[Tensor, Tensor]:
    """Scores of the drawn queries in float64, and which of them are used.

    Args:
        query: (b, h, n_q, d), key: (b, h_kv, n_k, d).
        drawn: (rows,) indices of queries.

    Returns:
        (b, h, rows, n_k) scores, zero where a token is not used, and (b, 1 | h, rows, n_k) bool.
    """
    query_keep, key_keep = used_tokens(mask, query, key)
    q = query[:, :, drawn].masked_fill(~query_keep[:, None, drawn, None], 0.0)
    k = repeat_heads(key.masked_fill(~key_keep[:, None, :, None], 0.0), query.shape[1])
    scores = (q @ k.mT).double() * scale  # (b, h, rows, n_k)
    keep = query_keep[:, None, drawn, None] & key_keep[:, None, None, :]  # (b, 1, rows, n_k)
    dense = mask.dense_keep(query.shape[-2], key.shape[-2], query.device)
    if dense is not None:
        keep = keep & (dense if dense.shape[-2] == 1 else dense[..., drawn, :])
    return scores, keep


def used_tokens(mask: AttentionMask, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Which queries (b, n_q) and which keys (b, n_k) take part in any pair and are not padding."""
    b, n_q, n_k = query.shape[0], query.shape[-2], key.shape[-2]
    query_keep = torch.ones(b, n_q, dtype=torch.bool, device=query.device)
    key_keep = torch.ones(b, n_k, dtype=torch.bool, device=query.device)
    dense = mask.dense_keep(n_q, n_k, query.device)
    if dense is not None:
        dense = dense[(None,) * (4 - dense.dim())]  # a causal mask alone has no axes of samples and heads
        dense = dense.any(1).expand(b, n_q, n_k)  # over heads
        query_keep, key_keep = dense.any(-1), dense.any(-2)
    if mask.query_keep is not None:
        query_keep = query_keep & mask.query_keep
    return query_keep, key_keep
