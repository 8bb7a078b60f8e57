"""Spectra of covariances and inner products, and what they say about dimension, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of a covariance, largest first.

    Attributes:
        eigenvalues: (k,) variances along the first k principal axes; k may be less than all.
        variance: sum of all eigenvalues, those that are not held included.
        dimensions: directions that samples can vary in: features, less one if rows are centred.
        samples: how many samples the covariance is over. A spectrum never has more than samples − 1 components.
        vectors: (p, k) principal axes as columns, or None.
    """

    eigenvalues: Array
    variance: float
    dimensions: int
    samples: int
    vectors: Array | None = None

    @property
    def explained(self) -> Array:
        """(k,) share of the variance in the first 1 … k components; zeros if nothing varies."""
        return np.cumsum(self.eigenvalues) / self.variance if self.variance > 0 else np.zeros_like(self.eigenvalues)

    def explained_by(self, rank: int) -> float:
        """Share of the variance in the first `rank` components (all that are held, if fewer)."""
        return float(self.explained[min(rank, len(self.eigenvalues)) - 1]) if rank > 0 else 0.0

    def components_for(self, share: float) -> int | None:
        """The fewest components that hold this share of the variance; None if those held do not reach it."""
        if not 0.0 < share <= 1.0:
            raise ValueError(f"share must be in (0, 1], got {share!r}.")
        reached = np.flatnonzero(self.explained >= share - 1e-12)
        return int(reached[0]) + 1 if len(reached) else None

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the normalised spectrum (Roy and Vetterli, EUSIPCO 2007).

        Equals r for r equal eigenvalues. A lower bound where not all eigenvalues are held.
        """
        positive = self.eigenvalues[self.eigenvalues > 0]
        if self.variance <= 0 or len(positive) == 0:
            return 0.0
        shares = positive / self.variance
        return float(np.exp(-(shares * np.log(shares)).sum()))

    def noise(self, rank: int) -> float:
        """σ² of probabilistic PCA at this rank: the mean discarded eigenvalue (Tipping and Bishop 1999, eq. 8)."""
        if not 0 <= rank < self.dimensions:
            raise ValueError(f"rank must be at least 0 and below the {self.dimensions} dimensions, got {rank!r}.")
        return max(self.variance - float(self.eigenvalues[:rank].sum()), 0.0) / (self.dimensions - rank)


def spectrum_of_covariance(covariance: ArrayLike, *, samples: int, dimensions: int | None = None) -> Spectrum:
    """Spectrum of a covariance matrix (p, p), with its principal axes.

    Args:
        covariance: symmetric. From data with missing entries it need not be positive: negative eigenvalues,
            which are noise of the estimate, count as zero.
        samples: how many samples it is over.
        dimensions: directions samples can vary in; p if None.
    """
    matrix = np.asarray(covariance, dtype=np.float64)
    eigenvalues, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    eigenvalues = eigenvalues[::-1].clip(min=0.0)
    size = len(matrix) if dimensions is None else dimensions
    return Spectrum(eigenvalues, float(eigenvalues.sum()), size, samples, vectors[:, ::-1].copy())


def spectrum_of_gram(gram: ArrayLike, dimensions: int) -> Spectrum:
    """Spectrum from the inner products (N, N) of N samples, centred or not, whose mean is taken out here.

    Exact at any number of features, with N − 1 components at most; `dimensions` are the directions samples can vary in.
    """
    products = np.asarray(gram, dtype=np.float64)
    count = len(products)
    means = products.mean(axis=0)
    products = products - means - means[:, None] + means.mean()
    # The smallest eigenvalue is that of the mean taken out: zero.
    eigenvalues = np.linalg.eigh((products + products.T) / 2)[0][:0:-1].clip(min=0.0)
    variance = float(eigenvalues.sum()) / (count - 1)
    return Spectrum(eigenvalues[:dimensions] / (count - 1), variance, dimensions, count)
