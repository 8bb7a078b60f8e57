"""Mechanisms that estimate every score from a content basis, a position prior and the mask."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from approx_attn.attention.eigen.chunk_scores import (
    grouped_matmul,
    grouped_to_query_heads,
    mean_residual,
    sampled_keep,
)
from approx_attn.attention.eigen.content_basis import HasContentBasis
from approx_attn.attention.mask import AttentionMask, at_least_float32

SAMPLED_TOKENS = 32  # queries and keys sampled per sequence for the auxiliary loss: 32² pairs per head


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

    def _estimate(
        self,
        query: Tensor,
        query_low: Tensor,
        offset: Tensor | None,
        key: Tensor,
        key_low: Tensor,
        mask: AttentionMask,
        keep: Tensor | None,
        scale: float,
    ) -> Tensor:
        """Estimated scores with prior and bias: (b, h, c, seen)."""
        estimate = at_least_float32(query_low @ key_low.mT)
        if offset is None:
            offset = mean_residual(query, key, query_low, key_low, keep)
        estimate = estimate.add_(offset).mul_(scale)  # in place: the products are no longer needed
        if self.prior is not None:
            estimate = estimate + self._prior_scores(mask, *estimate.shape[-2:])
        bias = mask.finite_bias()
        return estimate if bias is None else estimate + bias

    def _row_offset(
        self, query: Tensor, key: Tensor, query_low: Tensor, key_low: Tensor, mask: AttentionMask
    ) -> Tensor:
        """What makes the row mean of the estimates exact, for padding and causality: (b, h, n_q, 1)."""
        n_q, n_k = query.shape[-2], key.shape[-2]
        both = torch.cat([grouped_to_query_heads(key, self.num_heads), key_low], dim=-1)  # (b, h, n_k, d + r)
        both = at_least_float32(both)
        used = both.new_ones(1, 1, n_k, 1) if mask.key_keep is None else mask.key_keep[:, None, :, None].to(both.dtype)
        if mask.causal:
            last = mask.query_positions(n_q, query.device).clamp(0, n_k - 1)
            total = (both * used).cumsum(-2)[..., last, :]  # (b, h, n_q, d + r)
            count = used.cumsum(-2)[..., last, :]
        else:
            total, count = (both * used).sum(-2, keepdim=True), used.sum(-2, keepdim=True)
        mean_key, mean_low = (total / count.clamp_min(1.0)).split([self.head_dim, key_low.shape[-1]], dim=-1)
        return (query * mean_key).sum(-1, keepdim=True) - (query_low * mean_low).sum(-1, keepdim=True)

    @torch.no_grad()
    def _hidden_part(self, key: Tensor, key_low: Tensor) -> Tensor:
        """log ‖(k − k̄)(I − B Aᵀ)‖, with the calibrated k̄ so that no key tells of another: (b, h, 1, n_k)."""
        explained = key_low @ self.basis.query_map.to(key_low.dtype).mT  # (b, h, n_k, d)
        centred = key - self.basis.key_mean.to(key.dtype)[:, None]
        norm = at_least_float32(grouped_to_query_heads(centred, self.num_heads) - explained).norm(dim=-1)
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
