"""Linear attention, and the products of feature maps that it shares with other kernel methods.

Where the weight of a pair is a product of features, w_ij = Σ_f φ_f(q_i)·φ_f(k_j), sums over keys can be taken
once for all queries, and nothing of size n_q × n_k is ever held.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from approx_attn.attention.base import AttentionMechanism, Capabilities, Cost, Request, apply_dropout
from approx_attn.attention.mask import AttentionMask, at_least_float32, causal_keep, masked_softmax
from approx_attn.attention.registry import register_attention

CHUNK_SIZE = 128
"""Queries processed at once under a causal mask. With m features, one running sum of m·(d_v + 1) numbers is
held per chunk, so a chunk of at least m queries keeps all of them together below the size of the values."""


@register_attention("linear")
class LinearAttention(AttentionMechanism):
    """Attention with weights φ(q)·φ(k), φ(x) = elu(x) + 1, normalised over the keys.

    Source: Katharopoulos et al., *Transformers are RNNs*, arXiv 2006.16236. The scale of the scores has no
    part in it: a factor on the products φ(q)·φ(k) cancels in the normalisation. It is no approximation of
    softmax attention and has no setting at which it equals it. Dropout drops a key for all queries of a
    head at once, since single weights do not exist.
    """

    capabilities = Capabilities(arbitrary_mask=False)
    cost_formula = "n·d²"

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> tuple[Tensor, Tensor | None]:
        log_query, log_key = log_elu_plus_one(query), log_elu_plus_one(key)  # (b, h, n, d)
        return feature_attention(log_query, log_key, value, request)

    def cost(self, query_length: int, key_length: int | None = None, *, causal: bool | None = None) -> Cost:
        n_q, n_k, pairs, causal = self._pairs(query_length, key_length, causal)
        return feature_cost(self.num_heads, n_q, n_k, pairs, self.head_dim, self.value_dim, causal)


def log_elu_plus_one(x: Tensor) -> Tensor:
    """log(elu(x) + 1): x below zero, log(1 + x) above, in at least float32."""
    x = at_least_float32(x)
    return torch.log1p(F.relu(x)) + x.clamp(max=0.0)


# -- attention by features, for every mechanism that has them ------------------------------------------


def feature_attention(
    log_query: Tensor, log_key: Tensor, value: Tensor, request: Request
) -> tuple[Tensor, Tensor | None]:
    """Attention with weights w_ij ∝ Σ_f exp(a_if + b_jf), from the logarithms of the features.

    The logarithms allow exact stabilisation per sample and head: each feature is divided by its maximum
    over the keys, which the query side takes back, and each query by its own maximum. Both cancel, so no
    epsilon biases the weights and no sample depends on its neighbours. Under a causal mask the maxima are
    over the keys before, so that no query depends on a later key even in rounding.

    Args:
        log_query: a, (b, h, n_q, m), float32 or float64.
        log_key: b, (b, h, n_k, m).
        value: (b, h, n_k, d_v); zero where padded.
        request: its mask holds padding and causality only, its scale has no part; dropout drops a key for all queries
            of a head at once.

    Returns:
        output (b, h, n_q, d_v) and weights or None; zeros for a query without keys.
    """
    mask, _, dropout_p, need_weights = request
    with torch.autocast(value.device.type, enabled=False):  # sums of many small weights need float32
        value = value.to(log_query.dtype)
        kept_keys = apply_dropout(torch.ones_like(value[..., :1]), dropout_p)  # (b, h, n_k, 1)
        if need_weights:
            weights = feature_weights(log_query, log_key, mask) * kept_keys.transpose(-2, -1)
            return weights @ value, weights
        ones = torch.ones_like(value[..., :1])
        extended = torch.cat((value * kept_keys, ones), dim=-1)  # (b, h, n_k, d_v + 1): numerator | denominator
        sums = _causal_sums if mask.causal else _all_sums
        totals = sums(log_query, log_key, extended, mask)  # (b, h, n_q, d_v + 1)
        return divide_or_zero(totals[..., :-1], totals[..., -1:]), None


def feature_weights(log_query: Tensor, log_key: Tensor, mask: AttentionMask) -> Tensor:
    """The normalised weights of `feature_attention` as one (b, h, n_q, n_k) array, for looking at them."""
    keep = mask.dense_keep(log_query.shape[-2], log_key.shape[-2], log_query.device)
    return masked_softmax(log_products(log_query, log_key), keep)


def divide_or_zero(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator for a denominator ≥ 0; zero with zero gradient where it is zero."""
    empty = denominator <= 0
    return (numerator / denominator.masked_fill(empty, 1.0)).masked_fill(empty, 0.0)


