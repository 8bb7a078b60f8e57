"""Streamed components of whole score matrices beside the covariance of all of them at once, in float64."""

import pytest
import torch

from approx_attn import AttentionMask, build_attention
from approx_attn.conversion.calibration import MatrixMoments

B, H, N, D = 40, 2, 6, 3
SCALE = 0.4


def draw(batch=B, n=N, seed=0):
    """Queries and keys whose matrices share a few directions, as those of a trained model do."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(2, 1, H, n, D, generator=generator, dtype=torch.float64)
    return shared + 0.5 * torch.randn(2, batch, H, n, D, generator=generator, dtype=torch.float64)


def padded(batch=B, n=N):
    """Lengths from 3 to n, and NaN in the padding."""
    keep = torch.arange(n) < 3 + torch.arange(batch)[:, None] % (n - 2)
    query, key = draw(batch, n).masked_fill(~keep[:, None, :, None], float("nan"))
    return query, key, keep


def stream(moments, query, key, size, keep=None, causal=False):
    for start in range(0, len(query), size):
        part = slice(start, start + size)
        own = None if keep is None else keep[part]
        moments.update(query[part], key[part], AttentionMask(causal=causal, key_keep=own, query_keep=own), SCALE)
    return moments


def naive(query, key, keep=None, causal=False):
    """(h, b, n²) row-centred matrices with NaN where a pair is closed, one query at a time."""
    b, h, n, _ = query.shape
    matrices = torch.full((h, b, n, n), float("nan"), dtype=torch.float64)
    for s in range(b):
        for i in range(n):
            open_keys = [j for j in range(n) if (keep is None or keep[s, j]) and (not causal or j <= i)]
            if keep is None or keep[s, i]:
                for head in range(h):
                    row = key[s, head, open_keys] @ query[s, head, i] * SCALE
                    matrices[head, s, i, open_keys] = row - row.mean()
    return matrices.flatten(2)


@pytest.mark.parametrize("size", [1, 7, B])
@pytest.mark.parametrize("scope", ["head", "layer"])
def test_with_room_for_all_components_the_covariance_is_that_of_all_matrices(size, scope):
    query, key = draw()
    fit = stream(MatrixMoments(N * N), query, key, size).fit(scope)
    matrices = naive(query, key)
    matrices = matrices if scope == "head" else matrices.flatten(0, 1)[None]
    covariance = torch.stack([torch.cov(group.mT, correction=0) for group in matrices])
    torch.testing.assert_close(fit.mean, matrices.mean(1))
    torch.testing.assert_close((fit.vectors * fit.eigenvalues[:, None]) @ fit.vectors.mT, covariance)
    torch.testing.assert_close(fit.variance, covariance.diagonal(dim1=1, dim2=2).sum(-1))
    assert fit.dimensions.tolist() == [N * (N - 1)] * len(fit.mean)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_a_sketch_with_less_room_says_what_it_misses(size):
    """Eigenvalues are lower bounds, no further off than the variance outside; the leading ones are close."""
    query, key = draw(batch=200)
    fit = stream(MatrixMoments(2), query, key, size).fit()  # 18 of 36 components have room
    for head, matrices in enumerate(naive(query, key)):
        covariance = torch.cov(matrices.mT, correction=0)
        true = torch.linalg.eigvalsh(covariance).flip(0)[:2]
        outside = fit.variance[head] - fit.eigenvalues[head].sum()
        assert (fit.eigenvalues[head] <= true * (1 + 1e-9)).all()
        assert (true - fit.eigenvalues[head] <= outside).all()
        torch.testing.assert_close(fit.eigenvalues[head], true, rtol=0.01, atol=0.0)
        torch.testing.assert_close(fit.variance[head], covariance.trace())
        captured = torch.einsum("pr,pq,qr->", fit.vectors[head], covariance, fit.vectors[head])
        assert captured > 0.999 * true.sum()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [1, 9])
def test_closed_pairs_count_nowhere(size, causal):
    query, key, keep = padded()
    fit = stream(MatrixMoments(N * N), query, key, size, keep, causal).fit()
    matrices = naive(query, key, keep, causal)
    seen = (~matrices.isnan()).sum(1)
    torch.testing.assert_close(fit.mean, matrices.nansum(1) / seen.clamp_min(1))
    variance = (matrices - fit.mean[:, None]).square().nansum(1) / seen.clamp_min(1)
    torch.testing.assert_close((fit.vectors.square() * fit.eigenvalues[:, None]).sum(-1), variance)


def test_longer_inputs_make_room_and_layers_pool():
    short, long = draw(n=4), draw(n=N)
    moments = stream(stream(MatrixMoments(N * N), *short, 9), *long, 9)
    entries = torch.full((H, B, N, N), float("nan"), dtype=torch.float64)
    entries[..., :4, :4] = naive(*short).unflatten(-1, (4, 4))
    joined = torch.cat([entries.flatten(2), naive(*long)], dim=1)
    torch.testing.assert_close(moments.fit().mean, joined.nanmean(1))

    layers = [stream(MatrixMoments(N * N), *draw(seed=seed), 9) for seed in (1, 2)]
    together = stream(MatrixMoments(N * N), *torch.cat([draw(seed=1), draw(seed=2)], dim=1), 9)
    pooled, expected = MatrixMoments.fit_model(layers), together.fit("layer")
    torch.testing.assert_close(pooled.mean, expected.mean)
    torch.testing.assert_close(pooled.eigenvalues, expected.eigenvalues)
    assert MatrixMoments.fit_model([layers[0], stream(MatrixMoments(4), *short, 9)]) is None


@pytest.mark.parametrize("factor_rank", [1, N])
def test_eigen_matrix_starts_from_the_fit(factor_rank):
    """Its prior has the covariance of the matrices; what low-rank factors cannot hold has become noise."""
    query, key = draw()
    moments = stream(MatrixMoments(4), query, key, 8)
    options = {"num_heads": H, "head_dim": D, "max_length": N, "rank": 3, "factor_rank": factor_rank, "share": "head"}
    mechanism = build_attention("eigen_matrix", **options).double()
    mechanism.load_fit(moments.fit)
    mean, basis, latent, noise = moments.fit("head").cut(3)
    components = torch.einsum("grip,grjp->grij", mechanism.left, mechanism.right).flatten(2).detach()
    whole = torch.cat([basis, mean[..., None]], dim=-1).mT
    lost = (whole - components).square().mean(-1)
    assert (lost.max() < 1e-12) == (factor_rank == N)
    expected = noise + (lost[:, :-1] * latent).sum(-1) + lost[:, -1]
    torch.testing.assert_close(mechanism.log_noise.exp().detach(), expected)
    torch.testing.assert_close(mechanism.log_eigenvalues.exp().detach(), latent)
    short = build_attention("eigen_matrix", **options | {"max_length": N - 1})
    with pytest.raises(ValueError, match=f"one of {N} × {N} scores, the mechanism has max_length={N - 1}"):
        short.load_fit(moments.fit)
