"""The canonical mask: every convention comes out as the same pairs."""

import pytest
import torch

from approx_attn.attention.mask import AttentionMask, causal_keep, masked_softmax

DEVICE = torch.device("cpu")


def test_nothing_given_keeps_everything():
    mask = AttentionMask()
    assert mask.is_trivial
    assert mask.dense_keep(3, 4, DEVICE) is None
    assert mask.additive(3, 4, torch.float32, DEVICE) is None


def test_parts_are_joined():
    key_keep = torch.tensor([[True, True, False], [True, True, True]])
    pair_keep = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    pair_keep[..., 2, 0] = False
    bias = torch.zeros(1, 1, 3, 3)
    bias[..., 1, 1] = float("-inf")
    keep = AttentionMask(key_keep=key_keep, causal=True, pair_keep=pair_keep, bias=bias).dense_keep(3, 3, DEVICE)
    assert keep.shape == (2, 1, 3, 3)
    assert keep[0, 0].int().tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 0]]
    assert keep[1, 0].int().tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 1]]


def test_lowest_finite_number_closes_a_pair():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        bias = torch.tensor([[[[0.5, torch.finfo(dtype).min, float("-inf")]]]], dtype=dtype)
        mask = AttentionMask(bias=bias)
        assert mask.dense_keep(1, 3, DEVICE).flatten().tolist() == [True, False, False]
        assert mask.finite_bias().flatten().tolist() == [0.5, 0.0, 0.0]


def test_bias_over_queries_alone_still_counts_all_keys():
    bias = torch.tensor([0.0, float("-inf")])[:, None]  # (n_q, 1)
    assert AttentionMask(bias=bias).dense_keep(2, 3, DEVICE).tolist() == [[True] * 3, [False] * 3]


@pytest.mark.parametrize("offset", [-1, 0, 2])
def test_causal_offset(offset):
    keep = causal_keep(3, 5, offset, DEVICE)
    for i in range(3):
        for j in range(5):
            assert bool(keep[i, j]) == (j <= i + offset)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n_q", "n_k", "offset"), [(6, 6, 0), (3, 7, 4), (4, 3, -2)])
def test_window_is_about_positions(n_q, n_k, offset, causal):
    mask = AttentionMask(causal=causal, query_offset=offset, window=3)
    assert mask.is_structured
    assert not mask.is_trivial
    keep = mask.dense_keep(n_q, n_k, DEVICE)
    for i in range(n_q):
        for j in range(n_k):
            near = -3 < j - (i + offset) < (1 if causal else 3)
            assert bool(keep[i, j]) == near, (i, j)
    additive = mask.additive(n_q, n_k, torch.float32, DEVICE)
    assert torch.equal(additive == 0, keep)
    x = torch.randn(2, n_k, 4, dtype=torch.float64)
    torch.testing.assert_close(mask.sums_over_keys(x, n_q), keep.double() @ x)


@pytest.mark.parametrize("window", [0, -1, 2.0, True, "3"])
def test_a_window_that_is_no_number_of_keys_is_refused(window):
    with pytest.raises(ValueError, match=r"mask.window must be a whole number of at least 1 or None, got "):
        AttentionMask(window=window)


def test_additive_equals_what_sdpa_takes():
    bias = torch.randn(1, 2, 4, 4)
    additive = AttentionMask(bias=bias, causal=True).additive(4, 4, torch.float64, DEVICE)
    assert additive.dtype == torch.float64
    below = torch.ones(4, 4).tril().bool()
    assert torch.equal(additive[..., below], bias.double()[..., below])
    assert (additive[..., ~below] == float("-inf")).all()


@pytest.mark.parametrize("shape", [(5, 7), (2, 1, 5, 7), (2, 3, 5, 7), (3, 5, 7)])
def test_from_attn_mask_takes_all_shapes(shape):
    keep = torch.rand(shape) > 0.5
    expected = keep.expand(2, 3, 5, 7)
    assert torch.equal(AttentionMask.from_attn_mask(keep).dense_keep(5, 7, DEVICE).expand(2, 3, 5, 7), expected)
    additive = torch.zeros(shape).masked_fill(~keep, float("-inf"))
    assert torch.equal(AttentionMask.from_attn_mask(additive).dense_keep(5, 7, DEVICE).expand(2, 3, 5, 7), expected)


