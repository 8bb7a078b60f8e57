"""Compressed, selected and near keys in three gated branches.

Yuan et al.: *Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention*, arXiv 2502.11089.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from approx_attn.attention.base import AttentionMechanism, Capabilities, Cost, Request, apply_dropout, repeat_heads
from approx_attn.attention.baselines.sliding_window import SlidingWindowAttention
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
from approx_attn.attention.mask import AttentionMask, at_least_float32, masked_softmax
from approx_attn.attention.registry import register_attention
from approx_attn.attention.shape import AttentionShape
from approx_attn.errors import require_count

BRANCHES = 3


@register_attention("nsa")
class NativeSparseAttention(AttentionMechanism):
    """g₁·(attention over compressed keys) + g₂·(over keys of selected blocks) + g₃·(over near keys), g = σ(W q + b).

    Compressed keys and values are φ of the `compress_size` keys from every `stride`-th on. A block's score is the sum,
    over its strides and the query heads that share a key head, of the probabilities of the compressed keys that cover
    the stride (equations 9 and 10 of the paper); it chooses and gets no gradient. The first block with a key, the
    query's own and the one before it are always chosen. A query without any whole compressed key before it, or without
    an open one at all, gets zeros from that branch.

    The contract hands over queries, keys and values, not the input of the layer. So the gate is of the query, one map
    per head, where the paper has an MLP of the input, and the branches share keys and values, where the paper projects
    each for itself. φ(x) is the mean of a block plus a two-layer MLP of x + intra-block positions, whose second layer
    starts at zero (the paper has the MLP alone; the mean is what open implementations take); the gates start at a third
    each. The start is thus the mean of three kinds of attention, of use only after training.

    The paper is causal only. Without a causal mask the window reaches to both sides, the next block is always chosen,
    too, and all compressed keys are seen. Blocks are cut at fixed positions: padding on the right changes nothing,
    padding on the left moves tokens between blocks. A compressed key with a padded key in it is closed.

    Args:
        keep: exact keys of each query: a fraction of those it may use, or a number. Two thirds are in selected blocks,
            rounded up to blocks and to one more than are always chosen, a third in the window: the paper's 1,024 and
            512. Keys may be in both.
        block_size: keys in a selected block (64 in the paper, for 8,192 tokens and more).
        compress_size: keys in a compressed one (32); divides block_size.
        stride: positions between compressed keys (16); divides compress_size.
    """

    capabilities = Capabilities(
        arbitrary_mask=False, needs_calibration=True, returns_weights=False, has_parameters=True, grouped_query=True
    )
    cost_formula = "(n²/stride)·d + keep·n²·d"

    def __init__(
        self,
        shape: AttentionShape,
        *,
        keep: float | int = 0.25,
        block_size: int = 32,
        compress_size: int = 32,
        stride: int = 16,
    ) -> None:
        super().__init__(shape)
        self.keep = require_budget("attention.keep", keep)
        self.block_size = require_count("attention.block_size", block_size)
        self.compress_size = require_count("attention.compress_size", compress_size)
        self.stride = require_count("attention.stride", stride)
        for key, part, whole in (
            ("compress_size", compress_size, "block_size"),
            ("stride", stride, "compress_size"),
        ):
            if getattr(self, whole) % part:
                raise ValueError(
                    f"attention.{key} must divide attention.{whole}={getattr(self, whole)} of nsa, got {part}."
                )
        share = keep / 3 if isinstance(keep, float) else max(1, keep // 3)
        self.selected = keep - share if isinstance(keep, float) else max(1, keep - share)
        # Repeats key heads itself, so that it is one of as many heads.
        self.window = SlidingWindowAttention(replace(shape, num_key_value_heads=shape.num_heads), keep=share)
        self.compress_key = Compression(shape.head_dim, compress_size, stride)
        self.compress_value = Compression(shape.value_dim, compress_size, stride)
        self.gate_weight = nn.Parameter(torch.zeros(shape.num_heads, BRANCHES, shape.head_dim))
        self.gate_bias = nn.Parameter(torch.full((shape.num_heads, BRANCHES), -math.log(BRANCHES - 1)))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> tuple[Tensor, Tensor | None]:
        mask = request.mask
        if mask.query_keep is not None:  # whatever stands there must not reach a gradient, not even as 0 · NaN
            query = query.masked_fill(~mask.query_keep[:, None, :, None], 0.0)
        query, key, value = in_autocast_type(query, key, value)
        repeated_key, repeated_value = (repeat_heads(x, self.num_heads) for x in (key, value))
        compressed, probability = self._compressed(query, key, value, request)
        branches = (
            compressed,
            self._selected(query, key, value, probability, request),
            self.window.attend(query, repeated_key, repeated_value, request)[0],
        )
        gates = query @ self.gate_weight.to(query.dtype).transpose(-2, -1)  # (b, h, n_q, 3)
        gates = at_least_float32(gates + self.gate_bias.to(query.dtype)[:, None]).sigmoid()
        output = sum(gate[..., None] * branch for gate, branch in zip(gates.unbind(-1), branches, strict=True))
        assert isinstance(output, Tensor)
        return output, None

    def _compressed(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> tuple[Tensor, Tensor]:
        """Attention over compressed keys, (b, h, n_q, d_v), and its probabilities, (b, h_kv, h / h_kv, n_q, n_c)."""
        mask, n_q = request.mask, query.shape[-2]
        grouped = (query * request.scale).unflatten(1, (self.num_key_value_heads, -1))  # (b, h_kv, h / h_kv, n_q, d)
        keys, values = self.compress_key(key), self.compress_value(value)  # (b, h_kv, n_c, d)
        first = torch.arange(keys.shape[-2], device=key.device) * self.stride
        is_open = torch.ones(1, len(first), dtype=torch.bool, device=key.device)
        if mask.key_keep is not None:  # whole ones only
            inside = first[:, None] + torch.arange(self.compress_size, device=key.device)
            is_open = mask.key_keep[:, inside].all(dim=-1)  # (b, n_c)
        is_open = is_open[:, None, None, None]
        if mask.causal:
            is_open = is_open & (first + self.compress_size <= mask.query_positions(n_q, key.device)[:, None] + 1)
        scores = grouped @ keys[:, :, None].transpose(-2, -1)
        probability = masked_softmax(scores, is_open)
        output = apply_dropout(probability, request.dropout_p).to(values.dtype) @ values[:, :, None]
        return output.flatten(1, 2), probability.detach()

    def _selected(self, query: Tensor, key: Tensor, value: Tensor, probability: Tensor, request: Request) -> Tensor:
        """Attention over the keys of the chosen blocks, (b, h, n_q, d_v)."""
        mask, size = request.mask, self.block_size
        keys_open = open_keys(mask.key_keep, key.shape[-2], size, key.device)  # (b | 1, n_blocks, block)
        block, is_open = self._choose(probability, keys_open.any(dim=-1), mask)
        heads = self.num_heads // self.num_key_value_heads
        return routed_attention(
            query * request.scale,
            in_blocks(key, size),
            in_blocks(value, size),
            keys_open[:, None],
            block.repeat_interleave(heads, dim=1),
            is_open.repeat_interleave(heads, dim=1),
            dropout_p=request.dropout_p,
            causal_offset=mask.query_offset if mask.causal else None,
        )

    @torch.no_grad()
    def _choose(self, probability: Tensor, has_keys: Tensor, mask: AttentionMask) -> tuple[Tensor, Tensor]:
        """The blocks of each query, (b, h_kv, n_q, m), and which of them count; `has_keys` is (b | 1, n_blocks)."""
        scores = self._block_scores(probability.sum(dim=2), has_keys.shape[-1])  # (b, h_kv, n_q, n_blocks)
        position = mask.query_positions(scores.shape[-2], scores.device)[:, None]  # (n_q, 1)
        blocks = torch.arange(scores.shape[-1], device=scores.device)
        usable = has_keys[:, None, None, :]  # (b | 1, 1, 1, n_blocks)
        if mask.causal:
            usable = usable & (blocks * self.block_size <= position)
        after = blocks - position.div(self.block_size, rounding_mode="floor")  # (n_q, n_blocks)
        forced = (after >= -1) & (after <= (0 if mask.causal else 1))
        forced = forced | (has_keys & (has_keys.cumsum(dim=-1) == 1))[:, None, None, :]
        count = blocks_per_query(self.selected, self.block_size, usable.sum(dim=-1, keepdim=True))
        least = self._least(mask.causal)
        most = max(most_blocks(self.selected, self.block_size, scores.shape[-1]), least)
        return choose_blocks(scores, forced, usable, count.clamp(min=least), most)

    @staticmethod
    def _least(causal: bool) -> int:
        """The first block, the own, those beside it, and one that is chosen by its score."""
        return 4 if causal else 5

    def _block_scores(self, probability: Tensor, n_blocks: int) -> Tensor:
        """Probabilities (..., n_c) of compressed keys -> (..., n_blocks), summed over strides and what covers them."""
        covers, strides = self.compress_size // self.stride, self.block_size // self.stride
        if probability.shape[-1] == 0:
            return probability.new_zeros(*probability.shape[:-1], n_blocks)
        padded = F.pad(probability, (covers - 1, covers - 1))
        count = probability.shape[-1] + covers - 1  # strides that are covered
        of_stride = sum(padded[..., i : i + count] for i in range(covers))
        assert isinstance(of_stride, Tensor)
        return F.pad(of_stride, (0, n_blocks * strides - count)).unflatten(-1, (n_blocks, strides)).sum(dim=-1)

    def cost(self, query_length: int, key_length: int | None = None, *, causal: bool | None = None) -> Cost:
        """Leaves out rows that fill up tiles; takes keys of the window to be in no block that is chosen by score."""
        n_q, n_k, pairs, causal = self._pairs(query_length, key_length, causal)
        h, h_kv, d, d_v = self.num_heads, self.num_key_value_heads, self.head_dim, self.value_dim
        count, keys = unpadded_routes(self.selected, self.block_size, n_q, n_k, causal, self._least(causal))
        selected, parts = int(count.sum()) * self.block_size, n_q * int(count.max())
        window = self.window.cost(n_q, n_k, causal=causal)
        n_c = self.compress_key.count(n_k)
        beside = (2 if causal else 3) * self.block_size  # keys of the blocks around the query, which are selected
        more = max(window.exact_pairs // h - n_q * beside, 0)
        compress = h_kv * n_c * (self.compress_key.multiply_adds + self.compress_value.multiply_adds)
        return Cost(
            exact_pairs=h * min(round(float(keys.sum())) + more, pairs),
            total_pairs=h * pairs,
            score_multiply_adds=compress + h * (n_q * (n_c + BRANCHES) + selected) * d + window.score_multiply_adds,
            value_multiply_adds=h * (n_q * n_c + selected + parts) * d_v + window.value_multiply_adds,
            state=sum(x.numel() for x in self.parameters())
            + h * (3 * n_q * n_c + parts * (d_v + 2))
            + h_kv * (n_c * (self.compress_size + 2) * (d + d_v) + n_q * -(-n_k // self.block_size))
            + window.state,
            computed_pairs=h * selected + (window.computed_pairs or window.exact_pairs),
        )

    def extra_repr(self) -> str:
        sizes = f"block_size={self.block_size}, compress_size={self.compress_size}, stride={self.stride}"
        return f"{super().extra_repr()}, keep={self.keep}, {sizes}"


class Compression(nn.Module):
    """φ: one vector for `size` consecutive ones, every `stride` positions; all heads share it.

    mean(x) + W₂ GELU(W₁ (x + p) + b₁) + b₂ with learned positions p within the block; W₂ and b₂ start at zero.
    """

    def __init__(self, dim: int, size: int, stride: int) -> None:
        super().__init__()
        self.size, self.stride = size, stride
        self.position = nn.Parameter(torch.randn(size, dim) * 0.02)
        self.hidden = nn.Linear(size * dim, dim)
        self.out = nn.Linear(dim, dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def count(self, n: int) -> int:
        """Whole blocks of n positions."""
        return max(0, (n - self.size) // self.stride + 1)

    @property
    def multiply_adds(self) -> int:
        """Of one block."""
        return self.hidden.weight.numel() + self.out.weight.numel()

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, n, dim) -> (b, h, count(n), dim)."""
        count, pieces = self.count(x.shape[-2]), self.size // self.stride
        cells = count + pieces - 1 if count > 0 else 0  # none: the parameters still get a gradient, of zero
        strides = x[..., : cells * self.stride, :].unflatten(-2, (cells, self.stride))
        # Shifted copies rather than `unfold`; see Band.key_blocks.
        blocks = torch.cat([strides[..., i : i + count, :, :] for i in range(pieces)], dim=-2)  # (b, h, n_c, size, dim)
        hidden = (blocks + self.position.to(x.dtype)).flatten(-2)
        hidden = F.gelu(F.linear(hidden, self.hidden.weight.to(x.dtype), self.hidden.bias.to(x.dtype)))
        change = F.linear(hidden, self.out.weight.to(x.dtype), self.out.bias.to(x.dtype))
        return (at_least_float32(blocks).mean(dim=-2) + change).to(x.dtype)
