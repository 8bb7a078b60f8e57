"""Selections of positions, against their definitions."""

import pytest
import torch

from approx_attn.attention.eigen.pair_selection import (
    greedy_order,
    repeat_positions,
    seeded_random,
    select_positions,
    strided,
)


def model(groups: int = 1, length: int = 7, rank: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(groups, length, rank, generator=generator, dtype=torch.float64)
    return factor, torch.linspace(0.1, 0.3, groups, dtype=torch.float64)


def posterior_variance(factor: torch.Tensor, noise: torch.Tensor, chosen: list[int]) -> torch.Tensor:
    """(n,) variance left after noisy observations, straight from the Gaussian conditional, summed over groups."""
    total = torch.zeros(factor.shape[1], dtype=torch.float64)
    for f, variance in zip(factor, noise, strict=True):
        covariance = f @ f.T
        if chosen:
            seen = covariance[chosen][:, chosen] + variance * torch.eye(len(chosen), dtype=torch.float64)
            covariance = covariance - covariance[:, chosen] @ torch.linalg.solve(seen, covariance[chosen])
        total += covariance.diagonal()
    return total


@pytest.mark.parametrize("groups", [1, 3])
def test_greedy_takes_the_largest_posterior_variance(groups: int) -> None:
    factor, noise = model(groups)
    order = greedy_order(factor, noise, 5, free_offset=False)
    chosen: list[int] = []
    for _ in range(5):
        variance = posterior_variance(factor, noise, chosen)
        variance[chosen] = -1.0
        chosen.append(int(variance.argmax()))
    assert list(order[:5]) == chosen
    assert sorted(order) == list(range(7))


@pytest.mark.parametrize("noise", [torch.zeros(1), torch.linspace(3.0, 0.1, 7)[None]])
def test_greedy_is_pivoted_cholesky_without_noise_or_with_that_of_positions(noise: torch.Tensor) -> None:
    factor, _ = model()
    residual = factor[0] @ factor[0].T + (torch.diag(noise[0].double()) if noise.dim() == 2 else 0.0)
    pivots = []
    for _ in range(4):  # the rank
        pivot = int(residual.diagonal().argmax())
        pivots.append(pivot)
        residual = residual - residual[:, pivot, None] * residual[None, pivot] / residual[pivot, pivot]
    assert list(greedy_order(factor, noise, 4, free_offset=False)[:4]) == pivots


def test_several_at_once_condition_as_one_by_one() -> None:
    """Only the choice within a round differs: the first of each round is greedy given all before it."""
    factor, noise = model(2)
    order = greedy_order(factor, noise, 6, free_offset=False, at_once=2)
    for start in (0, 2, 4):
        variance = posterior_variance(factor, noise, list(order[:start]))
        variance[list(order[:start])] = -1.0
        assert order[start : start + 2] == tuple(variance.argsort(descending=True)[:2].tolist())


def test_a_free_offset_is_a_constant_column_of_large_variance() -> None:
    factor, noise = model()
    largest = factor.square().sum(-1).max()
    constant = (1e4 * largest).sqrt().expand(1, 7, 1)
    with_column = torch.cat([factor, constant], dim=-1)
    assert greedy_order(factor, noise, 5) == greedy_order(with_column, noise, 5, free_offset=False)


@pytest.mark.parametrize("method", ["strided", "random", "greedy"])
@pytest.mark.parametrize(("length", "count"), [(7, 3), (7, 7), (7, 9), (4, 2), (20, 5), (1, 1)])
def test_as_many_distinct_positions_as_asked(method: str, length: int, count: int) -> None:
    order = greedy_order(*model(), 3)
    chosen = select_positions(method, length, count, 0, order)
    assert len(chosen) == min(count, length)
    assert list(chosen) == sorted(set(chosen))
    assert set(chosen) <= set(range(length))


def test_greedy_at_other_lengths_follows_the_learned_order() -> None:
    order = (5, 1, 3, 0, 6, 2, 4)
    assert select_positions("greedy", 7, 3, order=order) == (1, 3, 5)
    assert select_positions("greedy", 13, 2, order=order) == (2, 10)  # twice as fine: 5 -> 10, 1 -> 2
    assert select_positions("greedy", 4, 2, order=order) == (0, 3)  # half as fine: 1 -> 2, 2 -> 4, 3 -> 6


def test_strided_has_even_gaps_from_the_first() -> None:
    assert strided(8, 4) == (0, 2, 4, 6)
    assert strided(7, 3) == (0, 2, 4)


def test_random_depends_on_the_seed_alone() -> None:
    assert seeded_random(100, 10, 1) == seeded_random(100, 10, 1)
    assert seeded_random(100, 10, 1) != seeded_random(100, 10, 2)


def test_repeated_positions_do_not_depend_on_the_length() -> None:
    long = repeat_positions((0, 2), 5, 13)
    assert long == (0, 2, 5, 7, 10, 12)
    assert all(repeat_positions((0, 2), 5, n) == tuple(j for j in long if j < n) for n in range(13))
