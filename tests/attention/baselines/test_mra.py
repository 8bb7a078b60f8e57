"""MRA-2: its two resolutions, and what they cost."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from approx_attn.attention import AttentionShape, build_attention
from approx_attn.attention.exact import ExactAttention


def build(**options):
    return build_attention("mra", **{"num_heads": 2, "head_dim": 4, "block_size": 4, **options})


def draw(n_q, n_k, dim=4):
    generator = torch.Generator().manual_seed(n_q + 100 * n_k)
    return [torch.randn(2, 2, n, dim, generator=generator, dtype=torch.float64) for n in (n_q, n_k, n_k)]


def test_is_exact_where_keys_and_queries_are_constant_in_blocks():
    query, key, value = draw(5, 6)
    query, key = query.repeat_interleave(4, dim=2), key.repeat_interleave(4, dim=2)
    value = value.repeat_interleave(4, dim=2)
    expected, _ = ExactAttention(AttentionShape(2, 4))(query, key, value)
    torch.testing.assert_close(build(keep=0.1)(query, key, value)[0], expected)


def test_keeping_the_rest_is_nearer_to_exact_than_dropping_it():
    query, key, value = draw(64, 64)
    expected, _ = ExactAttention(AttentionShape(2, 4))(query, key, value)
    kept, dropped = (
        (build(keep=0.25, rest=rest)(query, key, value)[0] - expected).norm() for rest in ("coarse", "drop")
    )
    assert kept < 0.8 * dropped


@pytest.mark.parametrize(("n_q", "n_k"), [(16, 16), (13, 22)])
@pytest.mark.parametrize("keep", [0.25, 6, 1.0])
def test_cost_counts_the_products(n_q, n_k, keep):
    mechanism = build(keep=keep)
    tensors = [x[:1] for x in draw(n_q, n_k)]
    with FlopCounterMode(display=False) as counter:
        mechanism(*tensors)
    assert 2 * mechanism.cost(n_q, n_k).multiply_adds == counter.get_total_flops()


def test_a_number_of_keys_is_rounded_up_to_blocks():
    tensors = draw(14, 20)
    (one, same), two = (build(keep=keep)(*tensors)[0] for keep in (1, 4)), build(keep=5)(*tensors)[0]
    assert torch.equal(one, same)
    assert not torch.allclose(one, two)
    whole, _ = build(keep=20)(*tensors)
    torch.testing.assert_close(whole, ExactAttention(AttentionShape(2, 4))(*tensors)[0])
    assert build(keep=20).cost(14, 20).exact_share == 1.0
    assert build(keep=5).cost(16, 20).exact_pairs == 2 * 16 * 8


def test_exact_pairs_leave_the_padding_of_the_last_block_out():
    """Half of the blocks of 17 keys, of which the last block holds one: not all pairs."""
    assert build(keep=0.5, block_size=16).cost(17).exact_share == pytest.approx(0.5, abs=0.01)
    assert build(keep=1.0, block_size=16).cost(17).exact_share == 1.0


def test_shares_of_blocks_are_rounded_in_double():
    """A share that is just above 2.5 of 30 blocks is 2.5 in float32, which rounds to 2 and not to 3."""
    tensors = draw(20, 24)
    three, just_above = (build(keep=keep, rest="drop")(*tensors)[0] for keep in (3 / 30, 2.5 / 30 + 1e-9))
    assert torch.equal(three, just_above)


def test_values_off_zero_do_not_overflow_in_16_bits():
    query, key, value = (x.expand(-1, -1, 4096, -1) for x in draw(1, 1))
    value = (value + 20).half()
    output, _ = build(block_size=64)(query.half(), key.half(), value)
    torch.testing.assert_close(output, value, rtol=2e-3, atol=0.0)


def test_large_scores_neither_overflow_nor_vanish():
    query, key, value = (x.float() for x in draw(32, 32))
    output, _ = build()(300 * query, 300 * key, value)
    assert output.isfinite().all()
    assert (output.abs().sum(-1) > 0).all()


def test_gradients_by_finite_differences():
    mechanism = build_attention("mra", num_heads=2, head_dim=2, block_size=2)
    tensors = [x[:1].requires_grad_() for x in draw(5, 5, dim=2)]
    assert torch.autograd.gradcheck(lambda q, k, v: mechanism(q, k, v)[0], tensors)


@pytest.mark.parametrize(("option", "value"), [("keep", 0), ("block_size", 0), ("rest", "mean")])
def test_impossible_options(option, value):
    with pytest.raises(ValueError, match=rf"attention\.{option} must be"):
        build(**{option: value})