def feature_cost(heads: int, n_q: int, n_k: int, pairs: int, features: int, value_dim: int, causal: bool) -> Cost:
    """Cost of `feature_attention`, features given: sums over keys, products with them, and chunks if causal."""
    columns = value_dim + 1
    within = min(n_q, n_k) * min(CHUNK_SIZE, n_q, n_k) if causal else 0  # pairs inside chunks
    chunks = -(-n_q // CHUNK_SIZE) if causal else 1
    return Cost(
        exact_pairs=0,
        total_pairs=heads * pairs,
        score_multiply_adds=heads * within * features,
        value_multiply_adds=heads * ((n_q + n_k) * features + within) * columns,
        state=heads * ((n_q + n_k) * features + chunks * features * columns + within),
    )


def _lowest(log_features: Tensor) -> float:
    """Marks what is closed. Finite, and far enough from the end of the range that sums with it stay finite."""
    return torch.finfo(log_features.dtype).min / 4


def _closed_keys(log_key: Tensor, key_keep: Tensor | None) -> Tensor:
    return log_key if key_keep is None else log_key.masked_fill(~key_keep[:, None, :, None], _lowest(log_key))


def _all_sums(log_query: Tensor, log_key: Tensor, value: Tensor, mask: AttentionMask) -> Tensor:
    """Σ_j w_ij·value_j over all keys, each row up to its own positive factor."""
    top, state = _add_keys(*_no_keys(log_key, value), _closed_keys(log_key, mask.key_keep), value)
    logs = log_query + top  # (b, h, n_q, m)
    return (logs - _maximum(logs, -1)).exp() @ state


def _causal_sums(log_query: Tensor, log_key: Tensor, value: Tensor, mask: AttentionMask) -> Tensor:
    """Σ_j w_ij·value_j over j ≤ i + query_offset, each row up to its own positive factor.

    Chunk by chunk: keys before the chunk come as one state of sums, keys inside it pair by pair.
    """
    log_key = _closed_keys(log_key, mask.key_keep)
    n_q, n_k = log_query.shape[-2], log_key.shape[-2]
    blind = min(max(-mask.query_offset, 0), n_q)  # leading queries that see no key
    shared = min(max(mask.query_offset, 0), n_k)  # leading keys that every query sees
    top, state = _add_keys(*_no_keys(log_key, value), log_key[..., :shared, :], value[..., :shared, :])
    nothing = value[..., :1, :].expand(-1, -1, blind, -1)
    outputs = [nothing.masked_fill(torch.ones_like(nothing, dtype=torch.bool), 0.0)]  # zeros, and part of the graph
    # From here on query `blind + i` sees key `shared + i` as its last one.
    for start in range(0, n_q - blind, CHUNK_SIZE):
        queries = log_query[..., blind + start : min(blind + start + CHUNK_SIZE, n_q), :]  # (b, h, c, m)
        inside = slice(min(shared + start, n_k), min(shared + start + queries.shape[-2], n_k))
        keys, values = log_key[..., inside, :], value[..., inside, :]
        outputs.append(_state_and_chunk(queries, top, state, keys, values))
        top, state = _add_keys(top, state, keys, values)
    return torch.cat(outputs, dim=-2)


def _state_and_chunk(log_query: Tensor, top: Tensor, state: Tensor, log_key: Tensor, value: Tensor) -> Tensor:
    """The sums of one chunk: over all keys in `state`, and over the chunk's own keys j ≤ i."""
    far = log_query + top  # (b, h, c, m)
    near = log_products(log_query, log_key)  # (b, h, c, c)
    closed = (near <= _lowest(near) / 2) | ~causal_keep(near.shape[-2], near.shape[-1], 0, near.device)
    near = near.masked_fill(closed, _lowest(near))
    row_top = _maximum(torch.cat((far, near), dim=-1).detach(), -1)  # over what the row may see, so nothing leaks
    return (far - row_top).exp() @ state + (near - row_top).exp().masked_fill(closed, 0.0) @ value


def _no_keys(log_key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum (b, h, 1, m) and sums (b, h, m, d_v + 1) over no keys."""
    top = log_key.new_full((*log_key.shape[:-2], 1, log_key.shape[-1]), _lowest(log_key))
    return top, value.new_zeros((*log_key.shape[:-2], log_key.shape[-1], value.shape[-1]))


def _add_keys(top: Tensor, state: Tensor, log_key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The running maximum over keys, and the sums Σ_j φ_f(k_j)·value_j divided by it, with more keys in them."""
    if log_key.shape[-2] == 0:
        return top, state
    new_top = torch.maximum(top, _maximum(log_key, -2))  # (b, h, 1, m)
    phi = (log_key - new_top).exp().masked_fill(log_key <= _lowest(log_key), 0.0)  # (b, h, n, m), at most 1
    rescale = (top - new_top).exp().transpose(-2, -1)  # (b, h, m, 1)
    return new_top, state * rescale + phi.transpose(-2, -1) @ value


def log_products(log_query: Tensor, log_key: Tensor) -> Tensor:
    """log Σ_f exp(a_if + b_jf) for (..., n_q, m) and (..., n_k, m): (..., n_q, n_k).

    Each side is divided by its own largest feature meanwhile.

    Where the products of a pair underflow nevertheless, the pair keeps a small weight in place of none, so
    that a query whose pairs all do so still has weights, and finite gradients.
    """
    top_query, top_key = _maximum(log_query, -1), _maximum(log_key, -1)  # (..., n, 1)
    products = (log_query - top_query).exp() @ (log_key - top_key).exp().transpose(-2, -1)
    floor = torch.finfo(products.dtype).tiny * 1e8
    return (products + floor).log() + top_query + top_key.transpose(-2, -1)


def _maximum(x: Tensor, dim: int) -> Tensor:
    """A stabiliser: it cancels, so it is no part of the derivative."""
    return x.detach().amax(dim=dim, keepdim=True)
