"""Which pairs are computed exactly.

Selections are plain tuples of Python integers, made once and cached: they do not depend on the input,
so compiled graphs hold them as constants.
"""

from __future__ import annotations

import random
from functools import lru_cache

import torch
from torch import Tensor

SELECTIONS = ("strided", "random", "greedy")

# Prior variance of the row offset in greedy selection, in units of the largest prior variance: "flat", yet
# far from where the update loses digits in float64.
FLAT = 1e4


def strided(length: int, count: int) -> tuple[int, ...]:
    """`count` of `length` positions at even gaps, the first among them."""
    return tuple(k * length // count for k in range(count))


def seeded_random(length: int, count: int, seed: int) -> tuple[int, ...]:
    """`count` of `length` positions drawn without replacement, ascending; equal for equal arguments."""
    return tuple(sorted(random.Random(f"{seed}-{length}").sample(range(length), count)))


def greedy_order(
    factor: Tensor,
    noise: Tensor,
    count: int,
    *,
    free_offset: bool = True,
    at_once: int = 1,
) -> tuple[int, ...]:
    """Positions in the order in which they reduce the posterior variance: a pivoted Cholesky factorisation.

    Each step takes the position of largest posterior variance, summed over groups, and conditions every
    group on a noisy observation there. With one group, no noise and no free offset this is pivoted
    Cholesky of the covariance F·Fᵀ.

    Args:
        factor: (g, n, r) whitened basis; group γ has covariance F_γ F_γᵀ.
        noise: (g,) variance of an observation's noise; (g, n) where it differs by position, and then counts in the
            variance that a position has left, since an observation takes it away.
        count: positions to choose; the rest follow by what variance they have left.
        free_offset: rows have an offset with a flat prior, which the first observation settles.
        at_once: positions taken between two updates of the variances; more than 1 is faster and less greedy.

    Returns:
        All n positions, the `count` chosen ones first. Ties go to the lower position.
    """
    factor = factor.detach().double().cpu()
    noise = noise.detach().double().cpu()
    groups, length, _ = factor.shape
    if free_offset:
        largest = factor.square().sum(-1).max().clamp_min(1e-30)
        factor = torch.cat([factor, (FLAT * largest).sqrt().expand(groups, length, 1)], dim=-1)  # (g, n, r + 1)
    own = noise if noise.dim() == 2 else noise.new_zeros(groups, length)  # shared noise ranks nothing
    noise = noise if noise.dim() == 2 else noise[:, None].expand(-1, length)
    posterior = torch.eye(factor.shape[-1], dtype=torch.float64).repeat(groups, 1, 1)  # covariance, (g, r, r)
    chosen: list[int] = []
    is_open = torch.ones(length, dtype=torch.bool)

    def ranking() -> Tensor:
        variance = (((factor @ posterior) * factor).sum(-1) + own).sum(0).clamp_min(0.0)  # (n,)
        return variance.masked_fill(~is_open, -1.0).argsort(descending=True, stable=True)

    while len(chosen) < min(count, length):
        pivots = ranking()[: min(at_once, count - len(chosen), length - len(chosen))].tolist()
        rows = factor[:, pivots]  # (g, k, r)
        spread = rows @ posterior
        seen = spread @ rows.transpose(1, 2)  # (g, k, k)
        # A trace of noise, for positions that say the same without any.
        observation = noise[:, pivots] + 1e-12 * seen.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True) + 1e-300
        seen = seen + torch.diag_embed(observation)
        posterior = posterior - spread.transpose(1, 2) @ torch.linalg.solve(seen, spread)
        chosen.extend(pivots)
        is_open[pivots] = False
    return tuple(chosen + ranking()[: length - len(chosen)].tolist())


@torch.compiler.assume_constant_result
def select_positions(
    method: str, length: int, count: int, seed: int = 0, order: tuple[int, ...] = ()
) -> tuple[int, ...]:
    """`count` of `length` positions, ascending; all of them if `count` reaches `length`.

    Args:
        method: "strided", "random" or "greedy".
        order: for "greedy": the positions of the learned axis, best first. At another length the axis is
            stretched or squeezed, and positions come in the order of the learned positions nearest to them.
    """
    return _select_positions(method, length, count, seed, order)


@torch.compiler.assume_constant_result
def repeat_positions(pattern: tuple[int, ...], period: int, length: int) -> tuple[int, ...]:
    """The positions below `length` of a pattern that repeats with a period.

    Positions chosen so do not depend on the length: neither keys appended nor padding changes the choice.
    """
    return tuple(start + k for start in range(0, length, period) for k in pattern if start + k < length)


@lru_cache(maxsize=512)
def _select_positions(method: str, length: int, count: int, seed: int, order: tuple[int, ...]) -> tuple[int, ...]:
    if count >= length:
        return tuple(range(length))
    if method == "strided":
        return strided(length, count)
    if method == "random":
        return seeded_random(length, count, seed)
    rank = {position: place for place, position in enumerate(order)}

    def place(position: int) -> tuple[int, int]:
        return rank[round(position * (len(order) - 1) / (length - 1))], position

    return tuple(sorted(sorted(range(length), key=place)[:count]))
