"""How much two subspaces have in common, and how much random ones would.

Plain functions on arrays. Bases are (p, k) with orthonormal columns, most important first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def subspace_overlap(a: ArrayLike, b: ArrayLike, rank: int | None = None) -> float:
    """Mean squared cosine of the principal angles: 1 for equal subspaces, 0 for orthogonal ones.

    With r columns each this is ‖AᵀB‖²_F / r, the share of one subspace that lies in the other.

    Args:
        a, b: (p, k) with orthonormal columns.
        rank: leading columns taken of both; all if None.

    Raises:
        ValueError: bases of different shape.
    """
    return float(overlap_matrix([a], rank, [b])[0, 0])


def overlap_matrix(bases: Sequence[ArrayLike], rank: int | None, others: Sequence[ArrayLike] | None = None) -> Array:
    """(len(bases), len(others)) overlaps of leading `rank`-dimensional subspaces; `others` is `bases` if None."""
    left = [np.asarray(basis, dtype=np.float64)[:, :rank] for basis in bases]
    right = left if others is None else [np.asarray(basis, dtype=np.float64)[:, :rank] for basis in others]
    for basis in (*left, *right):
        if basis.shape != left[0].shape:
            raise ValueError(f"bases must have one shape up to rank={rank}, got {left[0].shape} and {basis.shape}.")
    beside = np.concatenate(right, axis=1)  # (p, others · rank)
    size = left[0].shape[1]
    squares = (np.square(basis.T @ beside) for basis in left)  # (rank, others · rank)
    return np.stack([square.reshape(size, len(right), -1).sum(axis=(0, 2)) for square in squares]) / size


@dataclass(frozen=True)
class RandomOverlap:
    """Overlap of two independent random subspaces of one rank: mean and standard deviation over draws."""

    rank: int
    mean: float
    std: float


def random_overlap(dimensions: int, rank: int, *, draws: int = 50, seed: int = 0) -> RandomOverlap:
    """The baseline: overlap of independent uniformly random subspaces. Its expectation is rank / dimensions.

    Args:
        dimensions: of the space; for centred rows of n scores that is n − 1.
        rank: of both subspaces.
        draws: pairs drawn for the spread.
        seed: of the draw.
    """
    if not 0 < rank <= dimensions:
        raise ValueError(f"rank must be positive and at most the {dimensions} dimensions, got {rank!r}.")
    generator = np.random.default_rng(seed)
    # One of the two may be fixed to the first axes: only their relation is random.
    values = [
        np.square(np.linalg.qr(generator.standard_normal((dimensions, rank)))[0][:rank]).sum() / rank
        for _ in range(draws)
    ]
    return RandomOverlap(rank, float(np.mean(values)), float(np.std(values, ddof=1)))


def pairs_above_diagonal(matrix: ArrayLike) -> Array:
    """The entries of a square matrix that compare two different things."""
    matrix = np.asarray(matrix, dtype=np.float64)
    return matrix[np.triu_indices(len(matrix), k=1)]
