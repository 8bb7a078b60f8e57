"""Streaming statistics of score rows and matrices of one attention layer.

Scores are s·q·k. A position bias that a model adds to them (T5) is known without computing a pair, so it is left
out here as it is in the mechanisms.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from approx_attn.attention.base import repeat_heads
from approx_attn.attention.mask import AttentionMask
from approx_attn.conversion.calibration.moments import PositionMoments, position_statistics, used_tokens
from approx_attn.diagnosis.analysis.spectrum import Spectrum, spectrum_of_covariance, spectrum_of_gram

QUERIES_AT_ONCE = 16  # rows of a sample of whole matrices that are formed together


class RowMoments(PositionMoments):
    """Mean and covariance of single score rows of one layer, with a shortcut where no pair is closed singly.

    A row is s·q_i·Kᵀ, so the outer products of all rows of a sequence add up to s²·K(QᵀQ)Kᵀ: n²·d multiply-adds
    instead of n³, and no score is ever formed. Padding only takes rows out of Q and K. Causal masks, windows, patterns
    and position biases go the long way.

    Args:
        centred: subtract from every row its own mean.
        rows: queries per batch whose rows are taken on the long way; all if None.
        seed: of their draw.
    """

    def __init__(self, *, centred: bool, rows: int | None = None, seed: int = 0) -> None:
        super().__init__("absolute", centred=centred, rows=rows, seed=seed)

    @torch.no_grad()
    def update(self, query: Tensor, key: Tensor, mask: AttentionMask, scale: float) -> None:
        """Add a batch: query (b, h, n_q, d), key (b, h_kv, n_k, d)."""
        if mask.causal or mask.window is not None or not mask.is_structured:
            super().update(query, key, mask, scale)
            return
        h, n_k = query.shape[1], key.shape[-2]
        self._grow(h, max(n_k, self.length))
        query_keep, key_keep = used_tokens(mask, query, key)
        q = query.masked_fill(~query_keep[:, None, :, None], 0.0).double() * scale
        k = key.masked_fill(~key_keep[:, None, :, None], 0.0).double()
        if self.centred:
            mean = k.sum(-2, keepdim=True) / key_keep.sum(-1).clamp_min(1)[:, None, None, None]
            k = (k - mean) * key_keep[:, None, :, None]
        k = repeat_heads(k, h)
        left = (k @ (q.mT @ q)).permute(1, 2, 0, 3).flatten(2)  # (h, n_k, b·d)
        right = k.permute(1, 2, 0, 3).flatten(2)
        queries, keys = query_keep.sum(-1).double(), key_keep.double()
        self.total[:, :n_k] += (k @ q.sum(-2)[..., None]).squeeze(-1).sum(0).cpu()
        self.product[:, :n_k, :n_k] += (left @ right.mT).cpu()
        self.count[:, :n_k] += (queries @ keys).cpu()
        self.pair_count[:, :n_k, :n_k] += ((keys * queries[:, None]).mT @ keys).cpu()
        self.seen_rows += int(queries.sum()) * h

    def spectra(self, pool: str = "head") -> list[Spectrum]:
        """Spectra per head, or one of the rows of all heads together."""
        sums = self.pooled_sums() if pool == "layer" else self._sums()
        return spectra_of_sums(sums, centred=self.centred, samples=self.seen_rows // len(sums[0]))


def spectra_of_sums(sums: list[Tensor], *, centred: bool, samples: int) -> list[Spectrum]:
    """Spectra of groups of rows from sums of entries, products and their counts, each with a leading axis g."""
    _, covariance = position_statistics(*sums)
    covariance = covariance * (samples / max(samples - 1, 1))  # divisor N − 1
    seen = int((sums[2] > 0).sum(-1).max())
    return [
        spectrum_of_covariance(part.numpy(), samples=samples, dimensions=seen - int(centred)) for part in covariance
    ]


class MatrixSample:
    """Queries and keys of the first sequences of one layer, for the spectrum of whole score matrices.

    The n²-dimensional covariance is never formed: its spectrum is that of the N × N inner products of N sampled
    matrices, and these are formed a few queries at a time. Entries closed by a mask count as zero.

    Args:
        sequences: how many are kept, whatever the number of batches; each gives one matrix per head.
    """

    def __init__(self, sequences: int) -> None:
        self.sequences = sequences
        self.held = 0
        self.parts: list[tuple[Tensor, Tensor, AttentionMask, float]] = []

    def update(self, query: Tensor, key: Tensor, mask: AttentionMask, scale: float) -> None:
        """Keep what of the batch is still wanted; query (b, h, n_q, d), key (b, h_kv, n_k, d)."""
        wanted = min(self.sequences - self.held, query.shape[0])
        same_size = not self.parts or self.parts[0][1].shape[-2] == key.shape[-2]
        if wanted <= 0 or not same_size:
            return
        mask = replace(
            mask,
            key_keep=_first(mask.key_keep, wanted),
            query_keep=_first(mask.query_keep, wanted),
            pair_keep=_first(mask.pair_keep, wanted),
            bias=_first(mask.bias, wanted),
        )
        self.parts.append((query[:wanted].float().cpu().clone(), key[:wanted].float().cpu().clone(), mask, scale))
        self.held += wanted

    def gram(self, centred: bool, sequences: int | None = None) -> np.ndarray:
        """(N, N) inner products of the matrices, N = sequences × heads, head index fastest.

        Args:
            centred: subtract from every row its own mean.
            sequences: only the first of them.
        """
        total: np.ndarray | float = 0.0
        for block in self.blocks(centred):
            flat = block[:sequences].flatten(0, 1).flatten(1).double().numpy()  # (N, rows · n_k)
            total = total + flat @ flat.T
        return np.asarray(total)

    def blocks(self, centred: bool) -> Iterator[Tensor]:
        """(sequences, h, rows, n_k), a few query rows at a time."""
        n_q = self.parts[0][0].shape[-2]
        for start in range(0, n_q, QUERIES_AT_ONCE):
            stop = min(start + QUERIES_AT_ONCE, n_q)
            yield torch.cat([self._scores(*part, start, stop, centred) for part in self.parts])

    @staticmethod
    def _scores(
        query: Tensor, key: Tensor, mask: AttentionMask, scale: float, start: int, stop: int, centred: bool
    ) -> Tensor:
        b, h = query.shape[:2]
        scores = (query[:, :, start:stop] @ repeat_heads(key, h).mT) * scale
        mask = mask.queries(start, stop)
        keep = mask.dense_keep(stop - start, key.shape[-2], key.device)
        if mask.query_keep is not None:
            real = mask.query_keep[:, None, :, None]
            keep = real if keep is None else keep & real
        used = torch.ones((), dtype=torch.bool) if keep is None else keep
        used = used.expand(b, h, *scores.shape[-2:])
        scores = scores.masked_fill(~used, 0.0)  # not a product: padding may hold anything, NaN too
        if centred:
            means = scores.sum(-1, keepdim=True) / used.sum(-1, keepdim=True).clamp_min(1)
            scores = (scores - means).masked_fill(~used, 0.0)
        return scores

    def spectra(self, centred: bool) -> tuple[list[Spectrum], Spectrum]:
        """(spectra per head, spectrum of all heads together)."""
        query, key = self.parts[0][:2]
        heads, n_q, n_k = query.shape[1], query.shape[-2], key.shape[-2]
        dimensions = n_q * (n_k - int(centred))
        gram = self.gram(centred)
        per_head = [spectrum_of_gram(gram[h::heads, h::heads], dimensions) for h in range(heads) if self.held > 1]
        return per_head, spectrum_of_gram(gram, dimensions)


def pooled_matrix_spectrum(samples: list[MatrixSample], centred: bool, limit: int) -> Spectrum | None:
    """Spectrum of the matrices of several layers together, of at most about `limit` matrices.

    Returns:
        None if the layers have matrices of different sizes.
    """
    sizes = {(part[0].shape[-2], part[1].shape[-2]) for sample in samples for part in sample.parts}
    if len(sizes) != 1:
        return None
    heads = sum(sample.parts[0][0].shape[1] for sample in samples)
    each = max(1, min(min(sample.held for sample in samples), limit // heads))
    ((n_q, n_k),) = sizes
    total: np.ndarray | float = 0.0
    for blocks in zip(*(sample.blocks(centred) for sample in samples), strict=True):
        flat = torch.cat([block[:each].flatten(0, 1) for block in blocks]).flatten(1).double().numpy()
        total = total + flat @ flat.T
    return spectrum_of_gram(np.asarray(total), n_q * (n_k - int(centred)))


def _first(part: Tensor | None, count: int) -> Tensor | None:
    """The first sequences of a part of a mask, which may hold one row for the whole batch."""
    if part is None or part.dim() == 0 or part.shape[0] == 1:
        return part
    return part[:count].cpu()
