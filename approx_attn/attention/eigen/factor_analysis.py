"""Factor analysis of rows over positions: noise of its own at every position, by EM, and the likelihood of rows.

Rows follow the model of `position_basis.py`, s = offset·1 + μ + W·c + ε with c ~ N(0, I) and ε_j ~ N(0, ψ_j). With
ψ_j = σ² it is probabilistic PCA (Tipping and Bishop 1999), whose maximum likelihood has a closed form; else it is
factor analysis, whose maximum EM climbs to (Ghojogh et al., arXiv 2101.00734). The offset has a flat prior: it is one
more factor, with loadings of one and no precision, and the likelihood is that of what does not depend on it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from approx_attn.attention.eigen.position_basis import centred_products

ITERATIONS, TOLERANCE = 500, 1e-4
LEAST_NOISE = 1e-3
"""Share of a position's variance below which its noise does not fall: a factor of its own would explain it all."""


def fit_factors(
    vectors: Tensor, eigenvalues: Tensor, variances: Tensor, loadings: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """EM for the loadings and the noise of every position, from the covariance V·diag(λ)·Vᵀ + diag(what it lacks).

    Args:
        vectors: (g, P, R), leading eigenvectors of the covariance; R = P says all.
        eigenvalues: (g, R).
        variances: (g, P), diagonal of the covariance; zero at positions that were never seen.
        loadings: (g, P, r), where EM starts.
        noise: (g,), likewise, for all positions.

    Returns:
        Loadings W (g, P, r) and noise ψ (g, P). A position that was never seen has no loadings and the mean noise.
    """
    seen = (variances > 0).to(variances.dtype)  # (g, P)
    least = LEAST_NOISE * variances
    missing = (variances - (vectors.square() * eigenvalues[:, None]).sum(-1)).clamp_min(0.0)
    psi = torch.maximum(noise[:, None] * seen, least)
    for _ in range(ITERATIONS):
        columns = torch.cat([seen[..., None], loadings], dim=-1)  # (g, P, r + 1), the offset first
        weighted = columns * (seen / psi.where(seen > 0, 1.0))[..., None]
        precision = weighted.mT @ columns
        precision.diagonal(dim1=-2, dim2=-1)[:, 1:] += 1.0
        spread = torch.linalg.pinv(precision, hermitian=True)  # of a group in which nothing varies, too
        gain = (weighted @ spread).mT  # (g, r + 1, P): the posterior mean of the factors is gain·(s − μ)
        cross = (vectors * eigenvalues[:, None]) @ (gain @ vectors).mT + missing[..., None] * gain.mT  # E[s zᵀ]
        second = spread + gain @ cross  # E[z zᵀ]
        explained = cross[..., 1:] - seen[..., None] * second[:, :1, 1:]
        loadings = (explained @ torch.linalg.pinv(second[:, 1:, 1:], hermitian=True)) * seen[..., None]
        columns = torch.cat([seen[..., None], loadings], dim=-1)
        residual = variances + (columns * (columns @ second - 2.0 * cross)).sum(-1)
        before, psi = psi, torch.maximum(residual, least)
        if bool(((psi - before).abs() <= TOLERANCE * before).all()):
            break
    mean = psi.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp_min(1.0)
    return loadings, psi.where(seen > 0, mean)


def log_likelihood(rows: Tensor, keep: Tensor, mean: Tensor, loadings: Tensor, noise: Tensor) -> Tensor:
    """Log-likelihood of rows, free of their offset, in nats.

    It is that of m − 1 orthonormal contrasts of the m entries a row has, whichever they are: the offset is integrated
    out. Probabilistic PCA and factor analysis are compared by it, also at different ranks.

    Args:
        rows: (..., n, P), anything where `keep` is false.
        keep: (..., n, P) bool, the entries that a row has.
        mean: (..., P) μ.
        loadings: (..., P, r) W.
        noise: (..., P) ψ.

    Returns:
        (..., n); zero for a row of less than two entries.
    """
    present = keep.to(noise.dtype)
    weight = present / noise[..., None, :]  # (..., n, P)
    total = weight.sum(-1, keepdim=True)  # (..., n, 1)
    safe = total.where(total > 0, 1.0)
    residual = (rows - mean[..., None, :]).masked_fill(~keep, 0.0)
    residual = residual - (weight * residual).sum(-1, keepdim=True) / safe
    outer = (loadings[..., :, None] * loadings[..., None, :]).flatten(-2)  # (..., P, r²)
    second = (weight @ outer).unflatten(-1, (loadings.shape[-1],) * 2)  # (..., n, r, r)
    precision = centred_products(second, (weight @ loadings) / safe, total)
    precision.diagonal(dim1=-2, dim2=-1).add_(1.0)
    moment = (weight * residual) @ loadings  # (..., n, r); the weighted mean of the residual is zero
    explained = (moment * torch.linalg.solve(precision, moment)).sum(-1)
    entries = present.sum(-1)
    determinant = (
        (present * noise.log()[..., None, :]).sum(-1)
        + safe[..., 0].log()
        + torch.linalg.slogdet(precision).logabsdet
        - entries.clamp_min(1.0).log()
    )
    squares = (weight * residual.square()).sum(-1) - explained
    likelihood = -0.5 * ((entries - 1.0) * math.log(2.0 * math.pi) + determinant + squares)
    return likelihood.where(entries > 1, 0.0)
