"""Native sparse attention: its start, which blocks it selects, heads that share keys, options and cost."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from approx_attn.attention import AttentionMask, build_attention
from helpers import assert_cost_is_performed, draw, held_sizes

SMALL = {"num_heads": 2, "head_dim": 4, "block_size": 4, "compress_size": 4, "stride": 2}
CAUSAL = AttentionMask(causal=True)


def build(**options):
    torch.manual_seed(0)
    return build_attention("nsa", **{**SMALL, **options}).double()


def selected_only(**options):
    """With the gate of the second branch open and the others closed."""
    mechanism = build(**options)
    torch.nn.init.constant_(mechanism.gate_bias, -100.0)
    torch.nn.init.constant_(mechanism.gate_bias[:, 1], 100.0)
    return mechanism


def test_starts_as_the_mean_of_three_attentions():
    """Values of one come out as one where all branches have keys; no compressed key is whole before the fourth."""
    query, key, value = draw(24)
    output, _ = build()(query, key, torch.ones_like(value), CAUSAL)
    torch.testing.assert_close(output[:, :, 3:], torch.ones_like(output[:, :, 3:]))
    torch.testing.assert_close(output[:, :, :3], torch.full_like(output[:, :, :3], 2 / 3))


def test_selects_the_first_block_the_last_two_and_the_best_compressed_keys():
    """Block j of keys points along axis j, so a query along axis 2 scores block 2 best."""
    key = torch.eye(6, dtype=torch.float64).repeat_interleave(4, dim=0).expand(1, 2, 24, 6)
    query = 9 * torch.eye(6, dtype=torch.float64)[2].expand(1, 2, 24, 6)
    value = draw(24, dim=6, batch=1)[2]
    output, _ = selected_only(head_dim=6, keep=1)(query, key, value, CAUSAL)
    seen = torch.tensor([*range(4), *range(8, 12), *range(16, 22)])
    expected = scaled_dot_product_attention(query[:, :, 21:22], key[:, :, seen], value[:, :, seen])
    torch.testing.assert_close(output[:, :, 21:22], expected)


def chosen(mechanism, query, key, value):
    """(h, n_q, n_k) bool: the keys that reach each output."""

    def run(value):
        return mechanism(query, key, value)[0][0].sum(-1)

    return torch.autograd.functional.jacobian(run, value)[:, :, 0].sum(dim=2).abs().amax(-1) > 1e-9


def test_query_heads_of_one_key_head_choose_the_same_blocks():
    query, key, value = draw(48, batch=1, key_heads=1)
    together = chosen(selected_only(num_key_value_heads=1, keep=1), query, key, value)
    assert torch.equal(together[0], together[1])
    alone = [chosen(selected_only(num_heads=1, keep=1), query[:, head : head + 1], key, value)[0] for head in range(2)]
    assert not torch.equal(*alone)


def test_holds_no_array_of_all_pairs():
    n = 256
    tensors = [x.requires_grad_() for x in draw(n)]
    mechanism = build(keep=24, block_size=16, compress_size=16, stride=8)
    assert max(held_sizes(mechanism, *tensors, CAUSAL)) < 2 * 2 * n * n // 4


@pytest.mark.parametrize("options", [{"block_size": 6}, {"stride": 3}])
def test_sizes_that_do_not_divide_are_refused(options):
    with pytest.raises(ValueError, match=r"attention\.\w+ must divide attention\.\w+=\d of nsa, got \d\.$"):
        build(**options)


@pytest.mark.parametrize("causal", [False, True])
def test_cost_counts_the_products(causal):
    """Of blocks that are all selected, which leaves no tile partly filled."""
    mechanism = build(keep=1.0, block_size=16, compress_size=16, stride=8)
    assert_cost_is_performed(mechanism, draw(64), AttentionMask(causal=causal))


def test_exact_pairs_are_selected_ones_and_those_of_the_window_beyond():
    mechanism = build(keep=24)  # 16 selected keys of 4 blocks, and 8 near ones, within the last two blocks
    assert mechanism.cost(64, causal=True).exact_pairs == 2 * (10 + 4 * (4 + 8 + 12) + 3 * 10 + 12 * (10 + 4 * 12))
