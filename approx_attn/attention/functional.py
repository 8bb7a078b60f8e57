"""`torch.nn.functional.scaled_dot_product_attention` with a choice of attention mechanism."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from approx_attn.attention import AttentionMask, AttentionMechanism, AttentionShape
from approx_attn.attention.exact import ExactAttention
from approx_attn.attention.registry import attention_class, build_attention, named_options
from approx_attn.attention.torch_masks import structured


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    attention: str | Mapping[str, Any] | AttentionMechanism = "exact",
) -> Tensor:
    """Attention with the signature of `torch.nn.functional.scaled_dot_product_attention` plus `attention=`.

    Args:
        query: (..., h, n_q, d); the axes before the last two may be any number, as in PyTorch.
        key: (..., h_kv, n_k, d).
        value: (..., h_kv, n_k, d_v).
        attn_mask: broadcastable to (..., h, n_q, n_k); bool (True = keep) or float (added).
        dropout_p: probability of dropping an attention weight; applied always, as in PyTorch.
        is_causal: upper-left aligned causal mask.
        scale: factor on query-key products; 1/sqrt(d) if None.
        enable_gqa: allow fewer key/value heads than query heads.
        attention: name of a mechanism without parameters, `{"name": ..., **options}`, or a built mechanism,
            which those with parameters need: this function would forget them between calls. A built
            mechanism drops attention weights only in training mode.

    Returns:
        (..., h, n_q, d_v). With `attention="exact"`, PyTorch's own result.

    Raises:
        ValueError: a mechanism with parameters given by name, shapes that do not fit, or a request beyond
            the capabilities of the mechanism. With exact, PyTorch's own errors.

    Example:
        >>> q = k = v = torch.randn(2, 4, 16, 8)
        >>> scaled_dot_product_attention(q, k, v, is_causal=True, attention={"name": "topk", "keep": 4}).shape
        torch.Size([2, 4, 16, 8])
    """
    if _is_exact(attention):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    _check_arguments(query, key, value, attn_mask, is_causal, enable_gqa)
    batch_axes = torch.broadcast_shapes(*(x.shape[:-3] for x in (query, key, value)))
    leading = (*batch_axes, *query.shape[-3:-2])  # 2 axes: one head, none in the result either
    q, k, v = (_four_axes(x, batch_axes) for x in (query, key, value))
    mechanism = attention if isinstance(attention, AttentionMechanism) else _build(attention, q, k, v)
    mask = attention_mask_of(attn_mask, batch_axes, q, k, is_causal)
    output, _ = mechanism(q, k, v, mask, scale=scale, dropout_p=dropout_p)  # (b, h, n_q, d_v)
    return output.reshape(*leading, *output.shape[-2:])


def _is_exact(attention: str | Mapping[str, Any] | AttentionMechanism) -> bool:
    if isinstance(attention, Mapping):
        return dict(attention) == {"name": "exact"}
    return attention == "exact" or isinstance(attention, ExactAttention)


def _build(attention: str | Mapping[str, Any], q: Tensor, k: Tensor, v: Tensor) -> AttentionMechanism:
    name, options = (attention, {}) if isinstance(attention, str) else named_options(attention)
    if attention_class(name).capabilities.has_parameters:
        raise ValueError(
            f"attention={name} has learned parameters, which a function cannot keep between calls: build it once "
            f"with build_attention({name!r}, num_heads={q.shape[1]}, head_dim={q.shape[-1]}, ...) and pass the module."
        )
    return build_attention(name, AttentionShape.of(q, k, v, max_length=max(q.shape[-2], k.shape[-2])), **options)


def _four_axes(x: Tensor, batch_axes: tuple[int, ...]) -> Tensor:
    """(..., h, n, d) -> (b, h, n, d); (n, d) has one head."""
    if x.dim() == 2:
        return x[None, None]
    return x.expand(*batch_axes, *x.shape[-3:]).reshape(-1, *x.shape[-3:])


def attention_mask_of(
    attn_mask: Tensor | None, batch_axes: tuple[int, ...], q: Tensor, k: Tensor, is_causal: bool
) -> AttentionMask:
    """Translate the masks of a call with queries (*batch_axes, h, n_q, d); `q` and `k` have four axes."""
    n_q, n_k = q.shape[-2], k.shape[-2]
    if attn_mask is None:
        return AttentionMask(causal=is_causal)
    while attn_mask.dim() < 4:
        attn_mask = attn_mask.unsqueeze(0)
    if len(batch_axes) > 1:
        attn_mask = attn_mask.expand(*batch_axes, *attn_mask.shape[-3:])
    attn_mask = attn_mask.reshape(-1, *attn_mask.shape[-3:])  # (b | 1, h | 1, n_q | 1, n_k | 1)
    if attn_mask.dtype == torch.bool:
        return structured(attn_mask.expand(-1, -1, n_q, n_k), q.shape[0])
    return AttentionMask(bias=attn_mask)


def _check_arguments(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, enable_gqa: bool
) -> None:
    if query.dim() < 2 or key.dim() != query.dim() or value.dim() != query.dim():
        raise ValueError(
            "query, key and value must have the same number of axes, at least 2, got "
            f"{query.dim()}, {key.dim()} and {value.dim()}."
        )
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask must be None where is_causal=True is given.")
    if attn_mask is not None and attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise ValueError(f"attn_mask must be boolean (True = keep) or float (added), got {attn_mask.dtype}.")
    if not enable_gqa and query.dim() > 2 and key.shape[-3] != query.shape[-3]:
        raise ValueError(
            "enable_gqa must be True where key heads are fewer than query heads, "
            f"got {key.shape[-3]} and {query.shape[-3]}."
        )
