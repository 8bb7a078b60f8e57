"""Exact softmax attention: the reference for accuracy and, through PyTorch's fused kernels, for speed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from approx_attn.attention.base import (
    AttentionMechanism,
    Capabilities,
    Cost,
    apply_dropout,
    repeat_heads,
)
from approx_attn.attention.mask import AttentionMask, at_least_float32, masked_softmax
from approx_attn.attention.registry import register_attention


@register_attention("exact")
class ExactAttention(AttentionMechanism):
    """softmax(s·Q·Kᵀ + mask)·V through `torch.nn.functional.scaled_dot_product_attention`."""

    capabilities = Capabilities(grouped_query=True)
    cost_formula = "n²·d"

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
        if need_weights:
            return exact_attention_with_weights(query, key, value, mask, scale, dropout_p)
        n_q, n_k = query.shape[-2], key.shape[-2]
        only_causal = mask.causal and mask.is_structured and mask.key_keep is None and mask.query_offset == 0
        additive = None if only_causal else mask.additive(n_q, n_k, query.dtype, query.device)
        output = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=additive,
            dropout_p=dropout_p,
            is_causal=only_causal,
            scale=scale,
            enable_gqa=self.num_key_value_heads != self.num_heads,
        )
        return output, None

    def cost(self, query_length: int, key_length: int | None = None, *, causal: bool | None = None) -> Cost:
        _, _, pairs = self._pairs(query_length, key_length, causal)
        return Cost(
            exact_pairs=self.num_heads * pairs,
            total_pairs=self.num_heads * pairs,
            score_multiply_adds=self.num_heads * pairs * self.head_dim,
            value_multiply_adds=self.num_heads * pairs * self.value_dim,
            state=0,
        )


def exact_attention_with_weights(
    query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """Exact attention that holds its (b, h, n_q, n_k) weights; for callers who want to see them."""
    key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    scores = at_least_float32((query * scale) @ key.transpose(-2, -1))  # (b, h, n_q, n_k)
    bias = mask.finite_bias()
    if bias is not None:
        scores = scores + bias
    weights = masked_softmax(scores, mask.dense_keep(query.shape[-2], key.shape[-2], query.device))
    weights = apply_dropout(weights, dropout_p).to(value.dtype)
    return torch.matmul(weights, value), weights
