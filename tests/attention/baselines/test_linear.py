"""Linear attention and the products of features: chunks, offsets, extremes, and what is held.

The contract holds in tests/test_contract.py for every mechanism; here is what only this one has.
"""

import pytest
import torch

from approx_attn.attention import AttentionMask, build_attention
from approx_attn.attention.base import Request
from approx_attn.attention.baselines import linear as linear_module
from approx_attn.attention.baselines.linear import feature_attention, feature_weights, log_elu_plus_one


def features(n_q, n_k, count=5, dim=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(n_q * 100 + n_k)
    shapes = ((2, 2, n_q, count), (2, 2, n_k, count), (2, 2, n_k, dim))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def by_pairs(log_query, log_key, value, mask):
    """Every weight from its own sum over the features, every output from its own sum over the keys."""
    n_q, n_k = log_query.shape[-2], log_key.shape[-2]
    keep = mask.dense_keep(n_q, n_k, value.device)
    keep = torch.ones(1, 1, n_q, n_k, dtype=torch.bool) if keep is None else keep
    keep = keep.expand(*log_query.shape[:2], n_q, n_k)
    output = torch.zeros(*log_query.shape[:-1], value.shape[-1], dtype=value.dtype)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in log_query.shape[:3])).tolist():
        weights = [float(keep[b, h, i, j]) * (log_query[b, h, i] + log_key[b, h, j]).exp().sum() for j in range(n_k)]
        if keep[b, h, i].any():
            output[b, h, i] = sum(w * value[b, h, j] for j, w in enumerate(weights)) / sum(weights)
    return output


@pytest.mark.parametrize("chunk", [1, 4, 128])
@pytest.mark.parametrize(("n_q", "n_k", "offset"), [(9, 9, 0), (5, 9, 4), (9, 5, 0), (9, 9, -3), (4, 11, 2), (3, 5, 9)])
def test_causal_chunks_equal_the_sum_over_pairs(monkeypatch, chunk, n_q, n_k, offset):
    monkeypatch.setattr(linear_module, "CHUNK_SIZE", chunk)
    key_keep = torch.arange(n_k) < torch.tensor([[n_k], [n_k - 2]])
    for mask in (
        AttentionMask(causal=True, query_offset=offset),
        AttentionMask(causal=True, query_offset=offset, key_keep=key_keep),
    ):
        tensors = features(n_q, n_k)
        output, _ = feature_attention(*tensors, Request(mask, 1.0))
        torch.testing.assert_close(output, by_pairs(*tensors, mask))
        torch.testing.assert_close(feature_weights(*tensors[:2], mask) @ tensors[2], output)


@pytest.mark.parametrize(("causal", "size"), [(False, 1000.0), (True, 20.0)])
def test_features_of_any_size_neither_overflow_nor_vanish(monkeypatch, causal, size):
    """exp(±700) is far outside float32; factors on single queries cancel, those on features are taken up."""
    monkeypatch.setattr(linear_module, "CHUNK_SIZE", 4)
    log_query, log_key, value = features(10, 10)
    mask = AttentionMask(causal=causal)
    expected, _ = feature_attention(log_query, log_key, value, Request(mask, 1.0))
    shift = size * torch.tensor([1.0, -1.0, 0.5, 0.0, -0.2])
    shifted = (log_query - shift - 700.0).float(), (log_key + shift + 700.0).float(), value.float()
    output, _ = feature_attention(*shifted, Request(mask, 1.0))
    torch.testing.assert_close(output.double(), expected, rtol=1e-3, atol=1e-3)


def test_a_first_key_has_all_the_weight_even_where_its_products_vanish():
    """Queries and keys that favour features e^±500 apart: each causal row still is a mean of values it may see."""
    log_query, log_key, value = features(6, 6, count=2, dtype=torch.float32)
    apart = torch.tensor([500.0, -500.0])
    tensors = [x.requires_grad_() for x in (log_query + apart, log_key - apart, value)]
    output, _ = feature_attention(*tensors, Request(AttentionMask(causal=True), 1.0))
    torch.testing.assert_close(output[..., 0, :], value[..., 0, :])
    assert (output.amax(-2) <= value.amax(-2) + 1e-5).all()
    output.sum().backward()
    assert all(x.grad.isfinite().all() for x in tensors)


