"""Uniform attention: running sums against the dense form, additive masks, and what is held.

The contract holds in tests/test_contract.py for every mechanism; here is what only this one has.
"""

import pytest
import torch

from approx_attn.attention import AttentionMask, build_attention
from helpers import draw, held_sizes


@pytest.mark.parametrize(("n_q", "n_k", "offset"), [(7, 7, 0), (4, 9, 5), (9, 4, 0), (6, 6, -2), (3, 4, 9)])
def test_running_sums_equal_the_dense_weights(n_q, n_k, offset):
    mechanism = build_attention("uniform", num_heads=2, head_dim=4)
    tensors = draw(n_q, n_k)
    keep = torch.arange(n_k) < torch.tensor([[n_k], [n_k - 2]])
    for mask in (
        AttentionMask(causal=True, query_offset=offset),
        AttentionMask(causal=True, query_offset=offset, key_keep=keep),
        AttentionMask(key_keep=keep),
    ):
        expected, weights = mechanism(*tensors, mask, need_weights=True)
        torch.testing.assert_close(mechanism(*tensors, mask)[0], expected)
        used = weights[weights > 0]
        torch.testing.assert_close(1 / used, (1 / used).round())  # one over a whole number


def test_the_mean_of_what_is_kept():
    mechanism = build_attention("uniform", num_heads=2, head_dim=4)
    query, key, value = draw(5)
    torch.testing.assert_close(mechanism(query, key, value)[0][:, :, 3], value.mean(-2))
    causal = mechanism(query, key, value, AttentionMask(causal=True))[0]
    torch.testing.assert_close(causal[:, :, 2], value[:, :, :3].mean(-2))


def test_an_additive_mask_acts_as_on_zero_scores():
    mechanism = build_attention("uniform", num_heads=2, head_dim=4)
    query, key, value = draw(5)
    bias = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(mechanism(query, key, value, AttentionMask(bias=bias))[0], bias.softmax(-1) @ value)


@pytest.mark.parametrize("causal", [False, True])
def test_holds_nothing_of_size_n_by_n(causal):
    mechanism = build_attention("uniform", num_heads=1, head_dim=4, causal=causal)
    query, key, value = (torch.randn(1, 1, 512, 4, requires_grad=True) for _ in range(3))
    sizes = held_sizes(mechanism, query, key, value, AttentionMask(causal=causal))
    assert max(sizes) <= 513 * 5


def test_dropout_keeps_the_mean():
    mechanism = build_attention("uniform", num_heads=2, head_dim=4).train()
    torch.manual_seed(0)
    query, key, value = (x[:1].expand(4000, -1, -1, -1) for x in draw(4))
    for mask in (AttentionMask(), AttentionMask(causal=True)):
        dropped, _ = mechanism(query, key, value, mask, dropout_p=0.25)
        expected, _ = mechanism(query[:1], key[:1], value[:1], mask)
        torch.testing.assert_close(dropped.mean(0), expected[0], rtol=0.0, atol=0.06)
