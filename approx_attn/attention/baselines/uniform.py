"""Uniform attention: the mean of the values that a query may use."""

from __future__ import annotations

import torch
from torch import Tensor

from approx_attn.attention.base import AttentionMechanism, Capabilities, Cost, Request, apply_dropout
from approx_attn.attention.baselines.linear import divide_or_zero
from approx_attn.attention.baselines.positional import attention_from_scores
from approx_attn.attention.mask import at_least_float32
from approx_attn.attention.registry import register_attention


@register_attention("uniform")
class UniformAttention(AttentionMechanism):
    """Weight 1/n on each of the n keys that a query may use.

    Source: the baseline of Wiegreffe & Pinter, *Attention is not not Explanation*, arXiv 1908.04626. All
    scores are zero; a mask that is added to scores therefore still acts, as softmax(mask). Padding and
    causality are sums and running sums, linear in the length, where dropout drops a key for all queries of a
    head at once; an arbitrary mask takes the n_q × n_k array.
    """

    capabilities = Capabilities(window=True)
    cost_formula = "0 (n·d_v for the values)"

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> tuple[Tensor, Tensor | None]:
        mask, n_q, n_k = request.mask, query.shape[-2], key.shape[-2]
        if request.need_weights or not mask.is_structured:
            scores = torch.zeros(1, self.num_heads, n_q, n_k, dtype=value.dtype, device=value.device)
            return attention_from_scores(scores, value, request)
        value = at_least_float32(value)  # sums over many keys
        counts = torch.ones_like(value[..., :1])  # (b, h, n_k, 1)
        if mask.key_keep is not None:
            counts = counts * mask.key_keep[:, None, :, None]
        value = value * apply_dropout(torch.ones_like(value[..., :1]), request.dropout_p)
        columns = torch.cat((value, counts), dim=-1)
        totals = mask.sums_over_keys(columns, n_q).expand(-1, -1, n_q, -1)  # (b, h, n_q, d_v + 1)
        return divide_or_zero(totals[..., :-1], totals[..., -1:]), None

    def cost(self, query_length: int, key_length: int | None = None, *, causal: bool | None = None) -> Cost:
        n_q, n_k, pairs, _ = self._pairs(query_length, key_length, causal)
        return Cost(
            exact_pairs=0,
            total_pairs=self.num_heads * pairs,
            score_multiply_adds=0,
            value_multiply_adds=self.num_heads * (n_q + n_k) * self.value_dim,  # one sum and one division each
            state=self.num_heads * n_k * (self.value_dim + 1),
        )
