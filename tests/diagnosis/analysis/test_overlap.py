"""Overlap of subspaces: known angles, invariances, the random baseline."""

from __future__ import annotations

import numpy as np
import pytest

from approx_attn.diagnosis.analysis.overlap import overlap_matrix, random_overlap, subspace_overlap


def basis(dimensions: int, rank: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((dimensions, rank)))[0]


def test_known_angle() -> None:
    angle = 0.4
    a = np.eye(3)[:, :2]
    b = np.array([[1.0, 0.0], [0.0, np.cos(angle)], [0.0, np.sin(angle)]])
    assert subspace_overlap(a, b) == pytest.approx((1.0 + np.cos(angle) ** 2) / 2)


def test_depends_on_the_subspace_and_not_on_its_basis() -> None:
    a, b = basis(20, 4, 0), basis(20, 4, 1)
    turned = b @ basis(4, 4, 2)
    assert subspace_overlap(a, turned) == pytest.approx(subspace_overlap(a, b))
    assert subspace_overlap(a, a @ basis(4, 4, 3)) == pytest.approx(1.0)
    assert subspace_overlap(np.eye(8)[:, :3], np.eye(8)[:, 4:7]) == pytest.approx(0.0)


def test_matrix_is_all_pairs_at_a_rank() -> None:
    bases = [basis(12, 5, seed) for seed in range(3)]
    matrix = overlap_matrix(bases, 3)
    for i, j in np.ndindex(3, 3):
        assert matrix[i, j] == pytest.approx(subspace_overlap(bases[i], bases[j], rank=3))
    np.testing.assert_allclose(overlap_matrix(bases[:1], 3, bases[1:]), matrix[:1, 1:])


def test_random_baseline() -> None:
    """Its mean is rank / dimensions, and independent random subspaces lie within its spread."""
    baseline = random_overlap(60, 6, draws=400)
    assert baseline.mean == pytest.approx(0.1, abs=4 * baseline.std / 20)
    values = [subspace_overlap(basis(60, 6, 2 * seed), basis(60, 6, 2 * seed + 1)) for seed in range(100)]
    assert np.mean(values) == pytest.approx(baseline.mean, abs=0.4 * baseline.std)
    assert np.std(values) == pytest.approx(baseline.std, rel=0.3)
    assert random_overlap(5, 5).mean == pytest.approx(1.0)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="bases must have one shape"):
        overlap_matrix([basis(6, 2, 0), basis(7, 2, 0)], 2)
    with pytest.raises(ValueError, match="rank must be positive"):
        random_overlap(5, 6)
