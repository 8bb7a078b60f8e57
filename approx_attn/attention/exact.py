"""Exact softmax attention: the reference for accuracy and, through PyTorch's fused kernels, for speed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from approx_attn.attention.base import AttentionMechanism, Capabilities, Cost, Request, apply_dropout, repeat_heads
from approx_attn.attention.mask import AttentionMask, at_least_float32, masked_softmax
from approx_attn.attention.registry import register_attention

LEAST_CHUNK, MOST_CHUNK = 128, 1024  # queries at once in a window: small products are slow, large masks take memory


@register_attention("exact")
class ExactAttention(AttentionMechanism):
    """softmax(s·Q·Kᵀ + mask)·V through `torch.nn.functional.scaled_dot_product_attention`.

    With a window w in the mask it takes chunks of queries over the keys in their windows, n·w pairs in all. Soft-capped
    scores and sinks, which no kernel of PyTorch knows, are computed by its plain operators, in chunks of queries, too.
    """

    capabilities = Capabilities(grouped_query=True, window=True, softcap=True, sinks=True)
    cost_formula = "n²·d"

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> tuple[Tensor, Tensor | None]:
        return exact_attention(query, key, value, request)

    def cost(self, query_length: int, key_length: int | None = None, *, causal: bool | None = None) -> Cost:
        _, _, pairs, _ = self._pairs(query_length, key_length, causal)
        return Cost(
            exact_pairs=self.num_heads * pairs,
            total_pairs=self.num_heads * pairs,
            score_multiply_adds=self.num_heads * pairs * self.head_dim,
            value_multiply_adds=self.num_heads * pairs * self.value_dim,
            state=0,
        )


def exact_attention(query: Tensor, key: Tensor, value: Tensor, request: Request) -> tuple[Tensor, Tensor | None]:
    """What `ExactAttention` computes; arguments and results are those of `AttentionMechanism.attend`."""
    mask, scale, dropout_p, need_weights = request
    if need_weights:
        return exact_attention_with_weights(query, key, value, mask, scale, dropout_p)
    if mask.softcap is not None or mask.sinks is not None:
        return attention_in_chunks(unfused_attention, query, key, value, mask, scale, dropout_p), None
    if mask.window is not None:
        return attention_in_chunks(fused_attention, query, key, value, mask, scale, dropout_p), None
    return fused_attention(query, key, value, mask, scale, dropout_p), None


@contextmanager
def computing_exactly(mechanisms: Iterable[AttentionMechanism]) -> Iterator[None]:
    """Let mechanisms compute exact attention meanwhile, so that later layers see what they would in an exact model."""
    mechanisms = list(mechanisms)
    for mechanism in mechanisms:
        mechanism.substitute = exact_attention
    try:
        yield
    finally:
        for mechanism in mechanisms:
            mechanism.substitute = None


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float, dropout_p: float
) -> Tensor:
    """Exact attention by PyTorch's kernels, over all keys at once; key and value may have fewer heads."""
    n_q, n_k = query.shape[-2], key.shape[-2]
    upper_left = mask.causal and mask.query_offset == 0 and mask.window is None
    only_causal = upper_left and mask.is_structured and mask.key_keep is None
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if only_causal else mask.additive(n_q, n_k, query.dtype, query.device),
        dropout_p=dropout_p,
        is_causal=only_causal,
        scale=scale,
        enable_gqa=key.shape[1] != query.shape[1],
    )


def unfused_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float, dropout_p: float
) -> Tensor:
    """The output of `exact_attention_with_weights`."""
    return exact_attention_with_weights(query, key, value, mask, scale, dropout_p)[0]


def attention_in_chunks(
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """`attend`, one of the two above, on chunks of queries, each over the keys that the mask leaves any of them."""
    n_q, n_k = query.shape[-2], key.shape[-2]
    window = n_q + n_k + abs(mask.query_offset) if mask.window is None else mask.window
    size = min(max(window, LEAST_CHUNK), MOST_CHUNK)
    outputs = []
    for start in range(0, n_q, size):
        stop = min(start + size, n_q)
        first, last = start + mask.query_offset, stop - 1 + mask.query_offset  # positions of its queries
        begin = max(0, min(first - window + 1, n_k - 1))
        end = max(begin + 1, min(last + 1 if mask.causal else last + window, n_k))
        part = mask.queries(start, stop).keys(begin, end)
        inputs = (query[:, :, start:stop], key[:, :, begin:end], value[:, :, begin:end])
        outputs.append(attend(*inputs, part, scale, dropout_p))
    return torch.cat(outputs, dim=-2)


def exact_attention_with_weights(
    query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """Exact attention that holds its (b, h, n_q, n_k) weights; for callers who want to see them."""
    key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    scores = mask.logits(at_least_float32((query * scale) @ key.transpose(-2, -1)))  # (b, h, n_q, n_k)
    weights = masked_softmax(scores, mask.dense_keep(query.shape[-2], key.shape[-2], query.device), mask.sinks)
    weights = apply_dropout(weights, dropout_p).to(value.dtype)
    return torch.matmul(weights, value), weights
