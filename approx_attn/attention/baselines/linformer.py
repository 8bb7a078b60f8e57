"""Attention over keys and values projected along the sequence to a fixed number of them.

Wang, Li, Khabsa, Fang, Ma: *Linformer: Self-Attention with Linear Complexity*, arXiv 2006.04768.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from approx_attn.attention.base import AttentionMechanism, Capabilities, Cost, Request
from approx_attn.attention.budget import require_budget, resolve_count
from approx_attn.attention.registry import register_attention
from approx_attn.attention.shape import AttentionShape
from approx_attn.errors import require_one_of

SHARING = ("none", "heads", "key_value", "layer")


@register_attention("linformer")
class LinformerAttention(AttentionMechanism):
    """softmax(s·Q(EK)ᵀ)(FV) with learned projections E, F (m × n) along the key axis.

    E and F are laid out for `max_length` keys; a shorter input uses their first columns, a longer one is
    refused. Padded keys and values are zero before the projection, so padding on the right changes nothing; on
    the left it moves tokens to other columns, which changes the result. A projected key mixes all positions, so
    neither a causal nor an arbitrary mask can be kept, and there are no weights over single keys to return.

    Args:
        num_keys: m, the number of projected keys: a fraction of `max_length`, or a number.
        share: what uses one projection. `none`: E and F for each head; `heads`: E and F for all heads;
            `key_value`: one E = F for all heads; `layer`: one for all heads and layers.
    """

    capabilities = Capabilities(
        causal=False,
        arbitrary_mask=False,
        variable_length=False,
        needs_calibration=True,
        returns_weights=False,
        has_parameters=True,
        grouped_query=True,
    )
    cost_formula = "n·m·d"

    def __init__(
        self,
        shape: AttentionShape,
        *,
        num_keys: float | int = 0.25,
        share: str = "heads",
    ) -> None:
        super().__init__(shape)
        length = self._laid_out_length()
        require_budget("attention.num_keys", num_keys)
        self.num_keys = resolve_count(num_keys, length)
        self.share = require_one_of("attention.share", share, SHARING)
        heads = self.num_key_value_heads if share == "none" else 1
        self.key_projection = nn.Parameter(torch.empty(heads, self.num_keys, length))
        self.value_projection: nn.Parameter | None = None  # None: the same as for keys
        if share in ("none", "heads"):
            self.value_projection = nn.Parameter(torch.empty_like(self.key_projection))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform entries with gain 1/√2, of variance 1/(m + n), as the authors start theirs (in fairseq)."""
        for projection in self.parameters():
            for matrix in projection:  # (m, n) of one head
                nn.init.xavier_uniform_(matrix, gain=2**-0.5)

    def tie_to(self, first: AttentionMechanism) -> None:
        if self.share == "layer" and isinstance(first, LinformerAttention):
            self.key_projection = first.key_projection

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> tuple[Tensor, Tensor | None]:
        n_k = key.shape[-2]
        key_projection = self.key_projection[..., :n_k]  # (h_kv | 1, m, n_k)
        value_projection = key_projection if self.value_projection is None else self.value_projection[..., :n_k]
        pooled_key = key_projection.to(key.dtype) @ key  # (b, h_kv, m, d)
        pooled_value = value_projection.to(value.dtype) @ value  # (b, h_kv, m, d_v)
        grouped = self.num_key_value_heads != self.num_heads
        output = F.scaled_dot_product_attention(
            query.to(pooled_key.dtype),
            pooled_key,
            pooled_value,
            dropout_p=request.dropout_p,
            scale=request.scale,
            enable_gqa=grouped,
        )
        return output, None  # a sample without any key has zero values, hence zero output

    def cost(self, query_length: int, key_length: int | None = None, *, causal: bool | None = None) -> Cost:
        n_q, n_k, pairs, _ = self._pairs(query_length, key_length, causal)
        m, d, d_v = self.num_keys, self.head_dim, self.value_dim
        return Cost(
            exact_pairs=0,
            total_pairs=self.num_heads * pairs,
            score_multiply_adds=self.num_key_value_heads * m * n_k * d + self.num_heads * n_q * m * d,
            value_multiply_adds=self.num_key_value_heads * m * n_k * d_v + self.num_heads * n_q * m * d_v,
            state=sum(p.numel() for p in self.parameters()) + self.num_key_value_heads * m * (d + d_v),
        )
