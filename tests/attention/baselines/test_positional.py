"""Positional attention: the table of scores, lengths past it, and that it can be learned.

The contract holds in tests/test_contract.py for every mechanism; here is what only this one has.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from approx_attn.attention import AttentionMask, build_attention
from approx_attn.attention.base import Request
from approx_attn.attention.baselines.positional import PositionTable, attention_from_scores


def build(**options):
    return build_attention("positional", **{"num_heads": 2, "head_dim": 4, "max_length": 6, **options})


def filled(alignment):
    table = PositionTable(1, 4, alignment)
    table.values.data = torch.arange(table.values.numel(), dtype=torch.float32).view_as(table.values)
    return table


def test_table_by_pairs():
    table = filled("absolute")  # entry of (i, j): 4i + j
    assert table(2, 3)[0].tolist() == [[0, 1, 2], [4, 5, 6]]
    assert table(1, 4, query_offset=3)[0].tolist() == [[12, 13, 14, 15]]
    assert table(2, 6, query_offset=3)[0].tolist() == [[12, 13, 14, 15, 15, 15]] * 2  # past the end: the last one
    assert table(2, 2, query_offset=-1)[0].tolist() == [[0, 1], [0, 1]]


def test_table_by_offsets():
    table = filled("relative")  # entry of offset o: o + 3
    assert table(3, 2)[0].tolist() == [[3, 4], [2, 3], [1, 2]]
    assert table(1, 4, query_offset=3)[0].tolist() == [[0, 1, 2, 3]]
    assert table(2, 6)[0].tolist() == [[3, 4, 5, 6, 6, 6], [2, 3, 4, 5, 6, 6]]
    assert table(2, 1, query_offset=9)[0].tolist() == [[0], [0]]


@pytest.mark.parametrize("alignment", ["absolute", "relative"])
def test_every_entry_gets_the_gradient_of_its_pairs(alignment):
    table = filled(alignment)
    weights = torch.randn(1, 6, 6)
    (table(6, 6) * weights).sum().backward()
    expected = torch.zeros_like(table.values)
    for i in range(6):
        for j in range(6):
            place = (0, min(i, 3), min(j, 3)) if alignment == "absolute" else (0, min(max(j - i, -3), 3) + 3)
            expected[place] += weights[0, i, j]
    torch.testing.assert_close(table.values.grad, expected)


def test_starts_uniform_and_ignores_queries_and_keys():
    mechanism = build()
    query, key, value = (torch.randn(2, 2, 6, 4) for _ in range(3))
    expected = value.mean(-2, keepdim=True).expand_as(value)
    torch.testing.assert_close(mechanism(query, key, value)[0], expected)
    torch.testing.assert_close(mechanism(-query, key * 9, value)[0], expected)


@pytest.mark.parametrize("alignment", ["absolute", "relative"])
def test_learns_to_look_at_the_previous_token(alignment):
    mechanism = build(alignment=alignment)
    optimizer = torch.optim.Adam(mechanism.parameters(), lr=0.3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        value = torch.randn(16, 2, 6, 4, generator=generator)
        output, weights = mechanism(value, value, value, AttentionMask(causal=True), need_weights=True)
        loss = (output[:, :, 1:] - value[:, :, :-1]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.01
    assert weights[0].diagonal(-1, dim1=-2, dim2=-1).min() > 0.9


def test_one_product_serves_all_samples():
    value = torch.randn(3, 2, 5, 4, dtype=torch.float64)
    scores = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    output, weights = attention_from_scores(scores, value, Request(AttentionMask(), 1.0, 0.0, True))
    torch.testing.assert_close(output, scores.softmax(-1) @ value)
    assert weights.shape == (3, 2, 5, 5)
    assert weights.stride(0) == 0  # held once
    torch.manual_seed(0)
    _, dropped = attention_from_scores(scores, value, Request(AttentionMask(), 1.0, 0.5, True))
    assert not torch.equal(dropped[0], dropped[1])


@pytest.mark.parametrize("name", ["positional", "mean", "gaussian"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_cost_counts_the_products_with_the_values(name, causal):
    """Under a causal mask as well: the product is dense."""
    mechanism = build_attention(name, num_heads=2, head_dim=4, max_length=6)
    query, value = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 5, 4)
    with FlopCounterMode(display=False) as counter:
        mechanism(query, value, value, AttentionMask(causal=causal, query_offset=-1))
    assert 2 * mechanism.cost(6, 5, causal=causal).value_multiply_adds == counter.get_total_flops()


@pytest.mark.parametrize("name", ["positional", "mean", "differentiable_mask"])
def test_impossible_options_are_refused(name):
    with pytest.raises(ValueError, match=f"attention={name} needs max_length"):
        build_attention(name, num_heads=2, head_dim=4)
    with pytest.raises(ValueError, match=r"attention\.alignment must be one of absolute, relative, got 'diagonal'"):
        build_attention(name, num_heads=2, head_dim=4, max_length=6, alignment="diagonal")
