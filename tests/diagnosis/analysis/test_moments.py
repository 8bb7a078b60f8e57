"""Streaming moments of rows and samples of matrices, against the arrays written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from approx_attn.attention.mask import AttentionMask
from approx_attn.conversion.calibration.moments import PositionMoments
from approx_attn.diagnosis.analysis.moments import MatrixSample, RowMoments, pooled_matrix_spectrum
from approx_attn.diagnosis.analysis.overlap import subspace_overlap


def inputs(b: int = 3, h: int = 4, n: int = 10, d: int = 5, groups: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(b, h, n, d, generator=generator)
    return query, torch.randn(b, h // groups, n, d, generator=generator)


def score_rows(query: Tensor, key: Tensor, scale: float) -> np.ndarray:
    """(h, b·n, n)."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query.double() @ key.double().mT * scale
    return scores.transpose(0, 1).flatten(1, 2).numpy()


def centre_rows(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows, dtype=np.float64) - rows.mean(axis=-1, keepdims=True, dtype=np.float64)


def variances(samples: np.ndarray) -> np.ndarray:
    return np.asarray(PCA(svd_solver="full").fit(samples).explained_variance_)


@pytest.mark.parametrize("groups", [1, 2])
def test_spectra_are_those_of_the_rows(groups: int) -> None:
    batches = [inputs(groups=groups, seed=seed) for seed in range(3)]
    moments = {kind: RowMoments(centred=kind == "centred") for kind in ("raw", "centred")}
    for query, key in batches:
        for part in moments.values():
            part.update(query, key, AttentionMask(), 0.3)
    rows = np.concatenate([score_rows(query, key, 0.3) for query, key in batches], axis=1)
    for kind, samples in (("raw", rows), ("centred", centre_rows(rows))):
        for head, spectrum in enumerate(moments[kind].spectra("head")):
            np.testing.assert_allclose(spectrum.eigenvalues, variances(samples[head]), rtol=1e-6, atol=1e-9)
            assert (spectrum.samples, spectrum.dimensions) == (90, 10 if kind == "raw" else 9)
        (pooled,) = moments[kind].spectra("layer")
        np.testing.assert_allclose(pooled.eigenvalues, variances(samples.reshape(-1, 10)), rtol=1e-6, atol=1e-9)
        assert pooled.samples == 360


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("mask", ["padding", "causal", "pattern"])
def test_masked_rows_equal_the_long_way(mask: str, centred: bool) -> None:
    query, key = inputs()
    keep = torch.ones(3, 10, dtype=torch.bool)
    keep[0, 7:] = keep[2, :2] = False
    masks = {
        "padding": AttentionMask(key_keep=keep, query_keep=keep),
        "causal": AttentionMask(causal=True),
        "pattern": AttentionMask(pair_keep=torch.rand(1, 1, 10, 10) < 0.7),
    }
    key = key.masked_fill(~keep[:, None, :, None], float("nan")) if mask == "padding" else key
    short, long = RowMoments(centred=centred), PositionMoments("absolute", centred=centred)
    for part in (short, long):
        part.update(query, key, masks[mask], 0.5)
    torch.testing.assert_close(short.statistics()[0], long.statistics()[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(short.statistics()[1], long.statistics()[1], rtol=1e-5, atol=1e-6)
    assert short.seen_rows == long.seen_rows


def test_planted_rows_are_recovered() -> None:
    """Rows of a known 3-dimensional space plus noise: rank exactly, overlap above .99, noise to 5 per cent.

    Any matrix is a matrix of scores: queries are its rows and keys the unit vectors.
    """
    generator = torch.Generator().manual_seed(0)
    n, rank, noise = 32, 3, 0.2
    basis = np.linalg.qr(centre_rows(torch.randn(rank, n, generator=generator).numpy()).T)[0]
    moments = RowMoments(centred=True)
    for _ in range(8):
        latent = 4.0 * torch.randn(4, 2, n, rank, generator=generator).double()
        rows = latent @ torch.from_numpy(basis).T + noise * torch.randn(4, 2, n, n, generator=generator).double()
        offset = 7.0 * torch.randn(4, 2, n, 1, generator=generator).double()  # what softmax ignores
        moments.update(rows + offset, torch.eye(n).double().expand(4, 2, n, n), AttentionMask(), 1.0)
    (spectrum,) = moments.spectra("layer")
    ratios = spectrum.eigenvalues[:-2] / spectrum.eigenvalues[1:-1]  # the last one is zero: rows are centred
    assert int(ratios.argmax()) + 1 == rank
    assert spectrum.vectors is not None
    assert subspace_overlap(spectrum.vectors, basis, rank=rank) > 0.99
    assert spectrum.noise(rank) == pytest.approx(noise**2, rel=0.05)
    assert spectrum.noise(rank) == pytest.approx(spectrum.eigenvalues[rank : n - 1].mean())


@pytest.mark.parametrize("centred", [False, True])
def test_matrix_spectra_are_those_of_the_flattened_matrices(centred: bool) -> None:
    batches = [inputs(seed=seed, n=20) for seed in range(4)]
    sample = MatrixSample(8)  # of 12 sequences
    for query, key in batches:
        sample.update(query, key, AttentionMask(), 0.3)
    assert sample.held == 8
    matrices = np.concatenate([(q.double() @ k.double().mT * 0.3).numpy() for q, k in batches])[:8]  # (8, h, n, n)
    matrices = centre_rows(matrices) if centred else matrices
    per_head, pooled = sample.spectra(centred)
    for head, spectrum in enumerate(per_head):
        expected = variances(matrices[:, head].reshape(8, -1))[:-1]  # the mean takes one
        np.testing.assert_allclose(spectrum.eigenvalues, expected, rtol=1e-4, atol=1e-6)
    expected = variances(matrices.reshape(32, -1))[:-1]
    np.testing.assert_allclose(pooled.eigenvalues, expected, rtol=1e-4, atol=1e-6)
    assert (pooled.samples, pooled.dimensions) == (32, 20 * (19 if centred else 20))
    both = pooled_matrix_spectrum([sample, sample], centred, limit=32)
    assert both is not None
    assert both.samples == 32


def test_masked_matrix_entries_count_as_zero() -> None:
    query, key = inputs(n=6)
    causal, padded = MatrixSample(3), MatrixSample(3)
    keep = torch.ones(3, 6, dtype=torch.bool)
    keep[:, 4:] = False
    causal.update(query, key, AttentionMask(causal=True), 1.0)
    padded.update(query, key.masked_fill(~keep[:, None, :, None], float("nan")), AttentionMask(keep, keep), 1.0)
    scores = (query @ key.mT).double().numpy()
    lower = np.where(np.tril(np.ones((6, 6), dtype=bool)), scores, 0.0).reshape(12, -1)
    np.testing.assert_allclose(causal.gram(False), lower @ lower.T, rtol=1e-5)
    corner = scores[..., :4, :4].reshape(12, -1)
    np.testing.assert_allclose(padded.gram(False), corner @ corner.T, rtol=1e-5)
