"""A mechanism of one's own: exact attention with a penalty on distance."""

from __future__ import annotations

import torch
from approx_attn.attention.shape import AttentionShape
from torch import Tensor

from approx_attn import AttentionMask, AttentionMechanism, Capabilities, Cost, register_attention
from approx_attn.attention.mask import masked_softmax


@register_attention("alibi")
class AlibiAttention(AttentionMechanism):
    """softmax(s·Q·Kᵀ − m_h·|i − j| + mask)·V with a slope m_h per head, halved from head to head.

    Source: Press, Smith, Lewis, *Train Short, Test Long*, arXiv 2108.12409.

    Args:
        slope: that of the first head.
    """

    capabilities = Capabilities()  # all but windows and grouped queries
    cost_formula = "n²·d"

    def __init__(self, shape: AttentionShape, *, slope: float = 0.5) -> None:
        super().__init__(shape)
        if not slope >= 0:
            raise ValueError(f"attention.slope must be at least 0, got {slope!r}.")
        self.register_buffer("slopes", slope * 0.5 ** torch.arange(self.num_heads), persistent=False)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: AttentionMask,
        scale: float,
        dropout_p: float,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        n_q, n_k = query.shape[-2], key.shape[-2]
        queries = torch.arange(n_k - n_q, n_k, device=query.device)  # the last query stands at the last key
        distance = (queries[:, None] - torch.arange(n_k, device=query.device)).abs()  # (n_q, n_k)
        scores = (query * scale) @ key.transpose(-2, -1) - self.slopes[:, None, None] * distance  # (b, h, n_q, n_k)
        bias = mask.finite_bias()
        if bias is not None:
            scores = scores + bias
        weights = masked_softmax(scores, mask.dense_keep(n_q, n_k, query.device))
        weights = torch.nn.functional.dropout(weights, dropout_p).to(value.dtype)
        return weights @ value, weights if need_weights else None

    def cost(self, query_length: int, key_length: int | None = None, *, causal: bool | None = None) -> Cost:
        n_q, n_k, pairs = self._pairs(query_length, key_length, causal)
        return Cost(
            exact_pairs=self.num_heads * pairs,
            total_pairs=self.num_heads * pairs,
            score_multiply_adds=self.num_heads * n_q * n_k * self.head_dim,
            value_multiply_adds=self.num_heads * n_q * n_k * self.value_dim,
            state=self.num_heads * n_q * n_k,
        )
