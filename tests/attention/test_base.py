"""The contract's own parts: checks of options, counts, costs, and what `forward` does for all mechanisms."""

import pytest
import torch

from approx_attn.attention import AttentionMask, AttentionShape, Cost, available_attention, build_attention
from approx_attn.attention.base import repeat_heads
from approx_attn.attention.budget import require_budget, resolve_count
from approx_attn.attention.exact import ExactAttention
from approx_attn.errors import ConfigWarning, require_count, require_one_of


@pytest.mark.parametrize("value", [0, -1, 1.5, "3", True, None])
def test_require_count_names_key_and_value(value):
    with pytest.raises(ValueError, match=r"attention\.k must be a whole number of at least 1, got"):
        require_count("attention.k", value)
    assert require_count("attention.k", 3) == 3


@pytest.mark.parametrize(("name", "rank"), [("eigen_topk", 1001), ("eigen_cluster", 1002), ("low_rank_topk", 1003)])
def test_a_rank_beyond_the_dimensions_of_a_head_is_warned_of(name, rank):
    with pytest.warns(ConfigWarning, match=rf"attention\.rank={rank} is more than the 16 dimensions of a head"):
        build_attention(name, num_heads=2, head_dim=16, rank=rank)


@pytest.mark.parametrize("value", [0, 0.0, -0.5, 1.5, -3, "0.25", True, None, float("nan")])
def test_require_budget_refuses(value):
    with pytest.raises(ValueError, match=r"attention\.keep must be a share in \(0, 1\]"):
        require_budget("attention.keep", value)


@pytest.mark.parametrize("value", [1, 64, 1.0, 0.25])
def test_require_budget_accepts(value):
    assert require_budget("attention.keep", value) == value


def test_require_one_of_lists_the_choices():
    with pytest.raises(ValueError, match="must be one of drop, keep, got 'dorp'"):
        require_one_of("attention.rest", "dorp", ("drop", "keep"))


def test_require_count_of_at_least_zero():
    assert require_count("window", 0, 0) == 0
    with pytest.raises(ValueError, match="window must be a whole number of at least 0, got -1"):
        require_count("window", -1, 0)


@pytest.mark.parametrize(
    ("keep", "length", "count"), [(0.25, 64, 16), (0.25, 1, 1), (1.0, 7, 7), (5, 3, 3), (5, 9, 5), (0.01, 9, 1)]
)
def test_resolve_count(keep, length, count):
    assert resolve_count(keep, length) == count


def test_costs_add_up():
    total = Cost(2, 4, 10, 20, 5) + Cost(1, 4, 10, 20, 5)
    assert total == Cost(3, 8, 20, 40, 10)
    assert total.exact_share == 3 / 8
    assert total.multiply_adds == 60
    chosen = Cost(2, 4, 10, 20, 5, computed_pairs=4) + Cost(1, 4, 10, 20, 5)
    assert (chosen.exact_share, chosen.computed_share) == (3 / 8, 5 / 8)
    assert Cost(0, 0, 0, 0, 0).exact_share == 0.0


def test_repeat_heads():
    x = torch.arange(2).view(1, 2, 1, 1)
    assert repeat_heads(x, 6).flatten().tolist() == [0, 0, 0, 1, 1, 1]
    assert repeat_heads(x, 2) is x


def test_padded_keys_are_cleared_before_anything_reads_them():
    mechanism = ExactAttention(AttentionShape(1, 4))
    query, key, value = (torch.randn(1, 1, 3, 4) for _ in range(3))
    mask = AttentionMask(key_keep=torch.tensor([[True, True, False]]))
    expected, _ = mechanism(query, key, value, mask)
    key[:, :, 2], value[:, :, 2] = float("nan"), float("inf")
    assert torch.equal(mechanism(query, key, value, mask)[0], expected)


def test_dropout_only_in_training():
    mechanism = ExactAttention(AttentionShape(1, 4))
    tensors = [torch.randn(1, 1, 8, 4) for _ in range(3)]
    expected, _ = mechanism.eval()(*tensors)
    assert torch.equal(mechanism(*tensors, dropout_p=0.9)[0], expected)
    assert not torch.equal(mechanism.train()(*tensors, dropout_p=0.9)[0], expected)


@pytest.mark.parametrize("name", available_attention())
def test_queries_that_see_each_other_are_declared(name):
    torch.manual_seed(0)
    mechanism = build_attention(name, num_heads=2, head_dim=16, max_length=256).eval()
    query, key, value = (torch.randn(1, 2, 256, 16) for _ in range(3))
    other = torch.cat([query[:, :, :128], torch.randn(1, 2, 128, 16)], dim=2)
    with torch.no_grad():
        output, of_other = (mechanism(q, key, value)[0][:, :, :128] for q in (query, other))
    same = bool(((output - of_other).abs() < 1e-5).all())
    assert same == mechanism.capabilities.independent_queries


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="num_key_value_heads must divide num_heads=4, got 3"):
        ExactAttention(AttentionShape(4, 8, num_key_value_heads=3))
