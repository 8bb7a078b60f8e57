"""Probabilistic PCA of rows of scores over positions, from their mean and covariance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PositionFit:
    """A fitted position basis over P positions; g is the number of heads, or 1 where they share.

    Attributes:
        mean: (g, P), the mean row.
        vectors: (g, P, R), orthonormal eigenvectors, largest eigenvalue first.
        eigenvalues: (g, R), eigenvalues of the covariance.
        variance: (g,), its trace.
        dimensions: (g,), directions that rows can vary in: positions seen, less the row mean if centred.
    """

    mean: Tensor
    vectors: Tensor
    eigenvalues: Tensor
    variance: Tensor
    dimensions: Tensor

    def cut(self, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The probabilistic PCA of this rank: (mean, basis, eigenvalues, noise).

        The noise σ² is the mean of the discarded eigenvalues and the latent variances are what the kept ones
        exceed it by. Basis columns have norm √P, so that their entries are of order one and the returned
        eigenvalues are variances of single scores.

        Raises:
            ValueError: a rank above the stored one.
        """
        positions, stored = self.vectors.shape[1:]
        if rank > stored:
            raise ValueError(f"the position basis has {stored} columns, rank={rank} needs as many.")
        kept = self.eigenvalues[:, :rank]
        discarded = (self.variance - kept.sum(-1)).clamp_min(0.0)
        noise = discarded / (self.dimensions - rank).clamp_min(1.0)
        latent = (kept - noise[:, None]).clamp_min(0.0) / positions
        return self.mean, self.vectors[..., :rank] * positions**0.5, latent, noise


def fit_position_basis(mean: Tensor, covariance: Tensor, *, centred: bool, max_rank: int | None = None) -> PositionFit:
    """Eigenvectors of a covariance of rows.

    Args:
        mean: (g, P).
        covariance: (g, P, P). With missing entries it need not be positive: negative eigenvalues count as zero.
        centred: whether rows had their mean subtracted, which takes one direction from them.
        max_rank: columns kept; all if None.
    """
    covariance = (covariance + covariance.mT) / 2
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    eigenvalues, vectors = eigenvalues.flip(-1).clamp_min(0.0), vectors.flip(-1)
    rank = vectors.shape[-1] if max_rank is None else min(max_rank, vectors.shape[-1])
    seen = (covariance.diagonal(dim1=-2, dim2=-1) > 0).sum(-1).double()
    return PositionFit(
        mean=mean,
        vectors=vectors[..., :rank].contiguous(),
        eigenvalues=eigenvalues[..., :rank].contiguous(),
        variance=eigenvalues.sum(-1),
        dimensions=(seen - float(centred)).clamp_min(1.0),
    )
