"""Masks of Hugging Face transformers, translated into `AttentionMask`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sliding_window_bidirectional_overlay,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from approx_attn.attention import AttentionMask
from approx_attn.attention.torch_masks import split_additive_mask, structured
from approx_attn.conversion.layers import AttentionLayer


def mask_function(dense_mask: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """A mask function of transformers that makes the mask of another one and keeps what it was made of.

    Where padding, causality and a sliding window say everything, the mask carries them as an `AttentionMask` in an
    attribute, so that no layer has to find them out again.
    """

    def attention_mask_with_structure(
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int = 0,
        kv_offset: int = 0,
        mask_function: Callable = causal_mask_function,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | None:
        dense = dense_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **kwargs,
        )
        if dense is None or torch.compiler.is_compiling():  # where an attribute would not reach the layers
            return dense
        known = _causality_and_window(mask_function)
        if known is None:
            return dense
        key_keep = None
        if attention_mask is not None:
            key_keep = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
            key_keep = nn.functional.pad(key_keep, (0, kv_length - key_keep.shape[1]))  # a static cache not yet filled
            key_keep = None if bool(key_keep.all()) else key_keep
        (causal, window), offset = known, int(q_offset) - kv_offset
        farthest = max(offset + q_length - 1, 0 if causal else kv_length - 1 - offset)  # of a query and a key
        if window is not None and window > farthest:  # which mechanisms without windows need not refuse
            window = None
        if not causal and window is None:
            offset = 0
        structure = AttentionMask(key_keep, causal=causal, query_offset=offset, window=window)
        dense.approx_attn_structure = (structure, _version(dense))  # type: ignore[attr-defined]
        return dense

    return attention_mask_with_structure


def _causality_and_window(mask_function: Callable) -> tuple[bool, int | None] | None:
    """(causal, `AttentionMask.window`) of a mask function of transformers; None where they do not say everything."""
    if mask_function in (causal_mask_function, bidirectional_mask_function):
        return mask_function is causal_mask_function, None
    if getattr(mask_function, "__code__", None) is not sliding_window_causal_mask_function(1).__code__:
        return None  # not two parts joined by `and_masks`
    parts = inspect.getclosurevars(mask_function).nonlocals["mask_functions"]
    if len(parts) != 2 or parts[1] not in (causal_mask_function, bidirectional_mask_function):
        return None
    overlay, causal = parts[0], parts[1] is causal_mask_function
    # One leaves the last w keys up to a query's own, the other keys at a distance of w on either side.
    for factory, exclusive in ((sliding_window_overlay, 0), (sliding_window_bidirectional_overlay, 1)):
        if getattr(overlay, "__code__", None) is factory(1).__code__ and causal != bool(exclusive):
            return causal, inspect.getclosurevars(overlay).nonlocals["sliding_window"] + exclusive
    return None


def mask_from_interface(
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    is_causal: bool | None,
    position_bias: Tensor | None,
    implementation: str,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, AttentionMask]:
    """Translate what an attention function of transformers is given.

    Args:
        name: qualified name of the attention module.
        module: the attention module.
        query, key, value: (b, h, n_q, d), (b, h_kv, n_k, d), (b, h_kv, n_k, d_v).
        attention_mask: None; (b, 1 | h, n_q, n_k) bool (True = keep) or float (added); (b, n_k) 0/1.
        is_causal: overrides `module.is_causal`; both count only where no mask is given.
        position_bias: broadcastable to (b, h, n_q, n_k), added to the scaled scores.
        implementation: name of the attention function; eager ones read no causal flag.
        softcap, sinks: as in `AttentionMask`.

    Returns:
        keys and values, without the empty end of a static cache where the mask says nothing of it, and the mask.

    Raises:
        ValueError: a mask of another kind.
    """
    n_q, n_k = query.shape[-2], key.shape[-2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and causal and not implementation.endswith("eager"):
        if 1 < n_q < n_k:  # the first pass over an empty static cache, whose later entries are not filled yet
            key, value, n_k = key[..., :n_q, :], value[..., :n_q, :], n_q
            position_bias = None if position_bias is None else position_bias[..., :n_q]
        # A single query in front of a cache is the last position, which sees every key.
        mask = AttentionMask(causal=True, query_offset=n_k - n_q)
    else:
        mask = _mask_from_tensor(attention_mask, key.shape[0], n_q, n_k, bool(causal))
        is_step = n_q == 1 and causal and not implementation.endswith("eager")
        if is_step and not AttentionLayer(name, module, "interface", None).is_cross:
            mask = _mask_of_a_step(mask, n_k)
    if position_bias is not None and (position_bias.requires_grad or bool(position_bias.any())):
        # T5's cross-attention carries a bias of zeros, which must not cost a mechanism its structured mask.
        mask = replace(mask, bias=position_bias if mask.bias is None else mask.bias + position_bias)
    is_self_attention = n_q <= n_k and not AttentionLayer(name, module, "interface", None).is_cross
    if mask.key_keep is not None and is_self_attention:
        placed = mask.causal or mask.window is not None
        mask = replace(mask, query_keep=_query_keep(mask, n_q) if placed else mask.key_keep[:, n_k - n_q :])
    elif mask.key_keep is not None and n_q == n_k:  # which could be taken for the same tokens
        mask = replace(mask, query_keep=torch.ones_like(mask.key_keep))
    if softcap is not None or sinks is not None:
        mask = replace(mask, softcap=softcap, sinks=None if sinks is None else sinks.flatten())
    return key, value, mask


def _mask_of_a_step(mask: AttentionMask, n_k: int) -> AttentionMask:
    """A mask of one query that has lost its structure: its own key is the last that any sample may use."""
    if mask.causal or mask.window is not None or not mask.is_structured:
        return mask
    if mask.key_keep is None:
        return replace(mask, causal=True, query_offset=n_k - 1)
    used = mask.key_keep.any(dim=0)
    if not bool(used.any()):
        return mask
    last = n_k - 1 - int(used.flip(0).byte().argmax())
    key_keep = None if bool(mask.key_keep[:, : last + 1].all()) else mask.key_keep
    return replace(mask, key_keep=key_keep, causal=True, query_offset=last)


def _query_keep(mask: AttentionMask, n_q: int) -> Tensor:
    assert mask.key_keep is not None
    return mask.key_keep[:, mask.query_offset : mask.query_offset + n_q]


def _mask_from_tensor(attention_mask: Any, batch: int, n_q: int, n_k: int, causal: bool) -> AttentionMask:
    if attention_mask is None:
        return AttentionMask()
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() not in (2, 4):
        kind = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(f"attention_mask must be None or a tensor with 2 or 4 axes, got {kind}.")
    structure, version = getattr(attention_mask, "approx_attn_structure", (None, None))
    if structure is not None and version == _version(attention_mask):  # not changed in place since
        return structure
    if attention_mask.dim() == 2:  # flash attention: padding only
        return AttentionMask(key_keep=attention_mask[:, -n_k:].bool(), causal=causal, query_offset=n_k - n_q)
    attention_mask = attention_mask[..., :n_k]
    if attention_mask.dtype == torch.bool:
        return structured(attention_mask.expand(-1, -1, n_q, n_k), batch)
    keep, bias = split_additive_mask(attention_mask)
    mask = AttentionMask() if keep is None else structured(keep.expand(-1, -1, n_q, n_k), batch)
    return mask if bias is None else replace(mask, bias=bias)


def _version(tensor: Tensor) -> int | None:
    """Count of in-place changes; None under inference mode, which does not count them."""
    return None if tensor.is_inference() else tensor._version
