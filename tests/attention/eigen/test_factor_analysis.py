"""Factor analysis of rows: the likelihood against its definition, and noise that was planted."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from approx_attn import AttentionMask, build_attention
from approx_attn.attention.eigen.basis_file import Calibration, LayerShape, as_float32
from approx_attn.attention.eigen.factor_analysis import log_likelihood
from approx_attn.conversion.calibration import PositionMoments, fit_position_basis

P, RANK = 12, 2
NOISE = torch.linspace(math.log(0.05), math.log(4.0), P, dtype=torch.float64).exp()[torch.arange(0, 5 * P, 5) % P]


def planted(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows (rows, P) with an offset each, and the loadings (P, RANK) they were drawn with."""
    loadings = torch.randn(P, RANK, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(rows, RANK, generator=generator, dtype=torch.float64)
    noise = torch.randn(rows, P, generator=generator, dtype=torch.float64) * NOISE.sqrt()
    offset = 3 * torch.randn(rows, 1, generator=generator, dtype=torch.float64)
    return offset + 0.5 + factors @ loadings.mT + noise, loadings


def fitted(rows: Tensor):
    """The basis of rows as calibration fits it: to the covariance of centred rows."""
    centred = rows - rows.mean(-1, keepdim=True)
    mean = centred.mean(0)
    return fit_position_basis(mean[None], torch.cov(centred.T, correction=0)[None], centred=True)


def test_likelihood_is_that_of_orthonormal_contrasts():
    generator = torch.Generator().manual_seed(3)
    rows, mean, noise = (torch.randn(5, P, generator=generator, dtype=torch.float64) for _ in range(3))
    loadings = torch.randn(P, 3, generator=generator, dtype=torch.float64)
    mean, noise = mean[0], noise[0].exp()
    keep = torch.rand(5, P, generator=generator) < 0.7
    keep[4] = False
    keep[4, 0] = True
    found = log_likelihood(rows.masked_fill(~keep, float("nan")), keep, mean, loadings, noise)
    assert found[4] == 0
    for row, kept, likelihood in zip(rows[:4], keep, found, strict=False):
        contrasts = torch.linalg.svd(torch.ones(1, int(kept.sum()), dtype=torch.float64))[2][1:]
        covariance = contrasts @ (loadings @ loadings.mT + noise.diag())[kept][:, kept] @ contrasts.mT
        normal = torch.distributions.MultivariateNormal(contrasts @ mean[kept], covariance)
        torch.testing.assert_close(likelihood, normal.log_prob(contrasts @ row[kept]))


def test_planted_noise_and_loadings_are_found():
    rows, loadings = planted(40_000, seed=1)
    _, basis, eigenvalues, noise = fitted(rows).factors(RANK)
    torch.testing.assert_close(noise[0], NOISE, rtol=0.1, atol=0.02)
    torch.testing.assert_close(basis[0].mT @ basis[0], P * torch.eye(RANK, dtype=torch.float64))
    found = (basis * eigenvalues[:, None]) @ basis.mT
    centre = torch.eye(P, dtype=torch.float64) - 1 / P
    error = (centre @ (found[0] - loadings @ loadings.mT) @ centre).norm() / (loadings @ loadings.mT).norm()
    assert error < 0.05


def test_held_out_rows_are_likelier_than_under_probabilistic_pca():
    fit, (rows, loadings) = fitted(planted(2000, seed=1)[0]), planted(2000, seed=2)
    keep = torch.ones_like(rows, dtype=torch.bool)

    def mean_likelihood(mean: Tensor, basis: Tensor, eigenvalues: Tensor, noise: Tensor) -> float:
        scaled = (basis * eigenvalues.sqrt()[:, None])[0]
        return float(log_likelihood(rows, keep, mean[0], scaled, noise[0].expand(P)).mean())

    truth = float(log_likelihood(rows, keep, torch.zeros(P, dtype=torch.float64), loadings, NOISE).mean())
    pca, factors = mean_likelihood(*fit.cut(RANK)), mean_likelihood(*fit.factors(RANK))
    assert pca + 1.0 < factors < truth
    assert truth - factors < 0.05


def test_a_shared_noise_is_what_factor_analysis_finds_where_there_is_one():
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(50_000, P, generator=generator, dtype=torch.float64)
    rows = rows + torch.randn(len(rows), 1, generator=generator, dtype=torch.float64) * torch.arange(P)
    fit = fitted(rows)
    torch.testing.assert_close(fit.factors(1)[3], fit.cut(1)[3][:, None].expand(1, P), rtol=0.05, atol=0)


def test_eigen_row_trusts_quiet_positions_more():
    """Calibrated on rows with planted noise, estimates come closer to exact scores than with one noise for all."""
    errors = {}
    for noise in ("shared", "position"):
        mechanism = build_attention("eigen_row", num_heads=1, head_dim=P, max_length=P, keep=6, rank=RANK, noise=noise)
        mechanism = mechanism.double()
        mechanism.load_fit(lambda scope: fitted(planted(4000, seed=1)[0]))
        rows = planted(500, seed=2)[0]  # the scores of these queries with keys that are unit vectors
        keys = torch.eye(P, dtype=torch.float64)[None, None]
        with torch.no_grad():
            _, weights = mechanism(rows[None, None], keys, keys, AttentionMask(), scale=1.0, need_weights=True)
        estimate, exact = weights[0, 0].log(), rows
        observed = list(mechanism.columns(P))
        hidden = [j for j in range(P) if j not in observed]
        difference = (estimate - estimate[:, observed].mean(-1, keepdim=True)) - (
            exact - exact[:, observed].mean(-1, keepdim=True)
        )
        assert float(difference[:, observed].abs().max()) < 1e-9
        errors[noise] = float(difference[:, hidden].square().mean())
    assert errors["position"] < 0.97 * errors["shared"]


def test_positions_that_were_never_seen_have_the_mean_noise():
    rows, _ = planted(4000, seed=1)
    rows = rows - rows[:, :9].mean(-1, keepdim=True)
    covariance = torch.zeros(1, P, P, dtype=torch.float64)
    covariance[0, :9, :9] = torch.cov(rows[:, :9].T)
    _, basis, eigenvalues, noise = fit_position_basis(rows.mean(0)[None], covariance, centred=True).factors(RANK)
    assert bool(noise.isfinite().all())
    torch.testing.assert_close(noise[0, 9:], noise[0, :9].mean().expand(3))
    assert bool((basis[0, 9:] * eigenvalues[0].sqrt() == 0).all())


def test_a_basis_of_an_earlier_file_is_refused_for_noise_of_positions(tmp_path):
    moments = PositionMoments("absolute")
    moments.update(torch.randn(2, 1, P, 4), torch.randn(2, 1, P, 4), AttentionMask(), 0.5)
    fit = replace(moments.fit(), variances=None)
    path = Calibration(as_float32("0.absolute.head.", fit), [LayerShape("a", 1, 1, 4, P)], ["absolute"]).save(
        tmp_path / "old.safetensors"
    )
    words = {"num_heads": 1, "head_dim": 4, "max_length": P, "keep": 6, "rank": 2, "basis": str(path)}
    build_attention("eigen_row", **words)
    with pytest.raises(ValueError, match=r"no variance of each position, which attention\.noise=position needs"):
        build_attention("eigen_row", **words, noise="position")
