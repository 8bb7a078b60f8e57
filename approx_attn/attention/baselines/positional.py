"""Attention by position alone: weights that are learned and do not depend on the input.

Also the parts that other mechanisms over positions share: a table of numbers per pair of positions or per
offset, and attention with scores that do not come from queries and keys.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from approx_attn.attention.base import AttentionMechanism, Capabilities, Cost, Request, apply_dropout
from approx_attn.attention.mask import masked_softmax
from approx_attn.attention.registry import register_attention
from approx_attn.attention.shape import AttentionShape
from approx_attn.errors import require_one_of

ALIGNMENTS = ("absolute", "relative")


@register_attention("positional")
class PositionalAttention(AttentionMechanism):
    """softmax(P + mask)·V with learned scores P_ij, or P_{j−i}, per head; queries and keys are not looked at.

    Sources: factored attention (Rende et al., arXiv 2405.18874) and the random variant of Synthesizer (Tay et
    al., arXiv 2005.00743). It starts as uniform attention. An additive mask is added to P, as to scores.

    Positions past `max_length` use the numbers of the last one, offsets past its end those of the farthest.

    Args:
        alignment: absolute: one score per pair of positions, max_length² per head. relative: one per offset,
            2·max_length − 1 per head.
    """

    capabilities = Capabilities(has_parameters=True, window=True)
    cost_formula = "0 (n²·d_v for the values)"

    def __init__(
        self,
        shape: AttentionShape,
        *,
        alignment: str = "absolute",
    ) -> None:
        super().__init__(shape)
        self.table = PositionTable(shape.num_heads, self._laid_out_length(), alignment)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> tuple[Tensor, Tensor | None]:
        scores = self.table(query.shape[-2], key.shape[-2], request.mask.query_offset)  # (h, n_q, n_k)
        return attention_from_scores(scores[None], value, request)

    def cost(self, query_length: int, key_length: int | None = None, *, causal: bool | None = None) -> Cost:
        n_q, n_k, pairs, _ = self._pairs(query_length, key_length, causal)
        return Cost(
            exact_pairs=0,
            total_pairs=self.num_heads * pairs,
            score_multiply_adds=0,  # looked up
            value_multiply_adds=self.num_heads * n_q * n_k * self.value_dim,
            state=self.table.values.numel() + self.num_heads * n_q * n_k,
        )


class PositionTable(nn.Module):
    """A learned number for every head and pair of positions, or for every head and offset.

    Args:
        num_heads: h.
        max_length: L; positions past it use the entries of the last one, offsets past it the farthest.
        alignment: absolute (entries per pair) or relative (entries per offset key − query).
        initial: value of every entry.
    """

    def __init__(self, num_heads: int, max_length: int, alignment: str, initial: float = 0.0) -> None:
        super().__init__()
        self.max_length = max_length
        self.alignment = require_one_of("attention.alignment", alignment, ALIGNMENTS)
        shape = (max_length, max_length) if alignment == "absolute" else (2 * max_length - 1,)
        self.values = nn.Parameter(torch.full((num_heads, *shape), initial))

    def forward(self, n_q: int, n_k: int, query_offset: int = 0) -> Tensor:
        """(h, n_q, n_k): the entries for queries at query_offset, query_offset + 1, … over keys at 0, 1, …"""
        if self.alignment == "absolute":
            return self._pairs(n_q, n_k, query_offset)
        return self._offsets(n_q, n_k, query_offset)

    def _pairs(self, n_q: int, n_k: int, query_offset: int) -> Tensor:
        last = query_offset + n_q
        if query_offset >= 0 and max(last, n_k) <= self.max_length:
            return self.values[:, query_offset:last, :n_k]
        rows, columns = (
            torch.arange(start, start + count, device=self.values.device).clamp(0, self.max_length - 1)
            for start, count in ((query_offset, n_q), (0, n_k))
        )
        return self.values.index_select(1, rows).index_select(2, columns)

    def _offsets(self, n_q: int, n_k: int, query_offset: int) -> Tensor:
        # All offsets from that of the last query and first key to that of the first query and last key; each query's
        # row is a window on them.
        offsets = torch.arange(1 - n_q - query_offset, n_k - query_offset, device=self.values.device)
        farthest = self.max_length - 1
        line = self.values.index_select(1, offsets.clamp(-farthest, farthest) + farthest)  # (h, n_q + n_k - 1)
        return line.unfold(-1, n_k, 1).flip(-2)  # (h, n_q, n_k)

    def extra_repr(self) -> str:
        return f"max_length={self.max_length}, alignment={self.alignment}"


def attention_from_scores(scores: Tensor, value: Tensor, request: Request) -> tuple[Tensor, Tensor | None]:
    """softmax(scores + mask)·value for scores that need not differ from sample to sample.

    Args:
        scores: (1 | b, h, n_q, n_k).
        value: (b, h, n_k, d_v).

    Returns:
        output (b, h, n_q, d_v), and weights (b, h, n_q, n_k), if wanted, that are held once for all samples where the
        mask allows it.
    """
    mask, _, dropout_p, need_weights = request
    batch, n_q, n_k = value.shape[0], *scores.shape[-2:]
    weights = masked_softmax(mask.logits(scores), mask.dense_keep(n_q, n_k, value.device))
    if dropout_p > 0.0:
        weights = apply_dropout(weights.expand(batch, -1, -1, -1), dropout_p)  # each sample drops its own
    weights = weights.to(value.dtype)
    if weights.shape[0] == 1:
        # One (n_q, n_k) × (n_k, b·d_v) product per head, where matmul would copy the weights for every sample.
        output = torch.einsum("hij,bhjd->bhid", weights[0], value)
    else:
        output = weights @ value
    return output, weights.expand(batch, -1, -1, -1) if need_weights else None
