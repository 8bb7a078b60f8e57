"""A mechanism of one's own: exact attention with a penalty on distance."""

from __future__ import annotations

import torch
from torch import Tensor

from approx_attn import AttentionMechanism, Capabilities, Cost, build_attention, register_attention
from approx_attn.attention import AttentionShape
from approx_attn.attention.base import Request
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

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> tuple[Tensor, Tensor | None]:
        mask, n_q, n_k = request.mask, query.shape[-2], key.shape[-2]
        positions = mask.query_positions(n_q, query.device)  # (n_q,), among the keys
        distance = (positions[:, None] - torch.arange(n_k, device=query.device)).abs()  # (n_q, n_k)
        scores = (query * request.scale) @ key.transpose(-2, -1)  # (b, h, n_q, n_k)
        scores = scores - self.slopes[:, None, None] * distance
        bias = mask.finite_bias()
        if bias is not None:
            scores = scores + bias
        weights = masked_softmax(scores, mask.dense_keep(n_q, n_k, query.device))
        weights = torch.nn.functional.dropout(weights, request.dropout_p).to(value.dtype)
        return weights @ value, weights if request.need_weights else None

    def cost(self, query_length: int, key_length: int | None = None, *, causal: bool | None = None) -> Cost:
        return build_attention("exact", self.shape).cost(query_length, key_length, causal=causal)
