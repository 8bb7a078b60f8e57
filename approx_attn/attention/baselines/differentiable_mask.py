"""Differentiable mask: exact attention that learns which offsets, or which pairs, it can do without."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from approx_attn.attention.base import AttentionMechanism, Capabilities, Cost, Request, apply_dropout
from approx_attn.attention.baselines.linear import divide_or_zero
from approx_attn.attention.baselines.positional import PositionTable
from approx_attn.attention.mask import AttentionMask, at_least_float32, causal_keep
from approx_attn.attention.registry import register_attention
from approx_attn.attention.shape import AttentionShape
from approx_attn.errors import require_weight


@register_attention("differentiable_mask")
class DifferentiableMaskAttention(AttentionMechanism):
    """softmax(s·Q·Kᵀ + log G + mask)·V with gates G ∈ {0, 1} learned per head, by offset or by pair.

    Source: SparseBERT (Shi et al., arXiv 2102.12871). In training a gate is 1 where θ plus logistic noise is
    above 0 (a Gumbel-sigmoid sample), and the derivative is that of sigmoid((θ + noise)/temperature), straight
    through. In evaluation it is 1 where θ > 0. A closed gate adds −∞ to the score; in the backward pass its
    pair counts at most as much as the strongest open one, so that closed gates can open again.

    Attributes:
        auxiliary_loss: in training, `penalty` times the mean gate over the pairs of real queries that the mask allows.
        open_fraction: fraction of those pairs whose gate was open in the latest forward pass, a scalar tensor.

    Args:
        alignment: relative: one gate per head and offset. absolute: one per head and pair of positions.
        penalty: λ, weight of the mean gate in the loss.
        temperature: of the sigmoid in the derivative.
        initial_open: probability with which every gate is open at the start.
    """

    capabilities = Capabilities(has_parameters=True, window=True)
    cost_formula = "n²·d"

    def __init__(
        self,
        shape: AttentionShape,
        *,
        alignment: str = "relative",
        penalty: float = 0.01,
        temperature: float = 1.0,
        initial_open: float = 0.9,
    ) -> None:
        super().__init__(shape)
        if not 0.0 < temperature < math.inf:
            raise ValueError(f"attention.temperature must be a number above 0, got {temperature!r}.")
        if not 0.0 < initial_open < 1.0:
            raise ValueError(f"attention.initial_open must be a probability between 0 and 1, got {initial_open!r}.")
        self.penalty = require_weight("attention.penalty", penalty)
        self.temperature = float(temperature)
        initial = math.log(initial_open / (1.0 - initial_open))
        self.gates = PositionTable(shape.num_heads, self._laid_out_length(), alignment, initial)
        self.open_fraction: Tensor | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> tuple[Tensor, Tensor | None]:
        mask, scale, dropout_p, need_weights = request
        n_q, n_k = query.shape[-2], key.shape[-2]
        gate = self._sample(n_q, n_k, mask.query_offset)  # (h, n_q, n_k)
        keep = mask.dense_keep(n_q, n_k, query.device)
        self._record(gate, mask, keep)
        if not self.training and not need_weights:
            return self._fused(query, key, value, mask, gate > 0, scale), None
        scores = mask.logits(at_least_float32((query * scale) @ key.transpose(-2, -1)))  # (b, h, n_q, n_k)
        weights = gated_softmax(scores, gate, keep)
        weights = apply_dropout(weights, dropout_p).to(value.dtype)
        return weights @ value, weights if need_weights else None

    @staticmethod
    def _fused(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, is_open: Tensor, scale: float) -> Tensor:
        """With gates that nothing is to be learned from, PyTorch's kernels do it."""
        both = is_open[None] if mask.pair_keep is None else is_open & mask.pair_keep
        additive = replace(mask, pair_keep=both).additive(query.shape[-2], key.shape[-2], query.dtype, query.device)
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=additive, scale=scale)

    def _sample(self, n_q: int, n_k: int, query_offset: int) -> Tensor:
        """(h, n_q, n_k) gates, 0 or 1; in training drawn, with the derivative of the soft gate."""
        theta = at_least_float32(self.gates(n_q, n_k, query_offset))
        if not self.training:
            return (theta > 0).to(theta.dtype)
        noisy = theta + torch.rand_like(theta).logit(eps=1e-6)  # logistic: the difference of two Gumbel variables
        soft = torch.sigmoid(noisy / self.temperature)
        return (noisy > 0).to(soft.dtype) + (soft - soft.detach())

    def _record(self, gate: Tensor, mask: AttentionMask, keep: Tensor | None) -> None:
        """Set `open_fraction` and, in training, `auxiliary_loss` from the gates of allowed pairs of real queries."""
        if mask.query_keep is not None:  # whatever is padded has no part in the loss
            rows = mask.query_keep[:, None, :, None]
            keep = rows if keep is None else keep & rows
        if keep is None:
            mean = gate.mean()
        else:
            allowed = keep.expand(*keep.shape[:-3], *gate.shape).reshape(-1, *gate.shape).sum(dim=0)  # samples per pair
            mean = (gate * allowed).sum() / allowed.sum().clamp(min=1)
        self.open_fraction = mean.detach()
        self.auxiliary_loss = self.penalty * mean if self.training else None

    def cost(self, query_length: int, key_length: int | None = None, *, causal: bool | None = None) -> Cost:
        n_q, n_k, pairs, causal = self._pairs(query_length, key_length, causal)
        return Cost(
            exact_pairs=self._open_pairs(n_q, n_k, causal),
            total_pairs=self.num_heads * pairs,
            score_multiply_adds=self.num_heads * n_q * n_k * self.head_dim,  # a closed pair is computed, too
            value_multiply_adds=self.num_heads * n_q * n_k * self.value_dim,
            state=self.gates.values.numel() + 2 * self.num_heads * n_q * n_k,
            computed_pairs=self.num_heads * n_q * n_k,
        )

    @torch.no_grad()
    def _open_pairs(self, n_q: int, n_k: int, causal: bool) -> int:
        """Pairs of all heads whose gate is open in evaluation; causal is lower-right aligned."""
        offset = n_k - n_q if causal else 0
        total = 0
        for start in range(0, n_q, 256):  # chunks of queries: the whole would be (h, n_q, n_k)
            rows = min(256, n_q - start)
            open_gates = self.gates(rows, n_k, offset + start) > 0
            if causal:
                open_gates = open_gates & causal_keep(rows, n_k, offset + start, open_gates.device)
            total += int(open_gates.sum())
        return total


def gated_softmax(scores: Tensor, gate: Tensor, keep: Tensor | None) -> Tensor:
    """Softmax over the open pairs, differentiable in the gates of closed ones as well.

    Args:
        scores: (b, h, n_q, n_k), at least float32.
        gate: (h, n_q, n_k), exactly 0 or 1 in value, with a derivative of its own.
        keep: bool, broadcastable to `scores`, or None; pairs that no gate can open.

    Returns:
        Weights of the shape of `scores`; a row with nothing open is zero.
    """
    is_open = gate.detach() > 0
    if keep is not None:
        is_open = is_open & keep
    lowest = torch.finfo(scores.dtype).min
    top = scores.detach().masked_fill(~is_open, lowest).amax(dim=-1, keepdim=True)
    # The limit is met by closed pairs only: they would overflow, and have a part in the gradient of the gates alone.
    exponentials = (scores - top).clamp(max=0.0).exp() * gate
    if keep is not None:
        exponentials = exponentials.masked_fill(~keep, 0.0)
    return divide_or_zero(exponentials, exponentials.sum(dim=-1, keepdim=True))
