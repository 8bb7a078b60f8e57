"""Principal components of arrays of samples, and what a spectrum says about dimension.

Plain functions on arrays (NumPy, or anything `numpy.asarray` takes), in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils.extmath import randomized_svd

Array = NDArray[np.float64]
METHODS = ("auto", "covariance", "gram", "randomised")
GRAM_LIMIT = 4096  # samples above which a Gram matrix costs more than it is worth


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


def centre_rows(rows: ArrayLike) -> Array:
    """Rows (..., n) less their own means: what softmax ignores is taken out."""
    rows = np.asarray(rows, dtype=np.float64)
    return rows - rows.mean(axis=-1, keepdims=True)


def pca(samples: ArrayLike, *, method: str = "auto", rank: int | None = None, seed: int = 0) -> Spectrum:
    """Principal components of samples (N, p); variances with divisor N − 1, as scikit-learn's PCA.

    Args:
        samples: one sample per row.
        method: `covariance` decomposes p × p, `gram` N × N, `randomised` sketches the first `rank` components
            (Halko, Martinsson and Tropp 2011; scikit-learn's). `auto` takes the smaller exact one, or the
            randomised one where both are above 4,096.
        rank: components held; all if None. `randomised` needs it.
        seed: of the sketch.

    Raises:
        ValueError: fewer than two samples, an unknown method, or no rank for a sketch.
    """
    samples = np.asarray(samples, dtype=np.float64)
    if samples.ndim != 2 or len(samples) < 2:
        raise ValueError(f"samples must be (N, p) with N of at least 2, got shape {samples.shape}.")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    count, features = samples.shape
    if method == "auto":
        small = "covariance" if features <= count else "gram"
        method = small if min(count, features) <= GRAM_LIMIT else "randomised"
    centred = samples - samples.mean(axis=0)
    if method == "covariance":
        return spectrum_of_covariance(centred.T @ centred / (count - 1), samples=count, rank=rank)
    if method == "gram":
        return spectrum_of_gram(centred @ centred.T, features, rank=rank, data=centred)
    if rank is None:
        raise ValueError("rank must be given with method='randomised'.")
    _, singular, axes = randomized_svd(centred, min(rank, count, features), random_state=seed)
    variance = float(np.square(centred).sum() / (count - 1))
    return Spectrum(np.square(singular) / (count - 1), variance, features, count, axes.T)


def spectrum_of_covariance(
    covariance: ArrayLike, *, samples: int, dimensions: int | None = None, rank: int | None = None
) -> Spectrum:
    """Spectrum of a covariance matrix (p, p).

    Args:
        covariance: symmetric. From data with missing entries it need not be positive: negative eigenvalues,
            which are noise of the estimate, count as zero.
        samples: how many samples it is over.
        dimensions: directions samples can vary in; p if None.
        rank: components held; all if None.
    """
    matrix = np.asarray(covariance, dtype=np.float64)
    eigenvalues, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    eigenvalues, vectors = eigenvalues[::-1].clip(min=0.0), vectors[:, ::-1]
    size = len(matrix) if dimensions is None else dimensions
    return Spectrum(eigenvalues[:rank].copy(), float(eigenvalues.sum()), size, samples, vectors[:, :rank].copy())


def spectrum_of_gram(
    gram: ArrayLike, dimensions: int, *, rank: int | None = None, data: ArrayLike | None = None
) -> Spectrum:
    """Spectrum from the inner products (N, N) of N samples, whose mean is taken out here.

    Exact at any number of features, and N − 1 components at most.

    Args:
        gram: inner products of the samples, centred or not.
        dimensions: directions samples can vary in.
        rank: components held; all if None.
        data: the centred samples (N, p), if the principal axes are wanted.
    """
    products = np.asarray(gram, dtype=np.float64)
    count = len(products)
    means = products.mean(axis=0)
    products = products - means - means[:, None] + means.mean()  # the samples' mean taken out
    eigenvalues, vectors = np.linalg.eigh((products + products.T) / 2)
    eigenvalues, vectors = eigenvalues[:0:-1].clip(min=0.0), vectors[:, :0:-1]  # the smallest is the mean's: zero
    held = min(len(eigenvalues), dimensions) if rank is None else min(rank, len(eigenvalues), dimensions)
    axes = None
    if data is not None:
        lengths = np.sqrt(eigenvalues[:held]).clip(min=1e-300)
        axes = np.asarray(data, dtype=np.float64).T @ vectors[:, :held] / lengths
    variance = float(eigenvalues.sum()) / (count - 1)
    return Spectrum(eigenvalues[:held] / (count - 1), variance, dimensions, count, axes)
