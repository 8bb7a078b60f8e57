"""Sliding-window attention and the band layout it stands on."""

import itertools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from approx_attn.attention import AttentionMask, AttentionShape, build_attention
from approx_attn.attention.baselines import sliding_window
from approx_attn.attention.exact import ExactAttention
from approx_attn.attention.layouts.band import Band

DEVICE = torch.device("cpu")


def draw(n_q, n_k, dim=4):
    generator = torch.Generator().manual_seed(n_q + 100 * n_k)
    return [torch.randn(2, 2, n, dim, generator=generator, dtype=torch.float64) for n in (n_q, n_k, n_k)]


def build(**options):
    return build_attention("sliding_window", num_heads=2, head_dim=4, **options)


# -- the layout -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 5, -3, 60])
@pytest.mark.parametrize("block", [None, 4])
def test_band_of_scores_equals_the_dense_array(offset, block):
    for n_q, n_k, width, causal in itertools.product((1, 7, 40), (1, 13, 40), (0, 3, 50), (False, True)):
        query, key, _ = draw(n_q, n_k)
        key_keep = torch.arange(n_k) < torch.tensor([n_k, max(1, n_k - 3)])[:, None]
        pair_keep = torch.arange(n_q * n_k).view(1, 1, n_q, n_k) % 3 > 0
        bias = torch.arange(n_q, dtype=torch.float64)[:, None]
        mask = AttentionMask(
            key_keep=key_keep, causal=causal, query_offset=offset, pair_keep=pair_keep, bias=bias[None, None]
        )
        band = Band.around(n_q, n_k, width, 0 if causal else width, query_offset=offset, block=block)
        scores = band.query_blocks(query) @ band.key_blocks(key).transpose(-2, -1) + band.bias(mask)
        dense = band.dense(scores.masked_fill(~band.allowed(mask, DEVICE), 0.0))
        distance = torch.arange(n_k) - torch.arange(n_q)[:, None] - offset
        expected = (distance.abs() <= width) & mask.dense_keep(n_q, n_k, DEVICE)
        torch.testing.assert_close(dense, (query @ key.transpose(-2, -1) + bias) * expected)


def test_band_counts_its_pairs():
    band = Band.around(10, 12, 3, 2, query_offset=1)
    keep = band.allowed(AttentionMask(query_offset=1), DEVICE)
    assert band.pairs(False) == band.merge_queries(keep).sum()


# -- the mechanism ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("global_tokens", [0, 3])
def test_window_sees_what_it_should(causal, global_tokens):
    mechanism = build(window=4, global_tokens=global_tokens)
    _, weights = mechanism(*draw(50, 50), AttentionMask(causal=causal), need_weights=True)
    i, j = torch.arange(50)[:, None], torch.arange(50)
    expected = ((i - j).abs() <= 4) | (j < global_tokens) | (i < global_tokens)
    expected &= (j <= i) | (not causal)
    assert torch.equal(weights > 0, expected.expand(2, 2, 50, 50))
    assert mechanism.cost(50, causal=causal).exact_pairs == 2 * expected.sum()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [16, 64, 257])
@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5, 1.0])
def test_share_is_kept_to(causal, length, keep):
    mechanism = build(keep=keep)
    _, weights = mechanism(*draw(length, length), AttentionMask(causal=causal), need_weights=True)
    share = (weights[0, 0] > 0).sum().item() / (length * (length + 1) / 2 if causal else length**2)
    assert mechanism.cost(length, causal=causal).exact_share == pytest.approx(share)
    slack = 2 / length  # one step of the half-width
    assert keep - slack <= share <= keep + (1 / length if causal else 1e-9)


@pytest.mark.parametrize("mask", [AttentionMask(), AttentionMask(causal=True)], ids=["full", "causal"])
def test_nothing_of_size_n_times_n_is_computed(mask):
    n = 256
    query, key, value = (x.requires_grad_() for x in draw(n, n))
    mechanism, sizes = build(window=8, global_tokens=2), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        mechanism(query, key, value, mask)
    assert max(sizes) < 2 * 2 * n * n / 4
    assert mechanism.cost(n, causal=mask.causal).score_multiply_adds < 2 * n * n * 4 / 4


@pytest.mark.parametrize(("causal", "global_tokens"), [(False, 0), (True, 0), (False, 2), (True, 2)])
def test_cost_counts_the_products(causal, global_tokens):
    mechanism = build(global_tokens=global_tokens)
    tensors = [x[:1] for x in draw(70, 70)]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused kernels are not counted
        mechanism(*tensors, AttentionMask(causal=causal))
    assert 2 * mechanism.cost(70, causal=causal).multiply_adds == counter.get_total_flops()


@pytest.mark.parametrize("causal", [False, True])
def test_state_holds_the_largest_arrays(causal, kept_arrays):
    mechanism = build_attention("sliding_window", num_heads=2, head_dim=64, window=8, global_tokens=3)
    tensors = [x[:1].requires_grad_() for x in draw(200, 200, 64)]
    sizes = kept_arrays(mechanism, tensors, AttentionMask(causal=causal))
    assert sum(sizes[-2:]) <= mechanism.cost(200, causal=causal).state


