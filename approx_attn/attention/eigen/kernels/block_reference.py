"""Block-wise attention written densely, without chunks: the definition that the fast kernels are held against."""

from __future__ import annotations

import torch
from torch import Tensor

from approx_attn.attention.eigen.kernels.block_inputs import SPREAD_LIMIT, BlockInputs, Causality


def block_weights(inputs: BlockInputs, deviations: Tensor, causality: Causality) -> Tensor:
    """The weight that every query puts on every key; `weights @ values` is the output of `block_attention`.

    A far block B with mean key k̄ spreads its weight W = N·exp(q·k̄ + g) over its keys as W/N·(1 + a·(z_j − z̄)), which
    may be negative. Holds (R, n_q, n_k) numbers; differentiable; any float type.

    Args:
        inputs: see `BlockInputs`.
        deviations: (R, K, b_k, r), key coordinates about the mean of their block, zero for padding.
        causality: whether and how queries stand among the keys.

    Returns:
        (R, Q·b_q, K·b_k). The row of a query without any open key holds finite numbers of no meaning.
    """
    rows, query_blocks, b_q, _ = inputs.query.shape
    _, key_blocks, b_k, _ = inputs.key.shape
    groups = rows // inputs.key.shape[0]
    key, centre = inputs.key.repeat_interleave(groups, 0), inputs.centre.repeat_interleave(groups, 0)
    query = inputs.query.flatten(1, 2)  # (R, n_q, d)
    lowest = torch.finfo(query.dtype).min

    open_keys = torch.ones(1, key_blocks, b_k, dtype=torch.bool, device=query.device)
    if inputs.key_open is not None:
        open_keys = inputs.key_open.repeat_interleave(groups, 0)
    exact_blocks = torch.zeros(rows, query_blocks, key_blocks, dtype=torch.bool, device=query.device)
    slots = torch.ones_like(inputs.chosen, dtype=torch.bool) if inputs.slot_open is None else inputs.slot_open
    exact_blocks.scatter_(-1, inputs.chosen, slots)
    exact = exact_blocks.repeat_interleave(b_q, 1)[..., None] & open_keys[:, None]  # (R, n_q, K, b_k)
    exact = exact.flatten(2)
    if causality.active:
        positions = torch.arange(query_blocks * b_q, device=query.device) + causality.offset
        exact = exact & (torch.arange(key_blocks * b_k, device=query.device) <= positions[:, None])
    scores = (query @ key.flatten(1, 2).mT).masked_fill(~exact, lowest)  # (R, n_q, n_k)

    tilt = inputs.tilt.flatten(1, 2)[..., 1:]  # (R, n_q, r)
    far = inputs.far_open.repeat_interleave(b_q, 1)  # (R, n_q, K)
    far_scores = query @ centre.mT
    if inputs.spread.shape[-1] > 0:
        products = (tilt[..., :, None] * tilt[..., None, :]).flatten(-2)  # (R, n_q, r²)
        far_scores = far_scores + (products @ inputs.spread.mT).clamp(max=SPREAD_LIMIT)
    block_scores = (far_scores + inputs.log_count[:, None]).masked_fill(~far, lowest)  # (R, n_q, K)

    normaliser = torch.cat([scores, block_scores], dim=-1).logsumexp(-1, keepdim=True)
    block_share = (block_scores - normaliser).exp() / inputs.log_count.exp().clamp_min(1.0)[:, None]
    ramp = torch.ones_like(scores)
    if tilt.shape[-1] > 0:
        ramp = ramp + tilt @ deviations.flatten(1, 2).mT  # (R, n_q, n_k), 1 + a·(z_j − z̄)
    spread_out = (block_share[..., None] * open_keys[:, None]).flatten(2) * ramp
    return (scores - normaliser).exp() + spread_out
