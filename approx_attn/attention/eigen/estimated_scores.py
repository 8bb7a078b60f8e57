"""Mechanisms that estimate every score from a content basis, a position prior and the mask."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from approx_attn.attention.base import repeat_heads
from approx_attn.attention.eigen.chunk_scores import grouped_matmul, mean_residual, sampled_keep
from approx_attn.attention.eigen.content_basis import HasContentBasis
from approx_attn.attention.mask import AttentionMask, at_least_float32

SAMPLED_TOKENS = 32  # queries and keys sampled per sequence for the auxiliary loss: 32² pairs per head


class ScoreInputs(NamedTuple):
    """What the scores of some queries with some keys are computed and estimated from, the values with it.

    Attributes:
        query: (b, h, n_q, d). query_low: (b, h, n_q, r), its coordinates.
        offset: (b, h, n_q | 1, 1), what makes row means of estimates exact; None where the mask decides it by chunk.
        key: (b, h_kv, n_k, d). key_low: (b, h, n_k, r), its coordinates.
        hidden: (b, h, 1, n_k), log norm of what the basis cannot see of a key; None where nothing asks for it.
        value: (b, h_kv, n_k, d_v).
        mask: of these queries and keys.
    """

    query: Tensor
    query_low: Tensor
    offset: Tensor | None
    key: Tensor
    key_low: Tensor
    hidden: Tensor | None
    value: Tensor
    mask: AttentionMask

    def part(self, start: int, stop: int, seen: int) -> ScoreInputs:
        """Those of queries start..stop-1 with the first `seen` keys."""
        varies = self.offset is not None and self.offset.shape[-2] > 1
        return ScoreInputs(
            query=self.query[:, :, start:stop],
            query_low=self.query_low[:, :, start:stop],
            offset=self.offset[:, :, start:stop] if self.offset is not None and varies else self.offset,
            key=self.key[:, :, :seen],
            key_low=self.key_low[:, :, :seen],
            hidden=None if self.hidden is None else self.hidden[..., :seen],
            value=self.value[:, :, :seen],
            mask=self.mask.queries(start, stop).keys(0, seen),
        )


class EstimatedScores(HasContentBasis):
    """What a mechanism needs to estimate scores; see `EigenTopKAttention` for the formula.

    Attributes:
        prior: (h, max_length) or (h, 2·max_length − 1), learned scores by position; None without.
        position_prior: `none`, `absolute` or `relative`.
        auxiliary_loss_weight: of the squared error of estimates in the training loss.
    """

    prior: nn.Parameter | None
    position_prior: str
    auxiliary_loss_weight: float

    def _score_inputs(self, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, hides: bool) -> ScoreInputs:
        """What all scores are estimated from; `hides`: and what a choice by expected error needs."""
        query_low = self.basis.query_coordinates(query)  # (b, h, n_q, r)
        key_low = self.basis.key_coordinates(key)  # (b, h, n_k, r)
        offset = self._row_offset(query, key, query_low, key_low, mask) if mask.is_structured else None
        hidden = self._hidden_part(key, key_low) if hides else None
        return ScoreInputs(query, query_low, offset, key, key_low, hidden, value, mask)

    def _estimate(self, inputs: ScoreInputs, keep: Tensor | None, scale: float) -> Tensor:
        """Estimated scores with prior and bias: (b, h, n_q, n_k)."""
        estimate = at_least_float32(inputs.query_low @ inputs.key_low.mT)
        offset = inputs.offset
        if offset is None:
            offset = mean_residual(inputs.query, inputs.key, inputs.query_low, inputs.key_low, keep)
        estimate = estimate.add_(offset).mul_(scale)  # in place: the products are no longer needed
        if self.prior is not None:
            estimate = estimate + self._prior_scores(inputs.mask, *estimate.shape[-2:])
        bias = inputs.mask.finite_bias()
        return estimate if bias is None else estimate + bias

    def _row_offset(
        self, query: Tensor, key: Tensor, query_low: Tensor, key_low: Tensor, mask: AttentionMask
    ) -> Tensor:
        """What makes the row mean of the estimates exact, for padding, causality and a window: (b, h, n_q, 1)."""
        n_q, n_k = query.shape[-2], key.shape[-2]
        both = torch.cat([repeat_heads(key, self.num_heads), key_low], dim=-1)  # (b, h, n_k, d + r)
        both = at_least_float32(both)
        used = both.new_ones(1, 1, n_k, 1) if mask.key_keep is None else mask.key_keep[:, None, :, None].to(both.dtype)
        total, count = (
            mask.sums_over_keys(both * used, n_q),
            mask.sums_over_keys(used, n_q),
        )  # (b, h, n_q | 1, d + r | 1)
        mean_key, mean_low = (total / count.clamp_min(1.0)).split([self.head_dim, key_low.shape[-1]], dim=-1)
        return (query * mean_key).sum(-1, keepdim=True) - (query_low * mean_low).sum(-1, keepdim=True)

    @torch.no_grad()
    def _hidden_part(self, key: Tensor, key_low: Tensor) -> Tensor:
        """log ‖(k − k̄)(I − B Aᵀ)‖, with the calibrated k̄ so that no key tells of another: (b, h, 1, n_k)."""
        explained = key_low @ self.basis.query_map.to(key_low.dtype).mT  # (b, h, n_k, d)
        centred = key - self.basis.key_mean.to(key.dtype)[:, None]
        norm = at_least_float32(repeat_heads(centred, self.num_heads) - explained).norm(dim=-1)
        # A key that the basis explains entirely is known already; the floor keeps such rows comparable.
        return norm.clamp_min(torch.finfo(norm.dtype).eps).log()[:, :, None]

    def _prior_scores(self, mask: AttentionMask, c: int, seen: int) -> Tensor:
        """(h, c | 1, seen) position prior, zero outside the range it was laid out for."""
        assert self.prior is not None
        positions = torch.arange(seen, device=self.prior.device)
        if self.position_prior == "relative":
            centre = (self.prior.shape[-1] - 1) // 2
            positions = positions - mask.query_positions(c, self.prior.device)[:, None] + centre  # (c, seen)
        else:
            positions = positions[None]
        inside = (positions >= 0) & (positions < self.prior.shape[-1])
        return self.prior[:, positions.clamp(0, self.prior.shape[-1] - 1)] * inside

    def _auxiliary_loss(self, query: Tensor, key: Tensor, mask: AttentionMask, scale: float) -> Tensor | None:
        """Weighted mean squared error of estimated scores on random pairs, gradient to the basis only."""
        if not self.training or self.auxiliary_loss_weight == 0.0:
            return None
        n_q, n_k = query.shape[-2], key.shape[-2]
        i = torch.randint(n_q, (min(n_q, SAMPLED_TOKENS),), device=query.device)
        j = torch.randint(n_k, (min(n_k, SAMPLED_TOKENS),), device=query.device)
        # Queries against keys in float32 and outside autocast: squared errors are small differences.
        with torch.autocast(query.device.type, enabled=False):
            q, k = at_least_float32(query.detach()), at_least_float32(key.detach())
            if mask.query_keep is not None:  # whatever stands there must not reach the sum, not even as 0 · NaN
                q = q.masked_fill(~mask.query_keep[:, None, :, None], 0.0)
            q_low, k_low = self.basis.query_coordinates(q), self.basis.key_coordinates(k)
            if mask.is_structured:
                offset = self._row_offset(q, k, q_low, k_low, mask).expand(-1, -1, n_q, 1)[:, :, i]
            else:
                offset = self.basis.row_offset(q[:, :, i])
            estimate = (q_low[:, :, i] @ k_low[:, :, j].mT + offset) * scale  # (b, h, i, j)
            if self.prior is not None:
                estimate = estimate + self._prior_scores(mask, n_q, n_k).expand(-1, n_q, -1)[:, i][..., j]
            exact = grouped_matmul(q[:, :, i], k[:, :, j].mT) * scale
            error = (exact - estimate).square()
            usable = sampled_keep(mask, i, j, error)
            return self.auxiliary_loss_weight * (error * usable).sum() / usable.sum().clamp_min(1.0)
