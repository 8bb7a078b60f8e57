"""Principal components: planted truth, scikit-learn's PCA, probabilistic PCA's noise."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA

from approx_attn.diagnosis.analysis import centre_rows, pca, spectrum_of_covariance, subspace_overlap


def planted(count: int, features: int, rank: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Samples of a `rank`-dimensional subspace with standard deviations 3, 2.9, … plus noise, and its basis."""
    generator = np.random.default_rng(seed)
    basis = np.linalg.qr(generator.standard_normal((features, rank)))[0]
    strength = 3.0 - 0.1 * np.arange(rank)
    samples = generator.standard_normal((count, rank)) * strength @ basis.T
    return 5.0 + samples + noise * generator.standard_normal((count, features)), basis


@pytest.mark.parametrize("method", ["covariance", "gram", "randomised"])
def test_equals_scikit_learn(method: str) -> None:
    samples, _ = planted(60, 40, 5, 0.3)
    mine = pca(samples, method=method, rank=8)
    theirs = PCA(n_components=8, svd_solver="full").fit(samples)
    tolerance = 1e-3 if method == "randomised" else 1e-9
    np.testing.assert_allclose(mine.eigenvalues[:5], theirs.explained_variance_[:5], rtol=tolerance)
    np.testing.assert_allclose(mine.explained[:5], theirs.explained_variance_ratio_[:5].cumsum(), rtol=tolerance)
    assert mine.vectors is not None
    assert subspace_overlap(mine.vectors, theirs.components_.T, rank=5) == pytest.approx(1.0, abs=tolerance)


def test_noise_is_that_of_probabilistic_pca() -> None:
    samples, _ = planted(500, 20, 4, 0.5)
    spectrum = pca(samples)
    assert spectrum.noise(4) == pytest.approx(spectrum.eigenvalues[4:].mean(), rel=1e-9)
    assert spectrum.noise(4) == pytest.approx(PCA(n_components=4).fit(samples).noise_variance_, rel=1e-6)
    assert pca(samples, rank=4).noise(4) == pytest.approx(spectrum.noise(4), rel=1e-9)


@pytest.mark.parametrize("shape", [(4000, 64), (300, 900)])
def test_recovers_a_planted_subspace(shape: tuple[int, int]) -> None:
    """Rank exactly, subspace to an overlap of .99, noise to 5 per cent."""
    samples, basis = planted(*shape, rank=6, noise=0.1)
    spectrum = pca(samples, rank=20)
    gaps = spectrum.eigenvalues[:-1] / spectrum.eigenvalues[1:]
    assert int(gaps.argmax()) + 1 == 6
    assert spectrum.vectors is not None
    assert subspace_overlap(spectrum.vectors, basis, rank=6) > 0.99
    assert spectrum.noise(6) == pytest.approx(0.01, rel=0.05)


def test_effective_rank_and_components() -> None:
    flat = spectrum_of_covariance(np.diag([1.0] * 7 + [0.0] * 3), samples=100)
    assert flat.effective_rank == pytest.approx(7.0)
    assert (flat.components_for(1.0), flat.components_for(0.5)) == (7, 4)
    assert flat.explained_by(3) == pytest.approx(3 / 7)
    assert flat.explained_by(50) == pytest.approx(1.0)
    nothing = spectrum_of_covariance(np.zeros((3, 3)), samples=2)
    assert (nothing.effective_rank, nothing.explained_by(2), nothing.components_for(0.9)) == (0.0, 0.0, None)


def test_centred_rows_sum_to_zero() -> None:
    rows = np.random.default_rng(0).standard_normal((5, 7))
    np.testing.assert_allclose(centre_rows(rows).sum(-1), 0.0, atol=1e-12)
    np.testing.assert_allclose(np.diff(centre_rows(rows)), np.diff(rows))


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="samples must be"):
        pca(np.zeros((1, 4)))
    with pytest.raises(ValueError, match="method must be one of"):
        pca(np.zeros((3, 4)), method="svd")
    with pytest.raises(ValueError, match="rank must be given"):
        pca(np.zeros((3, 4)), method="randomised")
    with pytest.raises(ValueError, match="share must be"):
        pca(np.eye(4)).components_for(1.5)
    with pytest.raises(ValueError, match="rank must be at least 0"):
        pca(np.eye(4)).noise(4)
