"""eigen_linear: what the contract does not ask of every mechanism, in float64."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from approx_attn.attention import AttentionMask, build_attention
from approx_attn.attention.eigen.biased import attend_with_key_bias
from approx_attn.attention.eigen.linear import EigenLinearAttention, interpolation_weights
from helpers import assert_cost_is_performed, clear_padding, draw, naive_reference

B, H, D = 2, 2, 4
naive = naive_reference("eigen_linear")


def build(max_length: int = 9, num_keys: float | int = 4, dtype: torch.dtype = torch.float64, **options):
    mechanism = build_attention(
        "eigen_linear", num_heads=H, head_dim=D, max_length=max_length, num_keys=num_keys, **options
    )
    assert isinstance(mechanism, EigenLinearAttention)
    with torch.no_grad():
        noise = torch.randn(mechanism.log_reconstruction.shape, generator=torch.Generator().manual_seed(1))
        mechanism.log_reconstruction.add_(0.5 * noise)
    return mechanism.to(dtype)


def check(mechanism, tensors, mask):
    clean = clear_padding(tensors, mask)
    expected, expected_weights = naive.reconstruct(mechanism, *clean, mask, 1 / math.sqrt(D))
    output, weights = mechanism(*tensors, mask, need_weights=True)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(mechanism(*tensors, mask)[0], expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("lengths", ["truncate", "interpolate"])
@pytest.mark.parametrize(
    "kept",
    [range(5), range(3, 9), [1], [0, 3, 4, 8], []],
    ids=["right", "left", "nothing observed", "scattered", "nothing"],
)
def test_padding_equals_the_reference(lengths: str, kept: list[int]) -> None:
    for n in (9, 20):
        key_keep = torch.ones(B, n, dtype=torch.bool)
        key_keep[0] = False
        key_keep[0, list(kept)] = True
        check(build(lengths=lengths), draw(9, n), AttentionMask(key_keep=key_keep))


def test_it_is_attention_over_m_keys_with_pooled_values() -> None:
    mechanism = build()
    query, key, value = draw(9)
    weights, observed = mechanism.reconstruction(9, torch.float64)  # (h, n, m)
    mass = weights.sum(1)  # (h, m)
    pooled = torch.einsum("hjk,bhjd->bhkd", weights, value) / mass[..., None]
    bias = mass.log()[None, :, None].expand(B, H, 9, -1)
    expected = F.scaled_dot_product_attention(query, key[:, :, list(observed)], pooled, attn_mask=bias)
    torch.testing.assert_close(mechanism(query, key, value)[0], expected)


@pytest.mark.parametrize("num_keys", [9, 1.0, 64])
def test_all_keys_observed_is_exact(num_keys: float | int) -> None:
    query, key, value = draw(9)
    key_keep = torch.tensor([[True] * 9, [False] * 2 + [True] * 5 + [False] * 2])
    exact = build_attention("exact", num_heads=H, head_dim=D)
    for mask in (AttentionMask(), AttentionMask(key_keep=key_keep)):
        torch.testing.assert_close(
            build(num_keys=num_keys)(query, key, value, mask)[0], exact(query, key, value, mask)[0]
        )


def test_planted_truth() -> None:
    """Weights that are a non-negative map of the observed ones are reconstructed without error."""
    n, m = 12, 4
    mechanism = build(max_length=n, num_keys=m)
    weights, observed = mechanism.reconstruction(n, torch.float64)
    query, _, value = draw(n)
    # Rank one scores: exp(s·q·k_j) = Σ_k R_jk exp(s·q·k) holds for all queries if all observed keys are equal.
    key = torch.zeros(B, H, n, D, dtype=torch.float64)
    key[..., 0] = weights.sum(-1).log()[None] * math.sqrt(D)
    query[..., 0], query[..., 1:] = 1.0, 0.0
    assert torch.allclose(key[:, :, list(observed)], torch.zeros(1, dtype=torch.float64))
    expected = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(mechanism(query, key, value)[0], expected)


def test_low_precision_stays_near_the_reference() -> None:
    double = build(max_length=256, num_keys=8)
    inputs = draw(256)
    expected, _ = double(*inputs)
    single = build(max_length=256, num_keys=8, dtype=torch.float32)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        output, _ = single(*(x.to(dtype) for x in inputs))
        assert output.dtype == dtype
        assert (output.double() - expected).norm() / expected.norm() < tolerance


def test_bias_survives_bfloat16() -> None:
    """A bias of log 1000 rounds by 2% in bfloat16; carried in two parts it does not."""
    query, key, value = draw(9)
    bias = torch.linspace(5.0, 7.0, 9, dtype=torch.float64).expand(B, H, 9)
    query = torch.zeros_like(query)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=bias[:, :, None].expand(-1, -1, 9, -1))
    output = attend_with_key_bias(query.bfloat16(), key, bias, value.bfloat16().double(), 0.5)
    error = (output.double() - expected).norm() / expected.norm()
    assert error < 5e-3


def test_interpolation_weights_reproduce_lines() -> None:
    observed = (0, 3, 4, 8)
    weights = interpolation_weights(9, observed)
    torch.testing.assert_close(weights @ torch.tensor(observed).float(), torch.arange(9.0))
    torch.testing.assert_close(interpolation_weights(4, (1,)), torch.ones(4, 1))


def test_no_array_of_all_pairs() -> None:
    """Nothing that a forward pass makes has n² entries."""
    n = 2048
    mechanism = build(max_length=n, num_keys=4, dtype=torch.float32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            tensors = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, Tensor)]
            largest = max([largest, *(x.untyped_storage().nbytes() for x in tensors)])
            return result

    tensors = draw(n, dtype=torch.float32)
    key_keep = torch.arange(n).expand(B, n) < torch.tensor([[n], [n - 5]])
    with Watch(), torch.no_grad():
        mechanism(*tensors, AttentionMask(key_keep=key_keep))
    assert largest < 4 * B * H * n * 16


@pytest.mark.parametrize("share", ["head", "layer"])
@pytest.mark.parametrize(("n", "value_dim"), [(40, 4), (90, 8)])
def test_cost_counts_what_is_multiplied(share: str, n: int, value_dim: int) -> None:
    mechanism = build_attention(
        "eigen_linear", num_heads=H, head_dim=D, value_dim=value_dim, max_length=40, num_keys=8, share=share
    )
    query, key = torch.randn(2, 1, H, n, D)
    value = torch.randn(1, H, n, value_dim)
    assert_cost_is_performed(mechanism, (query, key, value))
    assert mechanism.cost(n).exact_pairs == H * n * len([j for j in range(n) if j % 40 % 5 == 0])


def test_sharing() -> None:
    first, second = build(share="model"), build(share="model")
    assert first.log_reconstruction.shape[0] == 1
    second.tie_to(first)
    assert second.log_reconstruction is first.log_reconstruction
    third = build(share="layer")
    third.tie_to(first)
    assert third.log_reconstruction is not first.log_reconstruction
    with pytest.raises(ValueError, match=r"attention\.share=model"):
        build(share="model", num_keys=3).tie_to(first)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_keys": 0}, "attention.num_keys"),
        ({"num_keys": 1.5}, "attention.num_keys"),
        ({"selection": "greedy"}, "attention.selection"),
        ({"share": "none"}, "attention.share"),
        ({"lengths": "pad"}, "attention.lengths"),
        ({"seed": -1}, "attention.seed"),
        ({"causal": True}, "causal"),
        ({"max_length": None}, "max_length"),
    ],
)
def test_bad_options_are_named(options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        build_attention("eigen_linear", **{"num_heads": H, "head_dim": D, "max_length": 9, **options})