@pytest.mark.parametrize("options", [{"keep": 0.3}, {"keep": 0.3, "global_tokens": 5}])
@pytest.mark.parametrize(("n_q", "n_k", "offset"), [(40, 40, 0), (23, 40, 17), (40, 40, -6)])
def test_parts_with_windows_of_their_own_width_change_nothing(options, n_q, n_k, offset, monkeypatch):
    monkeypatch.setattr(sliding_window, "LEAST_SEGMENT", 4)
    mechanism, tensors = build(**options), draw(n_q, n_k)
    key_keep = torch.arange(n_k) < torch.tensor([n_k, n_k - 9])[:, None]
    mask = AttentionMask(key_keep=key_keep, causal=True, query_offset=offset)
    in_parts, in_one = mechanism(*tensors, mask)[0], mechanism(*tensors, mask, need_weights=True)[0]
    torch.testing.assert_close(in_parts, in_one)


def test_parts_leave_less_masked_work(monkeypatch):
    mechanism = build(keep=0.125)
    least = mechanism.cost(2048, causal=True)
    monkeypatch.setattr(sliding_window, "SEGMENTS", 1)
    assert mechanism.cost(2048, causal=True).multiply_adds > 1.4 * least.multiply_adds


def test_queries_beyond_the_last_key_get_zeros():
    output, _ = build(window=2)(*draw(12, 5))
    assert (output[:, :, 7:] == 0).all()
    assert (output[:, :, :7] != 0).all()


def test_gradients_by_finite_differences():
    mechanism = build_attention("sliding_window", num_heads=2, head_dim=2, window=1, global_tokens=1)
    tensors = [x.requires_grad_() for x in draw(5, 5, dim=2)]
    assert torch.autograd.gradcheck(lambda q, k, v: mechanism(q, k, v)[0], tensors)


def test_wide_window_is_exact():
    tensors = draw(9, 14)
    torch.testing.assert_close(build(window=99)(*tensors)[0], ExactAttention(AttentionShape(2, 4))(*tensors)[0])


@pytest.mark.parametrize(("option", "value"), [("keep", 2.0), ("window", -1), ("window", 0.5), ("global_tokens", -1)])
def test_impossible_options(option, value):
    with pytest.raises(ValueError, match=rf"attention\.{option} must be"):
        build(**{option: value})


# -- random blocks ------------------------------------------------------------------------------------------


def blocks_seen(n, mask=None, **options):
    """(h, n_query_blocks, n_key_blocks) bool: drawn blocks of 4 keys."""
    mechanism = build(window=0, block_size=4, **options)
    index, is_open = mechanism.random.choose(2, n, n, mask or AttentionMask(), DEVICE)
    seen = torch.zeros(*index.shape[:-1], max(n // 4, int(index.max()) + 1), dtype=torch.long)
    return seen.scatter_add(-1, index, is_open.long())[0]


def test_random_blocks_are_distinct_and_as_many_as_asked():
    seen = blocks_seen(80, random_blocks=3)
    assert (seen <= 1).all()
    assert (seen.sum(-1) == 3).all()
    assert (seen.diagonal(dim1=-2, dim2=-1) == 0).all(), "its own block is in the window already"
    assert not torch.equal(seen[0], seen[1]), "heads draw their own"
    assert torch.equal(seen, blocks_seen(80, random_blocks=3))
    for other in ({"seed": 1}, {"layer_index": 1}):
        assert not torch.equal(seen, blocks_seen(80, random_blocks=3, **other))


def test_random_blocks_are_spread_evenly():
    counts = sum(blocks_seen(64, random_blocks=2, seed=seed).sum(dim=(0, 1)) for seed in range(100))
    expected = 100 * 2 * 16 * 2 / 16
    assert ((counts - expected).abs() < 5 * expected**0.5).all()


def test_random_blocks_of_a_causal_text_lie_in_the_past():
    seen = blocks_seen(80, AttentionMask(causal=True), random_blocks=3)
    assert (seen.triu() == 0).all()
    assert seen[0].sum(-1).tolist() == [0, 1, 2] + [3] * 17


@pytest.mark.parametrize(("causal", "global_tokens"), [(False, 0), (True, 2)])
def test_cost_with_random_blocks(causal, global_tokens):
    mechanism = build(window=3, global_tokens=global_tokens, random_blocks=2, block_size=8)
    tensors = [x[:1] for x in draw(70, 70)]
    mask = AttentionMask(causal=causal)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused kernels are not counted
        mechanism(*tensors, mask)
    cost = mechanism.cost(70, causal=causal)
    assert 2 * cost.multiply_adds == counter.get_total_flops()
    _, weights = mechanism(*tensors, mask, need_weights=True)
    assert cost.exact_pairs == (weights > 0).sum()


def test_more_random_blocks_than_there_are_is_exact():
    tensors = draw(9, 14)
    output, _ = build(window=4, random_blocks=9, block_size=3)(*tensors)
    torch.testing.assert_close(output, ExactAttention(AttentionShape(2, 4))(*tensors)[0])


@pytest.mark.parametrize("n", [40, 64])
def test_equals_another_implementation(n):
    local_attention = pytest.importorskip("local_attention")
    other = local_attention.LocalAttention(
        8, causal=True, look_backward=1, autopad=True, exact_windowsize=True, use_rotary_pos_emb=False
    )
    query, key, value = draw(n, n)
    output, _ = build(window=8)(query, key, value, AttentionMask(causal=True))
    torch.testing.assert_close(output, other(query, key, value))
