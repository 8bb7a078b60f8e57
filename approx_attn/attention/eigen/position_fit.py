"""Probabilistic PCA and factor analysis of rows of scores over positions, from their mean and covariance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from approx_attn.attention.eigen.factor_analysis import fit_factors

COVARIANCE_COLUMNS = 64
"""Eigenvectors that are kept where a whole covariance is wanted, whose noise of single positions is fitted."""


@dataclass(frozen=True)
class PositionFit:
    """A fitted position basis over P positions; g is the number of heads, or 1 where they share.

    Attributes:
        mean: (g, P), the mean row.
        vectors: (g, P, R), orthonormal eigenvectors, largest eigenvalue first.
        eigenvalues: (g, R), eigenvalues of the covariance.
        variance: (g,), its trace.
        dimensions: (g,), directions that rows can vary in: positions seen, less the row mean if centred.
        variances: (g, P), the diagonal of the covariance; None in files that are older than factor analysis.
    """

    mean: Tensor
    vectors: Tensor
    eigenvalues: Tensor
    variance: Tensor
    dimensions: Tensor
    variances: Tensor | None = None

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

    def factors(self, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Factor analysis of this rank: (mean, basis, eigenvalues, noise (g, P)), columns as those of `cut`.

        The covariance it is fitted to is that of the stored eigenvectors with all variances on its diagonal, which is
        the whole one where as many columns are stored as there are positions.

        Raises:
            ValueError: a rank above the stored one, or no variances.
        """
        mean, basis, latent, shared = (part.double() for part in self.cut(rank))
        if self.variances is None:
            needs = "which attention.noise=position needs; calibrate again"
            raise ValueError(f"the position basis holds no variance of each position, {needs}.")
        statistics = (self.vectors.double(), self.eigenvalues.double(), self.variances.double())
        loadings, noise = fit_factors(*statistics, basis * latent.sqrt()[:, None], shared)
        vectors, singular, _ = torch.linalg.svd(loadings, full_matrices=False)
        positions = vectors.shape[-2]
        return mean, vectors * positions**0.5, singular.square() / positions, noise


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
        variances=covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).contiguous(),
    )
