"""Attention to the blocks of keys that a gate without parameters chooses for each query.

Lu et al.: *MoBA: Mixture of Block Attention for Long-Context LLMs*, arXiv 2502.13189.
"""

from __future__ import annotations

import torch
from torch import Tensor

from approx_attn.attention.base import AttentionMechanism, Capabilities, Cost, Request
from approx_attn.attention.baselines.mra import cut
from approx_attn.attention.baselines.topk import in_autocast_type
from approx_attn.attention.budget import require_budget
from approx_attn.attention.layouts.routed import (
    blocks_per_query,
    choose_blocks,
    in_blocks,
    most_blocks,
    open_keys,
    routed_attention,
    unpadded_routes,
)
from approx_attn.attention.mask import AttentionMask, at_least_float32
from approx_attn.attention.registry import register_attention
from approx_attn.attention.shape import AttentionShape
from approx_attn.errors import require_count


@register_attention("moba")
class MoBAAttention(AttentionMechanism):
    """Softmax over the keys of the query's own block and of the blocks with the largest q·k̄, k̄ a block's mean key.

    The gate q·k̄ chooses and gets no gradient; under a causal mask only blocks that have begun are chosen from, and the
    query's own block, the one at its position, is masked within. The paper is causal only; without a causal mask the
    own block is chosen likewise and the others from all blocks. Blocks are cut at fixed positions: padding on the right
    changes nothing, padding on the left moves tokens between blocks. Nothing is learned; all blocks are exact.

    Args:
        keep: blocks of each query, its own among them: a fraction of those it may use, or a number of keys, both
            rounded up to blocks.
        block_size: keys in a block; the paper has a sixteenth of its shortest input, 512 of 8,192.
    """

    capabilities = Capabilities(arbitrary_mask=False, returns_weights=False, grouped_query=True)
    cost_formula = "keep·n²·d + (n²/b)·d"

    def __init__(self, shape: AttentionShape, *, keep: float | int = 0.25, block_size: int = 32) -> None:
        super().__init__(shape)
        self.keep = require_budget("attention.keep", keep)
        self.block_size = require_count("attention.block_size", block_size)

    @classmethod
    def full_budget(cls, length: int, head_dim: int) -> dict[str, float]:
        return {"keep": 1.0}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> tuple[Tensor, Tensor | None]:
        mask, size = request.mask, self.block_size
        if mask.query_keep is not None:  # whatever stands there must not reach a gradient, not even as 0 · NaN
            query = query.masked_fill(~mask.query_keep[:, None, :, None], 0.0)
        query, key, value = in_autocast_type(query * request.scale, key, value)
        keys_open = open_keys(mask.key_keep, key.shape[-2], size, key.device)
        block, is_open = self._choose(query, key, mask, keys_open.any(dim=-1))
        output = routed_attention(
            query,
            in_blocks(key, size),
            in_blocks(value, size),
            keys_open[:, None],
            block,
            is_open,
            dropout_p=request.dropout_p,
            causal_offset=mask.query_offset if mask.causal else None,
        )
        return output, None

    @torch.no_grad()
    def _choose(self, query: Tensor, key: Tensor, mask: AttentionMask, has_keys: Tensor) -> tuple[Tensor, Tensor]:
        """The blocks of each query, (b, h, n_q, m), and which of them count; `has_keys` is (b | 1, n_blocks)."""
        mean = cut(key, mask.key_keep, self.block_size).mean[:, :, None]  # (b, h_kv, 1, n_blocks, d)
        gate = at_least_float32(query.unflatten(1, (mean.shape[1], -1)) @ mean.transpose(-2, -1)).flatten(1, 2)
        position = mask.query_positions(query.shape[-2], query.device)[:, None]  # (n_q, 1)
        blocks = torch.arange(gate.shape[-1], device=gate.device)
        usable = has_keys[:, None, None, :]  # (b | 1, 1, 1, n_blocks)
        if mask.causal:
            usable = usable & (blocks * self.block_size <= position)
        own = blocks == position.div(self.block_size, rounding_mode="floor")  # (n_q, n_blocks)
        count = blocks_per_query(self.keep, self.block_size, usable.sum(dim=-1, keepdim=True))
        return choose_blocks(gate, own, usable, count, most_blocks(self.keep, self.block_size, gate.shape[-1]))

    def cost(self, query_length: int, key_length: int | None = None, *, causal: bool | None = None) -> Cost:
        """Rows that fill up the last tile of a block, at most 63 each, depend on the input and are left out."""
        n_q, n_k, pairs, causal = self._pairs(query_length, key_length, causal)
        h, d, d_v, size = self.num_heads, self.head_dim, self.value_dim, self.block_size
        count, keys = unpadded_routes(self.keep, size, n_q, n_k, causal)
        n_blocks, computed, parts = -(-n_k // size), int(count.sum()) * size, n_q * int(count.max())
        return Cost(
            exact_pairs=h * round(float(keys.sum())),
            total_pairs=h * pairs,
            score_multiply_adds=h * (n_q * n_blocks + computed) * d,
            value_multiply_adds=h * (computed + parts) * d_v,
            state=h * (2 * n_q * n_blocks + parts * (d_v + 2)),
            computed_pairs=h * computed,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, keep={self.keep}, block_size={self.block_size}"
