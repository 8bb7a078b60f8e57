"""Budgets: how many keys of each query a mechanism keeps, as a fraction of those there are or as a number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def require_budget(key: str, value: Any) -> float | int:
    """A fraction of the keys (float in (0, 1]) or a number of keys (int of at least 1)."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and isinstance(value, int) and value >= 1:
        return value
    if is_number and isinstance(value, float) and 0.0 < value <= 1.0:
        return value
    raise ValueError(
        f"{key} must be a share in (0, 1] such as 0.25, or 1.0 for all, or a whole number of keys of at least 1, "
        f"got {value!r}."
    )


def require_budgets(key: str, value: Any, num_heads: int) -> tuple[float | int, ...]:
    """One budget for all heads, as a tuple of one, or one for each of `num_heads`."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return (require_budget(key, value),)
    if len(value) != num_heads:
        raise ValueError(f"{key} must be one budget, or a list of one for each of {num_heads} heads, got {len(value)}.")
    return tuple(require_budget(key, budget) for budget in value)


def resolve_count(budget: float | int, length: int) -> int:
    """Number of keys that a budget means at a length: at least 1, at most `length`."""
    count = budget if isinstance(budget, int) else round(budget * length)
    return max(1, min(count, length))


def keys_per_query(budget: float | int, usable: Tensor) -> Tensor:
    """Number of keys that each query may keep.

    Args:
        budget: fraction of the usable keys, or a number of keys.
        usable: int64, how many keys the mask leaves each query, any shape.

    Returns:
        int64 of the same shape, at least 1. Counting usable keys rather than the length of the array makes
        a padded input equal the unpadded one.
    """
    if isinstance(budget, int):
        return torch.full_like(usable, budget)
    return (usable.double() * budget).round().long().clamp(min=1)


def kept_pairs(budget: float | int, n_q: int, n_k: int, causal: bool) -> int:
    """Pairs that `keys_per_query` leaves in one head without padding; lower-right aligned when causal."""
    usable = (min(max(i + n_k - n_q + 1, 0), n_k) for i in range(n_q)) if causal else [n_k] * n_q
    return sum(resolve_count(budget, count) if count > 0 else 0 for count in usable)
