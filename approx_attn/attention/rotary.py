"""Rotary position embedding: queries and keys turned by their positions."""

from __future__ import annotations

import torch
from torch import Tensor

BASE = 10_000.0


def rotate(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys at positions 0 … n − 1, turned so that their products depend on the distance alone.

        (x_i, x_{i + d/2}) ↦ (x_i·cos φ − x_{i + d/2}·sin φ, x_i·sin φ + x_{i + d/2}·cos φ),  φ = position·10000^(−2i/d)

    Su et al. 2021, arXiv 2104.09864, eq. 34, with the first half of the features paired with the second, as in
    most language models since.

    Args:
        query: (..., n_q, d), d even.
        key: (..., n_k, d).

    Returns:
        Both, in the type of `query`.
    """
    length, half = max(query.shape[-2], key.shape[-2]), query.shape[-1] // 2
    frequencies = BASE ** (-torch.arange(half, device=query.device) / half)  # (d/2,)
    angles = torch.arange(length, device=query.device)[:, None] * frequencies  # (n, d/2), float32
    cosine, sine = angles.cos().to(query.dtype), angles.sin().to(query.dtype)
    return _turn(query, cosine, sine), _turn(key, cosine, sine)


def _turn(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    length, half = x.shape[-2], x.shape[-1] // 2
    cosine, sine = cosine[:length], sine[:length]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
