"""Exact attention against PyTorch's own."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from approx_attn.attention import AttentionMask, AttentionShape
from approx_attn.attention.exact import ExactAttention

QUERY, KEY, VALUE = (torch.randn(2, 4, n, 8, generator=torch.Generator().manual_seed(n)) for n in (6, 9, 9))
BOOLEAN = torch.rand(2, 1, 6, 9, generator=torch.Generator().manual_seed(1)) > 0.2
FLOAT = torch.randn(4, 6, 9, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize(
    ("attn_mask", "is_causal"), [(None, False), (None, True), (BOOLEAN, False), (FLOAT, False)], ids=str
)
def test_equals_sdpa(attn_mask, is_causal, need_weights):
    mask = AttentionMask.from_attn_mask(attn_mask, is_causal=is_causal)
    output, weights = ExactAttention(AttentionShape(4, 8))(
        QUERY, KEY, VALUE, mask, scale=0.3, need_weights=need_weights
    )
    expected = F.scaled_dot_product_attention(QUERY, KEY, VALUE, attn_mask, is_causal=is_causal, scale=0.3)
    torch.testing.assert_close(output, expected)
    assert (weights is not None) == need_weights


def test_equals_sdpa_with_grouped_heads():
    key, value = KEY[:, :2], VALUE[:, :2]
    output, _ = ExactAttention(AttentionShape(4, 8, num_key_value_heads=2))(QUERY, key, value)
    torch.testing.assert_close(output, F.scaled_dot_product_attention(QUERY, key, value, enable_gqa=True))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n_q", "n_k", "window"), [(300, 300, 1), (300, 300, 150), (200, 290, 20), (290, 3, 100)])
def test_chunks_of_a_window_equal_one_dense_pass(n_q, n_k, window, causal):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 4, n, 8, generator=generator) for n in (n_q, n_k, n_k))
    key_keep = torch.arange(n_k) < torch.tensor([n_k, n_k // 2])[:, None]
    mask = AttentionMask(key_keep=key_keep, causal=causal, query_offset=n_k - n_q if n_k > 3 else 0, window=window)
    mechanism = ExactAttention(AttentionShape(4, 8))
    whole, _ = mechanism(query, key, value, mask, need_weights=True)
    torch.testing.assert_close(mechanism(query, key, value, mask)[0], whole)


def test_a_window_holds_no_array_of_all_pairs(kept_arrays):
    tensors = [torch.randn(1, 4, 2000, 8, requires_grad=True) for _ in range(3)]
    sizes = kept_arrays(ExactAttention(AttentionShape(4, 8)), tensors, AttentionMask(causal=True, window=100))
    assert sum(sizes) < 2000 * 2000 / 4


def test_cost_counts_the_products():
    mechanism = ExactAttention(AttentionShape(4, 8))
    with FlopCounterMode(display=False) as counter:
        mechanism(QUERY[:1], KEY[:1], VALUE[:1], need_weights=True)
    assert 2 * mechanism.cost(6, 9).multiply_adds == counter.get_total_flops()
    assert mechanism.cost(6, 9).exact_share == 1.0


@pytest.mark.parametrize(("n_q", "n_k", "pairs"), [(4, 4, 10), (1, 4, 4), (4, 2, 3)])
def test_cost_under_a_causal_mask_counts_lower_right_pairs(n_q, n_k, pairs):
    assert ExactAttention(AttentionShape(1, 8)).cost(n_q, n_k, causal=True).total_pairs == pairs
