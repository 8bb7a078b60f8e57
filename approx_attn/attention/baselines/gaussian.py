"""Gaussian attention: weights that fall with the distance between tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from approx_attn.attention.base import AttentionMechanism, Capabilities, Cost, Request
from approx_attn.attention.baselines.positional import attention_from_scores
from approx_attn.attention.mask import AttentionMask, at_least_float32
from approx_attn.attention.registry import register_attention
from approx_attn.attention.shape import AttentionShape
from approx_attn.errors import require_count

LEAST_SIGMA = 1e-4  # keeps squared distances over 2σ² finite


@register_attention("gaussian")
class GaussianAttention(AttentionMechanism):
    """Weights ∝ exp(−‖x_i − x_j‖² / 2σ²) over the keys a query may use, with one σ per head.

    Source: Riva, Raganato, Melzi: *Localized Gaussians as Self-Attention Weights for Point Clouds Correspondence*
    (arXiv 2409.13291), where some heads of a layer are such and the others compute softmax attention.

    Points x are those that come with the inputs (`AttentionMask.query_coordinates`); without them they are positions,
    unless options give them. An additive mask is added to the exponent, as to scores.

    Args:
        sigma: σ in the units of the points, one for all Gaussian heads or a list with one per head; None: 1, 2, 4, …
            doubling from head to head.
        train_sigma: learn σ (as its logarithm) or keep it fixed.
        gaussian_heads: number of heads with such weights, the first of a layer; the others compute exact attention.
            None: all.
        grid_width: tokens lie row by row on a grid of this width, such as the pixels of an image; None: on a line.
        coordinates: a list with the point (a list of numbers) of each position; inputs may not be longer.
            None: from positions and `grid_width`.
    """

    capabilities = Capabilities(has_parameters=True, window=True)
    cost_formula = "n² (and n²·d_v for the values)"
    log_sigma: Tensor
    coordinates: Tensor | None

    def __init__(
        self,
        shape: AttentionShape,
        *,
        sigma: float | Sequence[float] | None = None,
        train_sigma: bool = True,
        gaussian_heads: int | None = None,
        grid_width: int | None = None,
        coordinates: Sequence[Sequence[float]] | None = None,
    ) -> None:
        super().__init__(shape)
        self.gaussian_heads = _heads(gaussian_heads, shape.num_heads)
        log_sigma = torch.tensor([math.log(value) for value in _sigma_per_head(sigma, self.gaussian_heads)])
        if train_sigma:
            self.log_sigma = nn.Parameter(log_sigma)
        else:
            self.register_buffer("log_sigma", log_sigma)
        self.grid_width = None if grid_width is None else require_count("attention.grid_width", grid_width)
        if coordinates is not None and grid_width is not None:
            raise ValueError("attention.coordinates and attention.grid_width exclude each other, got both.")
        self.register_buffer("coordinates", None if coordinates is None else _points(coordinates))
        if shape.coordinate_dim is not None:
            self._refuse_points_of_options()

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> tuple[Tensor, Tensor | None]:
        squared = self._squared_distances(query.shape[-2], key.shape[-2], request.mask, query.device)
        log_sigma = at_least_float32(self.log_sigma).clamp(min=math.log(LEAST_SIGMA))
        precision = 0.5 * torch.exp(-2.0 * log_sigma)  # 1 / 2σ², (g,)
        scores = -precision[:, None, None] * squared[:, None]  # (1 | b, g, n_q, n_k)
        others = slice(self.gaussian_heads, None)
        if self.gaussian_heads < self.num_heads:
            products = (query[:, others] * request.scale) @ key[:, others].transpose(-2, -1)
            scores = torch.cat([scores.expand(len(query), -1, -1, -1), at_least_float32(products)], dim=1)
        return attention_from_scores(scores, value, request)

    def _squared_distances(self, n_q: int, n_k: int, mask: AttentionMask, device: torch.device) -> Tensor:
        """(1 | b, n_q, n_k) between the points of queries and keys."""
        if mask.query_coordinates is not None and mask.key_coordinates is not None:
            self._refuse_points_of_options()
            points = at_least_float32(mask.query_coordinates), at_least_float32(mask.key_coordinates)  # (b, n, c)
        else:
            positions = mask.query_positions(n_q, device), torch.arange(n_k, device=device)
            points = self._points_at(positions[0])[None], self._points_at(positions[1])[None]  # (1, n, c)
        return (points[0][:, :, None] - points[1][:, None]).square().sum(dim=-1)

    def _refuse_points_of_options(self) -> None:
        for option in ("grid_width", "coordinates"):
            if getattr(self, option) is not None:
                raise ValueError(
                    f"attention.{option} must be null where inputs come with coordinates, got points of both."
                )

    def _points_at(self, positions: Tensor) -> Tensor:
        """(n,) positions -> (n, c) points."""
        if self.coordinates is not None:
            if len(positions) > len(self.coordinates):
                raise ValueError(
                    f"attention.coordinates must have a point for each of {len(positions)} positions, "
                    f"got {len(self.coordinates)}."
                )
            return at_least_float32(self.coordinates)[positions.clamp(0, len(self.coordinates) - 1)]
        if self.grid_width is None:
            points = positions[:, None]
        else:
            row = positions.div(self.grid_width, rounding_mode="floor")
            points = torch.stack((row, positions - row * self.grid_width), dim=-1)
        return points.to(torch.promote_types(self.log_sigma.dtype, torch.float32))

    def cost(self, query_length: int, key_length: int | None = None, *, causal: bool | None = None) -> Cost:
        n_q, n_k, pairs, _ = self._pairs(query_length, key_length, causal)
        axes = self.shape.coordinate_dim or (1 if self.coordinates is None and self.grid_width is None else 2)
        if self.coordinates is not None:
            axes = self.coordinates.shape[-1]
        fixed, others = self.gaussian_heads, self.num_heads - self.gaussian_heads
        distances = n_q * n_k * axes  # once for all heads; then 1/2σ² for each
        return Cost(
            exact_pairs=others * pairs,
            total_pairs=self.num_heads * pairs,
            score_multiply_adds=distances + fixed * n_q * n_k + others * n_q * n_k * self.head_dim,
            value_multiply_adds=self.num_heads * n_q * n_k * self.value_dim,
            state=fixed + self.num_heads * n_q * n_k + distances,
            computed_pairs=others * n_q * n_k if others else None,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gaussian_heads={self.gaussian_heads}, grid_width={self.grid_width}"


def _heads(gaussian_heads: int | None, num_heads: int) -> int:
    count = num_heads if gaussian_heads is None else require_count("attention.gaussian_heads", gaussian_heads)
    if count > num_heads:
        raise ValueError(f"attention.gaussian_heads must be at most model.num_heads={num_heads}, got {count}.")
    return count


def _sigma_per_head(sigma: float | Sequence[float] | None, num_heads: int) -> list[float]:
    if sigma is None:
        return [2.0**head for head in range(num_heads)]
    values = [sigma] * num_heads if isinstance(sigma, int | float) else list(sigma)
    numbers = all(
        isinstance(v, int | float) and not isinstance(v, bool) and LEAST_SIGMA <= v < math.inf for v in values
    )
    if len(values) != num_heads or not numbers:
        raise ValueError(
            f"attention.sigma must be a number of at least {LEAST_SIGMA}, or a list of {num_heads} such numbers "
            f"(one per Gaussian head), got {sigma!r}."
        )
    return [float(v) for v in values]


def _points(coordinates: Sequence[Sequence[float]]) -> Tensor:
    try:
        points = torch.as_tensor([list(point) for point in coordinates], dtype=torch.float32)
    except (TypeError, ValueError):
        points = torch.empty(0)
    if points.dim() != 2 or points.numel() == 0 or not bool(points.isfinite().all()):
        raise ValueError(
            "attention.coordinates must be a list of points, each a list of as many finite numbers, "
            f"got {str(coordinates)[:80]}."
        )
    return points
