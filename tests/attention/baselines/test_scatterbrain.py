"""Scatterbrain: near keys exact, far ones by features, at lengths where there are far blocks of keys."""

import runpy
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from approx_attn.attention import AttentionMask, AttentionShape, build_attention
from approx_attn.attention.exact import ExactAttention

naive = runpy.run_path(str(Path(__file__).parents[1] / "naive" / "scatterbrain.py"))["naive"]


def build(**options):
    return build_attention("scatterbrain", **{"num_heads": 2, "head_dim": 4, "num_features": 6, **options})


def draw(n_q, n_k, dim=4):
    generator = torch.Generator().manual_seed(n_q + 100 * n_k)
    return [torch.randn(2, 2, n, dim, generator=generator, dtype=torch.float64) for n in (n_q, n_k, n_k)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("offset", [0, 7, -5])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("options", [{"window": 5}, {"keep": 0.1}, {"keep": 20}], ids=str)
def test_equals_the_naive_reference_over_many_blocks(causal, offset, padded, options):
    mechanism = build(**options).double()
    query, key, value = draw(110, 123)
    key_keep = torch.arange(123) < torch.tensor([[123], [90]])
    mask = AttentionMask(key_keep=key_keep if padded else None, causal=causal, query_offset=offset)
    output, _ = mechanism(query, key, value, mask)
    keep = key_keep[:, None, :, None] if padded else 1.0
    torch.testing.assert_close(output, naive(mechanism, query, key * keep, value * keep, mask, 0.5))
    _, weights = mechanism(query, key, value, mask, need_weights=True)
    torch.testing.assert_close(weights @ (value * keep), output)


@pytest.mark.parametrize("causal", [False, True])
def test_error_falls_with_features(causal):
    query, key, value = draw(150, 150)
    query, key = 0.5 * query, 0.5 * key  # at large norms the variance is dominated by rare directions
    mask = AttentionMask(causal=causal)
    expected, _ = ExactAttention(AttentionShape(2, 4))(query, key, value, mask)
    errors = [
        sum(
            (build(window=8, num_features=m, seed=seed).double()(query, key, value, mask)[0] - expected).norm()
            for seed in range(4)
        )
        for m in (8, 512)
    ]
    assert errors[1] < errors[0] / 3


@pytest.mark.parametrize("causal", [False, True])
def test_nothing_of_size_n_times_n_is_held(causal):
    n, sizes = 512, []
    query, key, value = (x.requires_grad_() for x in draw(n, n))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        build(window=8)(query, key, value, AttentionMask(causal=causal))
    assert max(sizes) < 2 * 2 * n * n / 4


def test_no_gradient_from_later_keys_over_many_blocks():
    query, key, value = (x.requires_grad_() for x in draw(100, 100))
    output, _ = build(window=4)(query, key, value, AttentionMask(causal=True))
    output[:, :, 60].sum().backward()
    for tensor in (query, key, value):
        assert (tensor.grad[:, :, 61:] == 0).all()
    assert (value.grad[:, :, :61] != 0).all(), "far keys count"


@pytest.mark.parametrize("causal", [False, True])
def test_later_keys_do_not_touch_earlier_outputs_even_when_huge(causal):
    query, key, value = (x.float() for x in draw(100, 100))
    louder = key.clone()
    louder[:, :, 70:] *= 60
    mechanism = build(window=4)
    before, after = (mechanism(query, k, value, AttentionMask(causal=causal))[0][:, :, :70] for k in (key, louder))
    assert after.isfinite().all()
    assert torch.equal(before, after) == causal


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [40, 110])
def test_cost_counts_the_products(causal, n):
    mechanism = build(window=5)
    tensors = [x[:1] for x in draw(n, n)]
    with FlopCounterMode(display=False) as counter:
        mechanism(*tensors, AttentionMask(causal=causal))
    assert 2 * mechanism.cost(n, causal=causal).multiply_adds == counter.get_total_flops()


@pytest.mark.parametrize("causal", [False, True])
def test_state_holds_the_largest_arrays(causal, kept_arrays):
    mechanism = build(head_dim=64, num_features=6, window=30)
    tensors = [x[:1].requires_grad_() for x in draw(200, 200, 64)]
    sizes = kept_arrays(mechanism, tensors, AttentionMask(causal=causal))
    assert sum(sizes[-2:]) <= mechanism.cost(200, causal=causal).state


@pytest.mark.parametrize("need_weights", [False, True])
def test_products_of_features_that_underflow_send_finite_gradients(need_weights):
    """Queries and keys that point away from each other: a feature that is large for one is tiny for the other."""
    mechanism = build(window=1)
    query = torch.zeros(1, 2, 40, 4)
    query[..., 0] = 80.0
    tensors = [x.requires_grad_() for x in (query, -query, torch.randn(1, 2, 40, 4))]
    output, _ = mechanism(*tensors, need_weights=need_weights)
    (1e4 * output).square().sum().backward()  # loud, as a loss scaled for 16 bits is
    assert output.isfinite().all()
    assert all(x.grad.isfinite().all() for x in tensors)


def test_each_layer_draws_its_own_directions():
    assert torch.equal(build().projection, build().projection)
    assert not torch.equal(build().projection, build(layer_index=1).projection)
    assert not torch.equal(build().projection, build(seed=1).projection)


@pytest.mark.parametrize(("option", "value"), [("keep", 0), ("window", -1), ("num_features", 0), ("seed", -1)])
def test_impossible_options(option, value):
    with pytest.raises(ValueError, match=rf"attention\.{option} must be"):
        build(**{option: value})
