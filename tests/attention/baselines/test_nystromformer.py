"""Nyströmformer: segments, the pseudo-inverse, the convolution, and another implementation of it.

The contract holds in tests/test_contract.py for every mechanism; here is what only this one has.
"""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from approx_attn.attention import AttentionMask, build_attention
from approx_attn.attention.baselines.nystromformer import iterative_pinv, segment_means
from helpers import assert_cost_is_performed, draw


def build(**options):
    torch.manual_seed(0)
    return build_attention("nystromformer", **{"num_heads": 2, "head_dim": 8, **options}).double()


def test_segments_are_even_and_skip_what_is_not_kept():
    x = torch.arange(10.0).view(1, 1, 10, 1)
    means, full = segment_means(x, None, 4)
    assert full is None
    assert means.flatten().tolist() == [1.0, 3.5, 6.0, 8.5]  # 0 1 2 | 3 4 | 5 6 7 | 8 9
    keep = torch.tensor([[True, False, True, True, False, True, True, True, True, False]])  # 0 2 3 5 6 7 8
    means, full = segment_means(x.masked_fill(~keep[:, None, :, None], float("nan")), keep, 3)
    assert means.flatten().tolist() == pytest.approx([5 / 3, 5.5, 7.5])  # 0 2 3 | 5 6 | 7 8
    assert full.all()
    means, full = segment_means(x, keep & (x[0, 0, :, 0] < 3), 4)
    assert means.flatten().tolist() == [0.0, 2.0, 0.0, 0.0]
    assert full.flatten().tolist() == [True, True, False, False]


@pytest.mark.parametrize(("rows", "columns"), [(6, 6), (4, 7), (7, 4)])
def test_pseudo_inverse_converges(rows, columns):
    torch.manual_seed(0)
    matrix = torch.randn(3, rows, columns, dtype=torch.float64).softmax(-1)
    torch.testing.assert_close(iterative_pinv(matrix, 40), torch.linalg.pinv(matrix))


def test_pseudo_inverse_of_a_matrix_among_others_and_among_zeros():
    torch.manual_seed(0)
    matrix = torch.randn(1, 5, 5, dtype=torch.float64).softmax(-1)
    alone = iterative_pinv(matrix, 6)
    torch.testing.assert_close(iterative_pinv(torch.cat((matrix, 100 * matrix)), 6)[:1], alone)
    framed = torch.nn.functional.pad(matrix, (0, 2, 0, 1))
    torch.testing.assert_close(iterative_pinv(framed, 6), torch.nn.functional.pad(alone, (0, 1, 0, 2)))
    assert (iterative_pinv(torch.zeros(2, 3, 3), 6) == 0).all()


def test_more_landmarks_come_nearer_to_exact():
    query, key, value = draw(64, dim=8)
    smooth = torch.linspace(0, 6, 64, dtype=torch.float64)[:, None] + torch.arange(8)
    query, key = query * 0.1 + smooth.sin(), key * 0.1 + smooth.cos()
    exact = scaled_dot_product_attention(query, key, value)
    errors = [
        float((build(num_landmarks=m, pinv_iterations=40)(query, key, value)[0] - exact).norm()) for m in (2, 8, 64)
    ]
    assert errors[0] > errors[1] > 1e3 * errors[2]


def test_queries_of_self_attention_are_padded_as_its_keys():
    """Without `query_keep`, as callers that only know a key padding mask arrive."""
    mechanism = build(num_landmarks=4)
    query, key, value = draw(12, dim=8)
    keep = torch.arange(12) < torch.tensor([[12], [7]])
    expected, _ = mechanism(query, key, value, AttentionMask(key_keep=keep, query_keep=keep))
    assert torch.equal(mechanism(query, key, value, AttentionMask(key_keep=keep))[0], expected)
    everything = torch.ones(2, 12, dtype=torch.bool)  # cross-attention of equal lengths says which queries are real
    other, _ = mechanism(query, key, value, AttentionMask(key_keep=keep, query_keep=everything))
    assert not torch.allclose(other[1], expected[1])


def test_convolution_is_added_over_real_positions():
    mechanism, plain = build(conv_kernel=5, num_landmarks=4), build(num_landmarks=4)
    query, key, value = draw(9, dim=8)
    keep = torch.arange(9) < torch.tensor([[9], [6]])
    mask = AttentionMask(key_keep=keep, query_keep=keep)
    added = mechanism(query, key, value, mask)[0] - plain(query, key, value, mask)[0]
    taps = mechanism.conv.weight[:, 0, :, 0]  # (h, 5)
    clean = value * keep[:, None, :, None]
    for i in range(9):
        near = [(j, j - i + 2) for j in range(max(i - 2, 0), min(i + 3, 9))]
        expected = sum(taps[None, :, t, None] * clean[:, :, j] for j, t in near)
        torch.testing.assert_close(added[:, :, i], expected)
    alone, _ = mechanism(query[1:, :, :6], key[1:, :, :6], value[1:, :, :6])
    torch.testing.assert_close(mechanism(query, key, value, mask)[0][1:, :, :6], alone)


def test_convolution_learns_and_refuses_cross_attention():
    mechanism = build(conv_kernel=3)
    query, key, value = draw(9, dim=8)
    mechanism(query, key, value)[0].square().sum().backward()
    assert mechanism.conv.weight.grad.abs().max() > 0
    with pytest.raises(ValueError, match=r"attention\.conv_kernel"):
        mechanism(query[:, :, :4], key, value)
    with torch.autocast("cpu", torch.bfloat16):
        assert mechanism.float()(*(x.float() for x in (query, key, value)))[0].isfinite().all()


def test_equals_nystrom_attention():
    package = pytest.importorskip("nystrom_attention")
    torch.manual_seed(0)
    # One sample and head: theirs scales the inverse by the largest matrix of the batch.
    theirs = package.NystromAttention(
        dim=8, dim_head=8, heads=1, num_landmarks=4, pinv_iterations=6, residual=True, residual_conv_kernel=5
    ).eval()
    mechanism = build(num_heads=1, num_landmarks=4, conv_kernel=5).float()
    mechanism.conv.load_state_dict(theirs.res_conv.state_dict())
    x = torch.randn(1, 24, 8)
    query, key, value = (part[:, None] for part in theirs.to_qkv(x).chunk(3, dim=-1))
    output, _ = mechanism(query, key, value)
    torch.testing.assert_close(theirs.to_out(output[:, 0]), theirs(x), rtol=1e-4, atol=1e-5)


def test_cost_counts_the_products():
    query, key, value = draw(30, dim=8)
    for mechanism, n_q in ((build(num_landmarks=6, conv_kernel=3), 30), (build(num_landmarks=20), 11)):
        assert_cost_is_performed(mechanism, (query[:, :, :n_q], key, value))
