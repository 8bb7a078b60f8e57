"""Translation of the mask conventions of other interfaces into `AttentionMask`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from approx_attn.attention import AttentionMask
from approx_attn.attention.mask import causal_keep


def mask_from_drop_masks(
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    *,
    batch: int,
    num_heads: int,
    lengths: tuple[int, int],
    is_causal: bool,
    is_self_attention: bool,
    extra_keys: int,
    device: torch.device,
) -> AttentionMask:
    """Translate the masks of `torch.nn.MultiheadAttention`, in which `True` or minus infinity masks out.

    Padding and causality come out as structure, never as a dense array, whichever way they were written.

    Args:
        key_padding_mask: (batch, n_k - extra_keys), bool or float (added).
        attn_mask: (n_q, n_k - extra_keys) or (batch * num_heads, ...), bool or float (added).
        batch, num_heads: sizes of the query.
        lengths: (n_q, n_k), n_k with the extra keys.
        is_causal: `attn_mask` is the causal mask; it is not read.
        is_self_attention: padded keys are padded queries too.
        extra_keys: keys appended behind the given ones (`add_bias_kv`, `add_zero_attn`), open to every query.
        device: where masks are made.

    Raises:
        ValueError: a mask of a wrong type or shape.
    """
    n_q, n_k = lengths
    given_keys = n_k - extra_keys
    key_keep, key_bias = None, None
    if key_padding_mask is not None:
        _check_mask("key_padding_mask", key_padding_mask, ((batch, given_keys),))
        key_keep, key_bias = _split_drop_mask(key_padding_mask)
    query_keep = key_keep if is_self_attention else None

    pair_keep, pair_bias = None, None
    if is_causal:
        # Every query may use the extra keys, so with them the pattern is no longer the causal one.
        pair_keep = causal_keep(n_q, given_keys, 0, device)[None, None] if extra_keys else None
    elif attn_mask is not None:
        _check_mask("attn_mask", attn_mask, ((n_q, given_keys), (batch * num_heads, n_q, given_keys)))
        heads_apart = attn_mask.dim() == 3
        attn_mask = attn_mask.view(batch if heads_apart else 1, num_heads if heads_apart else 1, n_q, given_keys)
        pair_keep, pair_bias = _split_drop_mask(attn_mask)

    if extra_keys:
        key_keep, pair_keep = (x if x is None else F.pad(x, (0, extra_keys), value=True) for x in (key_keep, pair_keep))
        key_bias, pair_bias = (x if x is None else F.pad(x, (0, extra_keys)) for x in (key_bias, pair_bias))
    if key_bias is not None:
        key_bias = key_bias[:, None, None, :]
        pair_bias = key_bias if pair_bias is None else pair_bias + key_bias

    structure = AttentionMask(causal=is_causal and not extra_keys)
    if pair_keep is not None:
        structure = structured(pair_keep, batch)
    if structure.key_keep is not None:
        key_keep = structure.key_keep if key_keep is None else key_keep & structure.key_keep
    if key_keep is not None and not is_self_attention and n_q == n_k:  # which could be taken for the same tokens
        query_keep = torch.ones(batch, n_q, dtype=torch.bool, device=device)
    return replace(structure, key_keep=key_keep, query_keep=query_keep, bias=pair_bias)


def structured(pair_keep: Tensor, batch: int) -> AttentionMask:
    """`AttentionMask.from_dense` with the key mask, if one is found, of the full batch size.

    Args:
        pair_keep: (batch | 1, heads | 1, n_q, n_k) bool, True = keep.
    """
    mask = AttentionMask.from_dense(pair_keep)
    if mask.key_keep is None:
        return mask
    return replace(mask, key_keep=mask.key_keep.expand(batch, -1))


def _split_drop_mask(mask: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(keep, bias) of a mask that is bool with True = masked out, or float and added to the scores."""
    return (~mask, None) if mask.dtype == torch.bool else split_additive_mask(mask)


def split_additive_mask(mask: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(keep, bias) of a float mask that is added to the scores; a part that says nothing is None.

    PyTorch's encoder and transformers' eager attention turn boolean masks into zeros and minus infinities (or
    lowest numbers) before anyone sees them, so a float mask without other numbers is read as the boolean mask
    that it was.
    """
    keep = mask > torch.finfo(mask.dtype).min
    finite = mask.masked_fill(~keep, 0.0)
    has_bias = mask.requires_grad or bool((finite != 0).any())
    return (None if bool(keep.all()) else keep), (finite if has_bias else None)


def _check_mask(name: str, mask: Tensor, shapes: tuple[tuple[int, ...], ...]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"{name} must be boolean (True = masked out) or float (added), got {mask.dtype}.")
    if tuple(mask.shape) not in shapes:
        raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}, got {tuple(mask.shape)}.")
