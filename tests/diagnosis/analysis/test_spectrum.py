"""Spectra: scikit-learn's PCA, and probabilistic PCA's noise."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA

from approx_attn.diagnosis.analysis.overlap import subspace_overlap
from approx_attn.diagnosis.analysis.spectrum import spectrum_of_covariance, spectrum_of_gram


def samples_of(count: int, features: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, features)) * np.linspace(3.0, 0.5, features) + 5.0


def test_spectra_equal_scikit_learn() -> None:
    samples = samples_of(60, 40)
    theirs = PCA().fit(samples)
    covariance = spectrum_of_covariance(np.cov(samples.T), samples=60)
    gram = spectrum_of_gram(samples @ samples.T, 40)
    for mine in (covariance, gram):
        np.testing.assert_allclose(mine.eigenvalues, theirs.explained_variance_, rtol=1e-6)
        np.testing.assert_allclose(mine.explained, theirs.explained_variance_ratio_.cumsum(), rtol=1e-6)
    assert covariance.vectors is not None
    assert subspace_overlap(covariance.vectors, theirs.components_.T, rank=5) == pytest.approx(1.0)


def test_noise_is_that_of_probabilistic_pca() -> None:
    samples = samples_of(500, 20)
    spectrum = spectrum_of_covariance(np.cov(samples.T), samples=500)
    assert spectrum.noise(4) == pytest.approx(spectrum.eigenvalues[4:].mean(), rel=1e-9)
    assert spectrum.noise(4) == pytest.approx(PCA(n_components=4).fit(samples).noise_variance_, rel=1e-6)


def test_effective_rank_and_components() -> None:
    flat = spectrum_of_covariance(np.diag([1.0] * 7 + [0.0] * 3), samples=100)
    assert flat.effective_rank == pytest.approx(7.0)
    assert (flat.components_for(1.0), flat.components_for(0.5)) == (7, 4)
    assert flat.explained_by(3) == pytest.approx(3 / 7)
    assert flat.explained_by(50) == pytest.approx(1.0)
    nothing = spectrum_of_covariance(np.zeros((3, 3)), samples=2)
    assert (nothing.effective_rank, nothing.explained_by(2), nothing.components_for(0.9)) == (0.0, 0.0, None)


def test_bad_input_is_named() -> None:
    spectrum = spectrum_of_covariance(np.eye(4), samples=4)
    with pytest.raises(ValueError, match="share must be"):
        spectrum.components_for(1.5)
    with pytest.raises(ValueError, match="rank must be at least 0"):
        spectrum.noise(4)