def test_from_dense_recovers_structure():
    key_keep = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    padded = key_keep[:, None, None, :].expand(2, 1, 6, 6)
    found = AttentionMask.from_dense(padded)
    assert found.is_structured
    assert not found.causal
    assert torch.equal(found.key_keep, key_keep)
    found = AttentionMask.from_dense(padded & torch.ones(6, 6).tril().bool())
    assert found.is_structured
    assert found.causal
    assert found.query_offset == 0
    decoding = torch.ones(2, 6).tril(4).bool().expand(1, 1, 2, 6)
    found = AttentionMask.from_dense(decoding)
    assert found.causal
    assert found.query_offset == 4
    assert found.key_keep is None
    arbitrary = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(0)) > 0.5
    assert torch.equal(AttentionMask.from_dense(arbitrary).pair_keep, arbitrary)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n_q", "padded"), [(7, None), (7, "left"), (7, "right"), (3, None)])
def test_from_dense_recovers_a_window(n_q, padded, causal):
    kept = torch.ones(2, 7, dtype=torch.bool)
    if padded is not None:
        kept[1, slice(0, 2) if padded == "left" else slice(5, 7)] = False
    expected = AttentionMask(key_keep=kept, causal=causal, query_offset=7 - n_q, window=3).dense_keep(n_q, 7, DEVICE)
    found = AttentionMask.from_dense(expected)
    assert found.is_structured
    assert (found.causal, found.window) == (causal, 3)
    assert torch.equal(found.dense_keep(n_q, 7, DEVICE).expand_as(expected), expected)
    hole = expected.clone()
    hole[1, 0, -1, -3] = False  # no longer the same for all queries that see this key
    assert not AttentionMask.from_dense(hole).is_structured


def test_chunks_of_queries_are_rows_of_the_whole():
    mask = AttentionMask(
        key_keep=torch.rand(2, 9) > 0.2,
        query_keep=torch.rand(2, 7) > 0.2,
        causal=True,
        query_offset=2,
        window=4,
        pair_keep=torch.rand(1, 3, 7, 9) > 0.3,
        bias=torch.randn(2, 1, 1, 9),
    )
    whole = mask.dense_keep(7, 9, DEVICE)
    part = mask.queries(3, 6)
    assert torch.equal(part.dense_keep(3, 9, DEVICE), whole[..., 3:6, :])
    assert torch.equal(part.query_keep, mask.query_keep[:, 3:6])
    assert torch.equal(part.query_positions(3, DEVICE), mask.query_positions(7, DEVICE)[3:6])


def test_queries_are_taken_for_the_tokens_of_the_keys_unless_said_otherwise():
    keep, other = torch.tensor([[True, True, False]]), torch.tensor([[True, False, False]])
    assert torch.equal(AttentionMask(key_keep=keep).real_queries(3), keep)
    assert torch.equal(AttentionMask(key_keep=keep, query_keep=other).real_queries(3), other)
    assert AttentionMask().real_queries(3) is None
    assert AttentionMask(key_keep=keep).real_queries(2) is None
    assert AttentionMask(key_keep=keep, causal=True, query_offset=1).real_queries(3) is None


def test_masked_softmax_of_a_closed_row():
    scores = torch.randn(2, 4, requires_grad=True)
    keep = torch.tensor([[True, True, False, True], [False] * 4])
    weights = masked_softmax(scores, keep)
    assert torch.equal(weights[1], torch.zeros(4))
    assert weights[0, 2] == 0
    torch.testing.assert_close(weights[0, keep[0]], scores[0, keep[0]].softmax(0))
    weights.square().sum().backward()
    assert torch.equal(scores.grad[1], torch.zeros(4))
    assert scores.grad.isfinite().all()


def test_masked_softmax_is_at_least_float32():
    assert masked_softmax(torch.zeros(3, dtype=torch.bfloat16), None).dtype == torch.float32
    assert masked_softmax(torch.zeros(3, dtype=torch.float64), None).dtype == torch.float64


@pytest.mark.parametrize("part", ["key_keep", "query_keep", "pair_keep"])
def test_masks_that_are_not_boolean_are_refused(part):
    with pytest.raises(ValueError, match=f"mask.{part} must be boolean"):
        AttentionMask(**{part: torch.ones(2, 3)})


def test_a_part_of_queries_or_keys_takes_its_coordinates_along():
    queries, keys = torch.randn(1, 4, 3), torch.randn(1, 5, 3)
    mask = AttentionMask(query_coordinates=queries, key_coordinates=keys)
    assert mask.is_trivial
    part = mask.queries(1, 3).keys(2, 5)
    assert torch.equal(part.query_coordinates, queries[:, 1:3])
    assert torch.equal(part.key_coordinates, keys[:, 2:])
    with pytest.raises(ValueError, match="must both be given"):
        AttentionMask(query_coordinates=queries)
