"""Streaming statistics equal those of all the data at once, and know only what the mask leaves."""

import pytest
import torch
from sklearn.decomposition import PCA

from approx_attn.attention import AttentionMask
from approx_attn.conversion.calibration import ContentMoments, PositionMoments, fit_position_basis

B, H, KV, N, D = 6, 4, 2, 9, 5
SCALE = 0.4


def draw(batch=B, n=N, key_heads=KV):
    generator = torch.Generator().manual_seed(n)
    query = torch.randn(batch, H, n, D, generator=generator, dtype=torch.float64)
    key = torch.randn(batch, key_heads, n, D, generator=generator, dtype=torch.float64)
    return query, key + torch.randn(batch, key_heads, 1, D, generator=generator, dtype=torch.float64)


def padding():
    """Samples of lengths N, N-1, ..., and whatever stands in the padding is NaN."""
    keep = torch.arange(N) < (N - torch.arange(B)[:, None])
    query, key = (x.masked_fill(~keep[:, None, :, None], float("nan")) for x in draw())
    return query, key, keep


def padding_mask(keep):
    return AttentionMask(key_keep=keep, query_keep=keep)


def in_batches(size, *tensors):
    return zip(*(t.split(size) for t in tensors), strict=True)


# -- content ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4, B])
def test_content_moments_are_those_of_all_sequences(size):
    query, key, keep = padding()
    moments = ContentMoments()
    for q, k, m in in_batches(size, query, key, keep):
        moments.update(q, k, padding_mask(m))
    second, covariance, mean = moments.statistics()
    for head in range(H):
        rows = query[:, head][keep]
        torch.testing.assert_close(second[head], rows.mT @ rows / len(rows))
    for head in range(KV):
        rows = key[:, head][keep]
        torch.testing.assert_close(mean[head], rows.mean(0))
        centred = torch.cat([key[s, head][keep[s]] - key[s, head][keep[s]].mean(0) for s in range(B)])
        torch.testing.assert_close(covariance[head], centred.mT @ centred / len(centred))


def test_content_moments_of_half_precision_inputs_are_in_float64():
    query, key = (x.bfloat16() for x in draw())
    moments = ContentMoments()
    moments.update(query, key, AttentionMask())
    assert {part.dtype for part in moments.statistics()} == {torch.float64}


def test_the_layer_pool_is_the_fit_to_all_heads_together():
    query, key = draw(key_heads=H)
    moments, joined = ContentMoments(), ContentMoments()
    moments.update(query, key, AttentionMask())
    joined.update(query.reshape(B * H, 1, N, D), key.reshape(B * H, 1, N, D), AttentionMask())
    pooled, expected = moments.fit("layer"), joined.fit()
    torch.testing.assert_close(pooled.singular_values, expected.singular_values)
    torch.testing.assert_close(pooled.query_map @ pooled.key_map.mT, expected.query_map @ expected.key_map.mT)


def test_fully_closed_queries_are_left_out():
    query, key = draw()
    keep = torch.ones(B, 1, N, N, dtype=torch.bool)
    keep[:, :, 0] = False
    moments = ContentMoments()
    moments.update(query, key, AttentionMask(pair_keep=keep))
    assert moments.queries == B * (N - 1)
    torch.testing.assert_close(
        moments.statistics()[0], torch.einsum("bhnd,bhne->hde", query[:, :, 1:], query[:, :, 1:]) / moments.queries
    )


@pytest.mark.parametrize(("offset", "queries", "keys"), [(0, 3, 3), (2, 3, 5), (-1, 2, 2)])
def test_a_causal_mask_over_fewer_queries_than_keys(offset, queries, keys):
    query, key = draw()
    query, key = query[:, :, :3], key[:, :, :5]
    moments = ContentMoments()
    moments.update(query, key, AttentionMask(causal=True, query_offset=offset))
    assert (moments.queries, moments.keys) == (B * queries, B * keys)
    used = query[:, :, 3 - queries :]
    torch.testing.assert_close(moments.statistics()[0], torch.einsum("bhnd,bhne->hde", used, used) / moments.queries)


# -- position --------------------------------------------------------------------------------------------


