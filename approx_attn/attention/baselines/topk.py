"""Attention to the k largest scores of each query, in memory O(n·k).

Gupta, Dar, Goodman, Ciprut, Berant: *Memory-efficient Transformers via Top-k Attention*, arXiv 2106.06899.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from approx_attn.attention.base import AttentionMechanism, Capabilities, Cost, Request, apply_dropout
from approx_attn.attention.budget import kept_pairs, keys_per_query, require_budget, resolve_count
from approx_attn.attention.mask import AttentionMask, at_least_float32, masked_softmax, query_chunks
from approx_attn.attention.registry import register_attention
from approx_attn.attention.shape import AttentionShape
from approx_attn.errors import require_count


@register_attention("topk")
class TopKAttention(AttentionMechanism):
    """Per query the k largest scores, softmax over them, the rest dropped.

    Every score is computed, in chunks of queries; only Q, K, V and the k weights and indices of each query
    are held for the backward pass. Gradient flows through the kept scores, not through the choice.

    Args:
        keep: k, either as a fraction of the keys that a query may use (under a causal mask: of those up to it,
            so that a token's result does not depend on what follows), or as a number of keys, clamped to
            what there is.
        chunk_size: queries scored at once; bounds the memory of a pass at chunk_size·n scores per head.
    """

    capabilities = Capabilities(window=True, softcap=True, sinks=True)
    cost_formula = "n²·d"

    def __init__(
        self,
        shape: AttentionShape,
        *,
        keep: float | int = 0.25,
        chunk_size: int = 256,
    ) -> None:
        super().__init__(shape)
        self.keep = require_budget("attention.keep", keep)
        self.chunk_size = require_count("attention.chunk_size", chunk_size)

    @classmethod
    def full_budget(cls, length: int, head_dim: int) -> dict[str, Any]:
        return {"keep": 1.0}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> tuple[Tensor, Tensor | None]:
        return topk_attention(query, key, value, request, self.keep, self.chunk_size)

    def cost(self, query_length: int, key_length: int | None = None, *, causal: bool | None = None) -> Cost:
        n_q, n_k, pairs, causal = self._pairs(query_length, key_length, causal)
        scored = sum((stop - start) * keys for start, stop, keys in query_chunks(n_q, n_k, self.chunk_size, causal))
        return Cost(
            exact_pairs=self.num_heads * kept_pairs(self.keep, n_q, n_k, causal),
            total_pairs=self.num_heads * pairs,
            score_multiply_adds=self.num_heads * scored * self.head_dim,
            value_multiply_adds=self.num_heads * scored * self.value_dim,
            state=self.num_heads * (2 * n_q * resolve_count(self.keep, n_k) + 2 * min(self.chunk_size, n_q) * n_k),
            computed_pairs=self.num_heads * scored,
        )


# -- the computation -------------------------------------------------------------------------------------


def topk_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    request: Request,
    keep: float | int,
    chunk_size: int,
    estimate: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention over the `keep` best keys of each query.

    Args:
        query, key, value: (b, h, n_q, d), (b, h, n_k, d), (b, h, n_k, d_v).
        request: as in `AttentionMechanism.attend`; only pairs that its mask keeps can be chosen.
        keep: fraction of the usable keys or number of keys per query.
        chunk_size: queries scored at once.
        estimate: (query, key) features (b, h, n_q, r) and (b, h, n_k, r) whose products choose the keys in
            place of the exact scores. They get no gradient.
    """
    mask, scale, dropout_p, need_weights = request
    query, key, value = in_autocast_type(query, key, value)
    n_k = key.shape[-2]
    outputs, weights = [], []
    for start, stop, keys in query_chunks(query.shape[-2], n_k, chunk_size, mask.causal, mask.query_offset):
        part = mask.queries(start, stop).keys(0, keys)
        q, k, v = query[:, :, start:stop], key[:, :, :keys], value[:, :, :keys]
        if estimate is None:
            scores, index, is_open = choose(q, k, part, scale, keep, n_k)
        else:
            _, index, is_open = choose(estimate[0][:, :, start:stop], estimate[1][:, :, :keys], part, scale, keep, n_k)
            scores = scores_at(q, k, part, scale, index)
        drop = apply_dropout(torch.ones_like(scores), dropout_p) if dropout_p > 0.0 else None
        slope = None if part.softcap is None else slope_at(scores, part, part.softcap, index, keys)
        inputs = (q, k, v, part.finite_bias(), part.sinks)
        output, applied = _SparseAttention.apply(*inputs, scores, slope, index, is_open, drop, scale)
        outputs.append(output)
        if need_weights:
            weights.append(scatter_rows(applied, index, n_k))
    return torch.cat(outputs, dim=-2), torch.cat(weights, dim=-2) if need_weights else None


def in_autocast_type(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the type that autocast wants for products, which a custom backward pass must keep to."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


@torch.no_grad()
def choose(
    query: Tensor, key: Tensor, mask: AttentionMask, scale: float, keep: float | int, n_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The keys with the largest scores.

    Args:
        n_k: number of keys that a fraction in `keep` refers to; `key` may hold fewer, the rest being closed to
            all these queries.

    Returns:
        scores: (b, h, n_q, k) float32 or float64, largest first.
        index: (b, h, n_q, k) int32, their keys.
        is_open: (b, h, n_q, k) bool, False where a query may use fewer than k keys.
    """
    n_q, n_seen = query.shape[-2], key.shape[-2]
    scores = mask.logits(at_least_float32((query * scale) @ key.transpose(-2, -1)))  # (b, h, n_q, n_seen)
    allowed = mask.dense_keep(n_q, n_seen, query.device)
    if allowed is None:
        usable = torch.full((1, 1, 1, 1), n_seen, device=query.device)
    else:
        lowest = torch.finfo(scores.dtype).min
        scores = scores.clamp(min=lowest / 2).masked_fill(~allowed, lowest)  # every open pair above the closed
        usable = allowed.sum(dim=-1, keepdim=True)  # (b | 1, h | 1, n_q | 1, 1)
    best, index = scores.topk(min(resolve_count(keep, n_k), n_seen), dim=-1)
    count = torch.minimum(keys_per_query(keep, usable), usable)
    is_open = torch.arange(best.shape[-1], device=query.device) < count  # (b | 1, h | 1, n_q | 1, k)
    return best, index.int(), is_open.expand(index.shape)


@torch.no_grad()
def scores_at(query: Tensor, key: Tensor, mask: AttentionMask, scale: float, index: Tensor) -> Tensor:
    """Exact scores (b, h, n_q, k) of chosen keys (b, h, n_q, k), read from the scores of all keys.

    One dense product is faster than gathering k keys per query unless k is a very small fraction of them.
    """
    index = index.long()
    query = query * scale  # first: in 16 bits a product may overflow where its score does not
    scores = mask.capped(at_least_float32((query @ key.transpose(-2, -1)).gather(-1, index)))  # (b, h, n_q, k)
    return scores if mask.bias is None else scores + bias_at(mask, index, key.shape[-2])


def bias_at(mask: AttentionMask, index: Tensor, n_k: int) -> Tensor:
    """The finite bias (b, h, n_q, k) of chosen keys, of n_k."""
    bias = mask.finite_bias()
    assert bias is not None
    return bias.expand(*index.shape[:3], n_k).gather(-1, index.long())


@torch.no_grad()
def slope_at(scores: Tensor, mask: AttentionMask, softcap: float, index: Tensor, n_k: int) -> Tensor:
    """Derivative of the scores (b, h, n_q, k) of chosen keys by what the cap has made them of."""
    capped = scores if mask.bias is None else scores - bias_at(mask, index, n_k)
    return 1.0 - (capped / softcap).clamp(-1.0, 1.0).square()  # closed pairs may hold any number


def scatter_rows(values: Tensor, index: Tensor, n_k: int) -> Tensor:
    """(b, h, n_q, k) values at the keys `index` -> dense (b, h, n_q, n_k), zeros elsewhere."""
    return values.new_zeros(*values.shape[:-1], n_k).scatter(-1, index.long(), values)


class _SparseAttention(torch.autograd.Function):
    """Softmax over the scores of chosen keys, saving O(n·k) numbers for the backward pass.

    Takes the scores as computed, and gives the gradients of query, key, bias and sinks that they would have. The k
    weights of a query are scattered into a dense row of the chunk: one dense product with V is faster than
    gathering k rows of V per query unless k is a very small fraction of n.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        sinks: Tensor | None,
        scores: Tensor,
        slope: Tensor | None,
        index: Tensor,
        is_open: Tensor,
        drop: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Output (b, h, n_q, d_v) and the applied weights (b, h, n_q, k); `slope` is of scores by scaled products."""
        weights = masked_softmax(scores, is_open, sinks)
        applied = weights if drop is None else weights * drop
        ctx.save_for_backward(query, key, value, bias, sinks, weights, slope, index, drop)
        ctx.scale = scale
        return scatter_rows(applied.to(value.dtype), index, key.shape[-2]) @ value, applied.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, grad_applied: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, sinks, weights, slope, index, drop = ctx.saved_tensors
        n_k, kind = key.shape[-2], value.dtype
        applied = weights if drop is None else weights * drop
        grad_value = scatter_rows(applied.to(kind), index, n_k).transpose(-2, -1) @ grad_output
        products = grad_output @ value.transpose(-2, -1)  # (b, h, n_q, n_k)
        grad_weights = at_least_float32(products.gather(-1, index.long())) + grad_applied  # (b, h, n_q, k)
        if drop is not None:
            grad_weights = grad_weights * drop
        mean = (grad_weights * weights).sum(dim=-1, keepdim=True)  # (b, h, n_q, 1)
        grad_scores = weights * (grad_weights - mean)
        grad_bias = grad_sinks = None
        if ctx.needs_input_grad[3]:
            grad_bias = scatter_rows(grad_scores, index, n_k).sum_to_size(bias.shape).to(bias.dtype)
        if ctx.needs_input_grad[4]:
            of_sinks = 1.0 - weights.sum(dim=-1, keepdim=True)
            grad_sinks = -(of_sinks * mean).sum(dim=(0, 2, 3)).to(sinks.dtype)
        grad_products = grad_scores if slope is None else grad_scores * slope
        dense = (scatter_rows(grad_products, index, n_k) * ctx.scale).to(query.dtype)  # (b, h, n_q, n_k)
        grads = (dense @ key, dense.transpose(-2, -1) @ query, grad_value, grad_bias, grad_sinks)
        return *grads, *(None for _ in range(6))