def test_gradients_through_chunks(monkeypatch):
    monkeypatch.setattr(linear_module, "CHUNK_SIZE", 3)
    tensors = [x[:1, :1].clone().requires_grad_() for x in features(7, 7, count=2, dim=2)]
    for mask in (AttentionMask(), AttentionMask(causal=True), AttentionMask(causal=True, query_offset=-2)):
        assert torch.autograd.gradcheck(lambda *t, mask=mask: feature_attention(*t, Request(mask, 1.0))[0], tensors)


def test_later_keys_leave_earlier_outputs_alone(monkeypatch):
    """However loud they are, inside a chunk or beyond it."""
    monkeypatch.setattr(linear_module, "CHUNK_SIZE", 4)
    log_query, log_key, value = features(12, 12, dtype=torch.float32)
    mask = AttentionMask(causal=True)
    before, _ = feature_attention(log_query, log_key, value, Request(mask, 1.0))
    louder = torch.cat((log_key[..., :6, :], log_key[..., 6:, :] + 300.0), dim=-2)
    after, _ = feature_attention(log_query, louder, value, Request(mask, 1.0))
    assert torch.equal(before[..., :6, :], after[..., :6, :])


@pytest.mark.parametrize("causal", [False, True])
def test_holds_nothing_of_size_n_by_n_or_n_by_m_by_d(causal):
    n, dim = 1024, 8
    mechanism = build_attention("linear", num_heads=1, head_dim=dim, causal=causal)
    query, key, value = (torch.randn(1, 1, n, dim, requires_grad=True) for _ in range(3))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        mechanism(query, key, value, AttentionMask(causal=causal))
    assert max(sizes) <= n * max(dim + 1, linear_module.CHUNK_SIZE // 8)


def test_log_features():
    x = torch.tensor([-200.0, -1.0, -0.0, 0.0, 0.5, 1e6], dtype=torch.float64)
    torch.testing.assert_close(log_elu_plus_one(x)[1:], (torch.nn.functional.elu(x) + 1).log()[1:])
    assert log_elu_plus_one(x)[0] == -200.0  # where elu(x) + 1 has lost all its digits
    y = torch.tensor([-2.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    log_elu_plus_one(y).sum().backward()
    torch.testing.assert_close(y.grad, torch.tensor([1.0, 1.0, 1 / 3], dtype=torch.float64))


def test_scale_cancels():
    mechanism = build_attention("linear", num_heads=2, head_dim=4)
    query, key, value = (torch.randn(1, 2, 6, 4) for _ in range(3))
    assert torch.equal(mechanism(query, key, value, scale=0.1)[0], mechanism(query, key, value, scale=7.0)[0])


def test_dropout_keeps_the_mean():
    mechanism = build_attention("linear", num_heads=1, head_dim=4).train()
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, n, 4).expand(4000, 1, n, 4) for n in (3, 6, 6))
    dropped, _ = mechanism(query, key, value, dropout_p=0.25)
    kept = mechanism.eval()(query, key, value)[0]
    torch.testing.assert_close(dropped.mean(0), kept.mean(0), rtol=0.0, atol=0.05)


def test_cost_counts_the_products():
    from torch.utils.flop_counter import FlopCounterMode

    mechanism = build_attention("linear", num_heads=2, head_dim=8)
    query, key, value = (torch.randn(1, 2, n, 8) for n in (300, 200, 200))
    with FlopCounterMode(display=False) as counter:
        mechanism(query, key, value)
    assert counter.get_total_flops() == 2 * mechanism.cost(300, 200).multiply_adds
    with FlopCounterMode(display=False) as counter:
        mechanism(query, query, query, AttentionMask(causal=True))
    counted = mechanism.cost(300, causal=True).multiply_adds
    assert counter.get_total_flops() == pytest.approx(2 * counted, rel=0.15)  # the last chunk is shorter