def rows_of(query, key, keep, alignment, centred, causal, length=N):
    """Every row of scores as (h, rows, P) with NaN where it has no entry: the definition, row by row."""
    positions = length if alignment == "absolute" else 2 * length - 1
    rows = []
    for s in range(len(query)):
        for i in range(query.shape[2]):
            row = torch.full((H, positions), float("nan"), dtype=torch.float64)
            usable = [j for j in range(key.shape[2]) if keep[s, j] and not (causal and j > i)]
            if not keep[s, i] or not usable:
                continue
            scores = torch.stack([query[s, h, i] @ key[s, h * KV // H, usable].mT for h in range(H)]) * SCALE
            scores = scores - scores.mean(-1, keepdim=True) if centred else scores
            row[:, [j if alignment == "absolute" else j - i + length - 1 for j in usable]] = scores
            rows.append(row)
    return torch.stack(rows, dim=1)


def naive_statistics(rows):
    """Mean and covariance over the rows that have the entries."""
    seen, values = (~rows.isnan()).double(), rows.nan_to_num()
    mean = values.sum(1) / seen.sum(1).clamp_min(1)
    pairs = seen.mT @ seen
    covariance = values.mT @ values / pairs.clamp_min(1) - mean[:, :, None] * mean[:, None]
    return mean, torch.where(pairs > 0, covariance, 0.0)


@pytest.mark.parametrize("alignment", ["absolute", "relative"])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_position_moments_are_those_of_all_rows(alignment, centred, causal):
    query, key, keep = padding()
    moments = PositionMoments(alignment, centred=centred)
    for q, k, m in in_batches(4, query, key, keep):
        moments.update(q, k, AttentionMask(key_keep=m, query_keep=m, causal=causal), SCALE)
    rows = rows_of(query, key, keep, alignment, centred, causal)
    for got, expected in zip(moments.statistics(), naive_statistics(rows), strict=True):
        torch.testing.assert_close(got, expected)
    assert moments.seen_rows == H * int(keep.sum())
    pooled = naive_statistics(rows.reshape(1, -1, rows.shape[-1]))
    for got, expected in zip(moments.statistics("layer"), pooled, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("alignment", ["absolute", "relative"])
def test_longer_inputs_make_room(alignment):
    short, long = draw(n=5), draw(n=N)
    moments = PositionMoments(alignment)
    for query, key in (short, long, short):
        moments.update(query, key, AttentionMask(), SCALE)
    everything = [
        rows_of(q, k, torch.ones(B, q.shape[2], dtype=torch.bool), alignment, True, False)
        for q, k in (short, long, short)
    ]
    for got, expected in zip(moments.statistics(), naive_statistics(torch.cat(everything, dim=1)), strict=True):
        torch.testing.assert_close(got, expected)


def test_masks_that_differ_between_heads():
    query, key = draw()
    keep = torch.ones(1, H, N, N, dtype=torch.bool)
    keep[:, 1, :, 3] = False
    moments = PositionMoments("absolute", centred=False)
    moments.update(query, key, AttentionMask(), SCALE)
    moments.update(query, key, AttentionMask(pair_keep=keep), SCALE)
    scores = (query @ key.repeat_interleave(H // KV, 1).mT * SCALE).transpose(0, 1).flatten(1, 2)
    torch.testing.assert_close(moments.statistics()[0], scores.mean(1))  # the second pass saw the same values


def test_a_draw_of_rows_is_seeded_and_bounded():
    query, key = draw()
    both = [PositionMoments("absolute", rows=3, seed=seed) for seed in (0, 0, 1)]
    for moments in both:
        moments.update(query, key, AttentionMask(), SCALE)
    assert both[0].seen_rows == 3 * B * H
    assert torch.equal(both[0].total, both[1].total)
    assert not torch.equal(both[0].total, both[2].total)


# -- the fit of a position basis -------------------------------------------------------------------------


def test_position_fit_is_probabilistic_pca():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(400, 12, generator=generator, dtype=torch.float64)
    rows = rows @ torch.randn(12, 12, generator=generator, dtype=torch.float64)
    pca = PCA(n_components=3).fit(rows.numpy())
    mean = rows.mean(0)
    covariance = (rows - mean).mT @ (rows - mean) / (len(rows) - 1)
    fit = fit_position_basis(mean[None], covariance[None], centred=False, max_rank=6)
    torch.testing.assert_close(fit.eigenvalues[0, :3], torch.from_numpy(pca.explained_variance_))
    own_mean, basis, latent, noise = fit.cut(3)
    torch.testing.assert_close(own_mean[0], mean)
    assert noise.item() == pytest.approx(pca.noise_variance_)
    model = basis[0] @ latent[0].diag() @ basis[0].mT + noise * torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(model, torch.from_numpy(pca.get_covariance()))


def test_planted_rows_are_recovered():
    """Rows from a 2-dimensional space plus noise: rank, space and noise come back."""
    generator = torch.Generator().manual_seed(0)
    n, sigma = 16, 0.1
    space = torch.linalg.qr(torch.randn(n, 2, generator=generator, dtype=torch.float64))[0]
    space = torch.linalg.qr(space - space.mean(0))[0]
    rows = 3.0 * torch.randn(20000, 2, generator=generator, dtype=torch.float64) @ space.mT
    rows = rows + sigma * torch.randn(20000, n, generator=generator, dtype=torch.float64)
    rows = rows - rows.mean(-1, keepdim=True)
    mean = rows.mean(0)
    fit = fit_position_basis(mean[None], ((rows - mean).mT @ (rows - mean) / len(rows))[None], centred=True)
    _, basis, _, noise = fit.cut(2)
    assert noise.item() == pytest.approx(sigma**2, rel=0.02)
    overlap = torch.linalg.svdvals(space.mT @ basis[0] / n**0.5)
    assert overlap.min() > 0.999


def test_a_rank_beyond_the_stored_one_is_refused():
    fit = fit_position_basis(torch.zeros(1, 4), torch.eye(4)[None], centred=False, max_rank=2)
    with pytest.raises(ValueError, match="2 columns, rank=3"):
        fit.cut(3)
