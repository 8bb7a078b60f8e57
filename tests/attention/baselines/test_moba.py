"""MoBA: what its gate chooses, tiles of routed queries, memory and cost."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from approx_attn.attention import AttentionMask, build_attention
from approx_attn.attention.base import repeat_heads
from helpers import assert_cost_is_performed, draw, held_sizes, multiply_adds


def build(**options):
    return build_attention("moba", **{"num_heads": 2, "head_dim": 4, "block_size": 4, **options})


def test_own_block_and_the_one_of_the_best_mean_key():
    """Keys of block j point along axis j, so a query along an axis chooses that block."""
    key = torch.eye(4).repeat_interleave(4, dim=0).expand(1, 2, 16, 4)
    query, value = 9 * torch.eye(4)[:1].expand(1, 2, 16, 4), draw(16, batch=1, dtype=torch.float32)[2]
    output, _ = build(keep=8)(query, key, value, AttentionMask(causal=True))
    seen = torch.tensor([0, 1, 2, 3, 12, 13])  # block 0, and of its own up to itself
    expected = scaled_dot_product_attention(query[:, :, 13:14], key[:, :, seen], value[:, :, seen])
    torch.testing.assert_close(output[:, :, 13:14], expected)


@pytest.mark.parametrize("causal", [False, True])
def test_fewer_key_heads_of_many_tiles_equal_repeated_ones(causal):
    """150 queries fill several tiles of a block, of which some are on the causal edge."""
    query, key, value = draw(150, heads=4, key_heads=2)
    mask = AttentionMask(causal=causal)
    grouped, _ = build(num_heads=4, num_key_value_heads=2, block_size=16)(query, key, value, mask)
    repeated, _ = build(num_heads=4, block_size=16)(query, repeat_heads(key, 4), repeat_heads(value, 4), mask)
    torch.testing.assert_close(grouped, repeated)


@pytest.mark.parametrize("causal", [False, True])
def test_all_blocks_of_many_tiles_are_exact(causal):
    query, key, value = (x.requires_grad_() for x in draw(150))
    outputs = (
        build(keep=1.0, block_size=16)(query, key, value, AttentionMask(causal=causal))[0],
        scaled_dot_product_attention(query, key, value, is_causal=causal),
    )
    torch.testing.assert_close(*outputs)
    gradients = (torch.autograd.grad(output.square().sum(), (query, key, value)) for output in outputs)
    torch.testing.assert_close(*gradients)


def test_gradients_with_dropout():
    mechanism = build(head_dim=2, keep=0.6).train()

    def run(*tensors):
        torch.manual_seed(0)
        return mechanism(*tensors, AttentionMask(causal=True), dropout_p=0.3)[0]

    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in draw(9, dim=2)])


def test_dropout_keeps_the_mean():
    query, key, value = draw(64, dtype=torch.float32)
    mechanism = build(keep=0.5).train()
    torch.manual_seed(0)
    runs = torch.stack([mechanism(query, key, value, dropout_p=0.4)[0] for _ in range(400)])
    torch.testing.assert_close(runs.mean(dim=0), mechanism(query, key, value)[0], atol=0.15, rtol=0.0)
    assert (mechanism(query, key, value, dropout_p=1.0)[0] == 0).all()


def test_holds_nothing_of_the_size_of_the_scores():
    n, keep, dim = 256, 128, 4
    tensors = [x.requires_grad_() for x in draw(n, dim=dim)]
    held = held_sizes(build(keep=keep, block_size=32), *tensors)
    assert 0 < max(held) <= 2 * 2 * n * dim < 2 * 2 * n * keep


@pytest.mark.parametrize("causal", [False, True])
def test_cost_counts_the_products(causal):
    """Exactly where tiles are full, as when all blocks of 16 keys are chosen; otherwise but for the last tiles."""
    mask = AttentionMask(causal=causal)
    assert_cost_is_performed(build(keep=1.0, block_size=16), draw(64), mask)
    mechanism, tensors = build(keep=0.25, block_size=16), draw(256, batch=1)
    stated = mechanism.cost(256, causal=causal).multiply_adds
    assert stated < multiply_adds(mechanism, *tensors, mask) < stated + 2 * 16 * 16 * 16 * 8


def test_exact_pairs_are_those_of_whole_blocks():
    assert build(keep=8).cost(16, causal=False).exact_pairs == 2 * 16 * 8
    assert build(keep=8).cost(16, causal=True).exact_pairs == 2 * (10 + 3 * (10 + 4 * 4))
    assert build(keep=1.0).cost(18, causal=True).exact_share == 1.0
    assert build(keep=0.5, block_size=16).cost(17).exact_share == pytest.approx(0.5, abs=0.01)
