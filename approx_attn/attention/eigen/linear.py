"""Weights reconstructed from m keys, at linear cost (`eigen_linear`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from approx_attn.attention.base import AttentionMechanism, Capabilities, Cost, Request, apply_dropout
from approx_attn.attention.budget import require_budget, resolve_count
from approx_attn.attention.calibrated import SHARES
from approx_attn.attention.eigen.biased import attend_with_key_bias
from approx_attn.attention.eigen.pair_selection import select_positions
from approx_attn.attention.eigen.position_basis import LENGTHS, full_precision
from approx_attn.attention.mask import at_least_float32
from approx_attn.attention.registry import register_attention
from approx_attn.attention.shape import AttentionShape
from approx_attn.errors import require_count, require_one_of

SELECTIONS = ("strided", "random")
UNIFORM_PART = 0.05  # of each starting row of R, spread over all keys, so that every entry can grow


@register_attention("eigen_linear")
class EigenLinearAttention(AttentionMechanism):
    """The unnormalised weights of a row are a learned map of those of m keys: exp(S_i) ≈ R·exp(P_i), R ≥ 0.

    Then O_i = exp(P_i)·(RᵀV) / exp(P_i)·(Rᵀ1): ordinary attention over the m observed keys with pooled values
    (RᵀV)_k / w_k and bias log w_k, w = Rᵀ1. O(n·m·d), one call of `scaled_dot_product_attention` with m keys,
    nothing of size n × n. The derivation is part of this project; nothing like it is taken from a paper.

    R (n × m) is learned in logarithms, one free entry per key and observed key; it starts as linear
    interpolation between neighbouring observed keys. The row of an observed key is its own unit vector, so that its
    weight is exact, and with all keys observed R = 1 and the result is exact attention.

    A padded key has a zero row. A padded *observed* key is no evidence: every row that leans on it leans on the
    remaining ones instead, R_jk → R_jk · Σ_k' R_jk' / Σ_{k' usable} R_jk'. If no observed key is usable, the output
    is the mean of the values weighted by the row sums of R.

    Not causal: a pooled value mixes keys before and after each query.

    Lengths: "truncate" keeps observed keys and rows of R where they are, and repeats the pattern with period
    `max_length` beyond it, so padding changes nothing; "interpolate" stretches both to the number of keys given.

    State: max_length · num_keys numbers per head, or per layer or model if shared: 4 million at 65,536 positions
    and 64 keys, where share="layer" is advised.

    Args:
        num_keys: m, as a number or a fraction of `max_length`; clamps to the length.
        selection: "strided" or "random" (seeded).
        share: one R per "head", per "layer", or one for the "model" (through `tie_to`).
        lengths: "truncate" or "interpolate".
        seed: of random keys.
    """

    capabilities = Capabilities(causal=False, arbitrary_mask=False, needs_calibration=True, has_parameters=True)
    cost_formula = "n·m·d"

    def __init__(
        self,
        shape: AttentionShape,
        *,
        num_keys: float | int = 64,
        selection: str = "strided",
        share: str = "head",
        lengths: str = "truncate",
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        self.length = self._laid_out_length()
        self.num_keys = resolve_count(require_budget("attention.num_keys", num_keys), self.length)
        self.selection = require_one_of("attention.selection", selection, SELECTIONS)
        self.share = require_one_of("attention.share", share, SHARES)
        self.lengths = require_one_of("attention.lengths", lengths, LENGTHS)
        self.seed = require_count("attention.seed", seed, 0)
        groups = shape.num_heads if share == "head" else 1
        start = interpolation_weights(self.length, self._select(self.length))
        start = (1.0 - UNIFORM_PART) * start + UNIFORM_PART / self.num_keys
        self.log_reconstruction = nn.Parameter(start.log().expand(groups, -1, -1).clone())  # (g, L, m)

    def _select(self, length: int) -> tuple[int, ...]:
        return select_positions(self.selection, length, min(self.num_keys, length), self.seed)

    def tie_to(self, first: AttentionMechanism) -> None:
        """Share the reconstruction of `first` if `share="model"`."""
        if self.share != "model":
            return
        own = self.log_reconstruction.shape
        if not isinstance(first, EigenLinearAttention) or first.log_reconstruction.shape != own:
            raise ValueError("attention.share=model needs the same num_keys and max_length in every layer.")
        self.log_reconstruction = first.log_reconstruction

    def reconstruction(self, length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, tuple[int, ...]]:
        """R and the observed keys of one period.

        Returns:
            R (g, period, m) with unit rows at observed keys, and their m positions. The period is `max_length`
            (truncate) or the length itself (interpolate).
        """
        period = self.length if self.lengths == "truncate" else length
        observed = self._select(period)
        log_weights = self.log_reconstruction.to(dtype)
        if period != self.length:
            log_weights = log_weights[..., : len(observed)].transpose(1, 2)  # fewer than m only if all are observed
            log_weights = F.interpolate(log_weights, size=period, mode="linear", align_corners=True).transpose(1, 2)
        index = torch.tensor(observed, device=log_weights.device)
        unit = torch.eye(len(observed), dtype=dtype, device=log_weights.device).expand(log_weights.shape[0], -1, -1)
        weights = log_weights.exp()
        in_place = not (torch.is_grad_enabled() and weights.requires_grad)
        return (weights.index_copy_ if in_place else weights.index_copy)(1, index, unit), observed

    # -- attention ---------------------------------------------------------------------------------

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> tuple[Tensor, Tensor | None]:
        mask, scale, dropout_p, need_weights = request
        n_k = key.shape[-2]
        dtype = at_least_float32(query[:0]).dtype
        with full_precision(query.device):
            weights, observed = self.reconstruction(n_k, dtype)  # (g, L, m)
            period = weights.shape[1]
            positions = [s + p for s in range(0, n_k, period) for p in observed]  # of the t·m observed keys
            index = torch.tensor(positions, device=query.device)
            there, usable = self._usable(index, n_k, mask.key_keep, len(observed))  # (b | 1, t·m) bool
            row_scale = None  # rows of R as they are
            if mask.key_keep is not None or n_k % period:
                row_scale = row_scales(weights, usable, n_k, mask.key_keep)  # (b | 1, g, t, L)
                mass = torch.einsum("gjk,bgtj->bgtk", weights, row_scale).flatten(2) * usable[:, None]
            else:
                mass = weights.sum(1).repeat(1, n_k // period)[None]  # w: (b | 1, g, t·m)
            pooled = self._pool(weights, row_scale, value.to(dtype)).flatten(2, 3)  # (b, h, t·m, d_v)
            pooled = pooled * usable[:, None, :, None] / positive(mass)[..., None]
            bias = positive(mass).log().masked_fill(mass <= 0.0, float("-inf"))
            bias = bias.expand(query.shape[0], self.num_heads, -1)  # (b, h, t·m)
            keys = at_least_float32(key.index_select(-2, index.clamp_max(n_k - 1)))
            keys = keys * there[:, None, :, None]  # (b, h, t·m, d)
        if not need_weights:
            return attend_with_key_bias(query, keys, bias, pooled, scale, dropout_p), None
        with full_precision(query.device):
            scores = at_least_float32(query) @ keys.transpose(-2, -1) * scale + bias[..., None, :]
            attention = (scores - scores.amax(-1, keepdim=True).clamp_min(torch.finfo(dtype).min)).exp()
            attention = apply_dropout(attention / positive(attention.sum(-1, keepdim=True)), dropout_p)
            divisor = mass.masked_fill(mass <= 0.0, 1.0)  # no tiny number, whose inverse is no gradient
            parts = (attention / divisor[..., None, :]).unflatten(-1, (-1, len(observed)))  # (b, h, n_q, t, m)
            spread = torch.einsum("bhitk,hjk->bhitj", parts, weights)  # (b, h, n_q, t, L)
            spread = spread if row_scale is None else spread * row_scale[:, :, None]
            all_weights = spread.flatten(3)[..., :n_k]
        return (attention @ pooled).to(query.dtype), all_weights.to(value.dtype)

    @staticmethod
    def _usable(index: Tensor, n_k: int, key_keep: Tensor | None, m: int) -> tuple[Tensor, Tensor]:
        """Which observed keys are there, and which are used: (b | 1, t·m) bool each.

        Used are those that are there, and all of a period that has none: with a score of zero each, so that the
        row sums of R decide.
        """
        there = (index < n_k)[None]
        if key_keep is not None:
            there = there & key_keep.index_select(1, index.clamp_max(n_k - 1))
        none = ~there.unflatten(1, (-1, m)).any(-1, keepdim=True)  # (b | 1, t, 1)
        return there, (there.unflatten(1, (-1, m)) | none).flatten(1)

    @staticmethod
    def _pool(weights: Tensor, row_scale: Tensor | None, value: Tensor) -> Tensor:
        """RᵀV by period: (g, L, m) and (b, h, n, d_v) -> (b, h, t, m, d_v)."""
        period = weights.shape[1]
        missing = -value.shape[-2] % period
        value = F.pad(value, (0, 0, 0, missing)) if missing else value  # a pad of nothing is a copy, too
        value = value.unflatten(2, (-1, period))  # (b, h, t, L, d_v)
        if row_scale is not None:
            value = value * row_scale[..., None]
        # Not einsum, which copies values and weights into another order first.
        return torch.matmul(weights.mT[None, :, None], value)

    # -- cost --------------------------------------------------------------------------------------

    @classmethod
    def full_budget(cls, length: int, head_dim: int) -> dict[str, Any] | None:
        return {"num_keys": length}

    def cost(self, query_length: int, key_length: int | None = None, *, causal: bool | None = None) -> Cost:
        """Pooling counts among the values; the bias makes queries and keys one component wider."""
        n_q, n_k, pairs, _ = self._pairs(query_length, key_length, causal)
        period = self.length if self.lengths == "truncate" else n_k
        per_period = self._select(period)
        periods = -(-n_k // period)
        m = periods * len(per_period)
        exact = sum(1 for start in range(0, n_k, period) for p in per_period if start + p < n_k)
        h, g, width = self.num_heads, self.log_reconstruction.shape[0], max(self.head_dim + 1, self.value_dim)
        table = period * len(per_period)
        row_scaling = 2 * g * periods * table if n_k % period else 0
        return Cost(
            exact_pairs=h * n_q * exact,
            total_pairs=h * pairs,
            score_multiply_adds=h * n_q * m * width + row_scaling,
            value_multiply_adds=h * (n_q * m * width + periods * table * self.value_dim),
            state=self.log_reconstruction.numel() + g * table + h * (n_q + 2 * m) * width + h * n_k * self.value_dim,
        )


def row_scales(weights: Tensor, usable: Tensor, n_k: int, key_keep: Tensor | None) -> Tensor:
    """Factor on each row of R: zero where there is no key, and what unusable observed keys leave to the others.

    Args:
        weights: (g, L, m) R.
        usable: (b | 1, t·m) bool.
        key_keep: (b, n_k) bool or None.

    Returns:
        (b | 1, g, t, L).
    """
    _, period, m = weights.shape
    per_period = usable.to(weights.dtype).unflatten(1, (-1, m))  # (b | 1, t, m)
    periods = per_period.shape[1]
    within = torch.einsum("gjk,btk->bgtj", weights, per_period)
    scale = weights.sum(-1)[:, None] / positive(within)  # (b | 1, g, t, L)
    keep = torch.ones(1, n_k, dtype=torch.bool, device=weights.device) if key_keep is None else key_keep
    keep = F.pad(keep, (0, periods * period - n_k)).unflatten(1, (periods, period))[:, None]  # (b | 1, 1, t, L)
    return torch.where(keep & (within > 0.0), scale, 0.0)


def positive(x: Tensor) -> Tensor:
    """`x`, with the smallest normal number in place of zero: for divisions whose numerator is then zero too."""
    return x.clamp_min(torch.finfo(x.dtype).tiny)


def interpolation_weights(length: int, observed: tuple[int, ...]) -> Tensor:
    """(length, m) linear interpolation from m ascending positions to all; constant beyond the outer ones."""
    known = torch.tensor(observed, dtype=torch.float32)
    position = torch.arange(length, dtype=torch.float32).clamp(observed[0], observed[-1])
    right = torch.searchsorted(known, position).clamp_min(min(1, len(observed) - 1))  # first observed >= position
    left = (right - 1).clamp_min(0)
    gap = (known[right] - known[left]).clamp_min(1.0)
    fraction = (position - known[left]) / gap
    weights = torch.zeros(length, len(observed))
    rows = torch.arange(length)
    weights[rows, left] = 1.0 - fraction
    weights[rows, right] += fraction
    return weights
