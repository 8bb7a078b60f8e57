"""Rotary position embedding: queries and keys turned by their positions."""

from __future__ import annotations

import torch
from torch import Tensor

BASE = 10_000.0


def rotate(x: Tensor) -> Tensor:
    """Queries or keys at positions 0 … n − 1, turned so that their products depend on the distance alone.

        (x_i, x_{i + d/2}) ↦ (x_i·cos φ − x_{i + d/2}·sin φ, x_i·sin φ + x_{i + d/2}·cos φ),  φ = position·10000^(−2i/d)

    Su et al. 2021, arXiv 2104.09864, eq. 34, with the first half of the features paired with the second, as in
    most language models since.

    Args:
        x: (..., n, d), d even.

    Returns:
        (..., n, d) in the type of `x`.
    """
    length, half = x.shape[-2], x.shape[-1] // 2
    frequencies = BASE ** (-torch.arange(half, device=x.device) / half)  # (d/2,)
    angles = torch.arange(length, device=x.device)[:, None] * frequencies  # (n, d/2), float32
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
