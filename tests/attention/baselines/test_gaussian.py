"""Gaussian attention: its limits, learning σ, grids and given coordinates.

The contract holds in tests/test_contract.py for every mechanism; here is what only this one has.
"""

import pytest
import torch

from approx_attn.attention import AttentionMask, build_attention
from helpers import draw


def build(**options):
    return build_attention("gaussian", **{"num_heads": 2, "head_dim": 4, **options}).double()


def test_narrow_is_the_token_itself_and_wide_is_the_mean():
    query, key, value = draw(7)
    output, _ = build(sigma=[1e-4, 1e4])(query, key, value)
    torch.testing.assert_close(output[:, 0], value[:, 0])
    torch.testing.assert_close(output[:, 1], value[:, 1].mean(-2, keepdim=True).expand(-1, 7, -1), rtol=0, atol=1e-6)


def test_default_widths_double_from_head_to_head():
    assert build(num_heads=4).log_sigma.exp().tolist() == pytest.approx([1.0, 2.0, 4.0, 8.0])
    assert build(sigma=3).log_sigma.exp().tolist() == pytest.approx([3.0, 3.0])


def test_the_nearest_kept_keys_have_the_weight_however_far_they_are():
    """exp(−100²/2) is zero in float64; the softmax is over what is kept."""
    query, key, value = draw(101)
    keep = torch.arange(101) >= 100
    output, _ = build(sigma=1.0)(query, key, value, AttentionMask(key_keep=keep.expand(2, -1)))
    torch.testing.assert_close(output[:, :, 0], value[:, :, 100])


def test_learns_the_width_of_a_teacher():
    teacher, student = build(sigma=[0.7, 3.0]), build(sigma=1.5)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.1)
    query, key, value = draw(16, batch=8)
    target = teacher(query, key, value)[0].detach()
    for _ in range(80):
        optimizer.zero_grad()
        (student(query, key, value)[0] - target).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(student.log_sigma, teacher.log_sigma, rtol=0.0, atol=0.05)


def test_grid_is_given_coordinates_row_by_row():
    query, key, value = draw(12)
    points = [[row, column] for row in range(3) for column in range(4)]
    grid, given = build(grid_width=4), build(coordinates=points)
    torch.testing.assert_close(grid(query, key, value)[0], given(query, key, value)[0])
    _, weights = grid(query, key, value, need_weights=True)
    torch.testing.assert_close(weights[..., 5, 1], weights[..., 5, 4])  # above and to the left: one step each
    later = AttentionMask(query_offset=8)
    torch.testing.assert_close(given(query[:, :, 8:], key, value, later)[0], grid(query, key, value)[0][:, :, 8:])


def test_coordinates_travel_with_the_checkpoint_and_bound_the_length():
    given = build(coordinates=[[0.0], [0.5], [4.0]])
    assert "coordinates" in given.state_dict()
    given(*draw(2))
    with pytest.raises(ValueError, match=r"attention\.coordinates must have a point for each of 4 positions, got 3"):
        given(*draw(4))


def test_fixed_width_is_no_parameter():
    assert list(build(train_sigma=False).parameters()) == []
    assert [name for name, _ in build().named_parameters()] == ["log_sigma"]


def points_of(batch, length, seed=0):
    return torch.randn(batch, length, 3, generator=torch.Generator().manual_seed(seed))


def test_points_of_a_sample_are_the_points_given_as_options():
    query, key, value = draw(6)
    points = points_of(2, 6)
    mask = AttentionMask(query_coordinates=points[:, 2:], key_coordinates=points)
    output, _ = build()(query[:, :, 2:], key, value, mask)
    for sample in range(2):
        alone = [part[sample : sample + 1] for part in (query[:, :, 2:], key, value)]
        given = build(coordinates=points[sample].tolist())
        torch.testing.assert_close(output[sample], given(*alone, AttentionMask(query_offset=2))[0][0])


def test_points_in_the_padding_do_not_reach_the_width():
    query, key, value = draw(6)
    keep = torch.arange(6) < torch.tensor([[6], [4]])
    points = points_of(2, 6).masked_fill(~keep[..., None], float("nan"))
    layer = build()
    mask = AttentionMask(key_keep=keep, query_keep=keep, query_coordinates=points, key_coordinates=points)
    output, _ = layer(query, key, value, mask)
    output.sum().backward()
    assert output.isfinite().all()
    assert layer.log_sigma.grad.isfinite().all()
    short = [part[1:, :, :4] for part in (query, key, value)]
    only = AttentionMask(query_coordinates=points[1:, :4], key_coordinates=points[1:, :4])
    torch.testing.assert_close(layer(*short, only)[0][0], output[1, :, :4])


def test_points_come_from_one_place():
    with pytest.raises(ValueError, match=r"attention\.grid_width must be null where inputs come with coordinates"):
        build(grid_width=2, coordinate_dim=3)
    points = points_of(2, 4)
    with pytest.raises(ValueError, match=r"attention\.coordinates must be null"):
        build(coordinates=[[0.0]] * 4)(*draw(4), AttentionMask(query_coordinates=points, key_coordinates=points))


def test_only_the_gaussian_heads_spare_scores():
    assert build().cost(10).exact_share == 0.0
    half = build(gaussian_heads=1).cost(10)
    assert half.exact_share == 0.5
    assert build(gaussian_heads=1, coordinate_dim=3).cost(10).multiply_adds == half.multiply_adds + 2 * 10 * 10
