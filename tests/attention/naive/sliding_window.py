"""Sliding-window attention from its definition: a dense mask of distances, then exact attention."""

import torch

from helpers import naive_cap, naive_softmax

CASES = {
    "default": {},
    "window": {"window": 3, "global_tokens": 2},
    "count": {"keep": 7},
    "sinks": {"keep": 5, "global_tokens": 4},
    "wide": {"keep": 0.6, "global_tokens": 1},
    "random": {"window": 1, "global_tokens": 1, "random_blocks": 2, "block_size": 3},
}


def reach(mechanism, usable, causal):
    """(before, after): the window of a query that has `usable` keys."""
    keep, window = mechanism.window.budget, mechanism.window.half_width
    if window is not None:
        before = after = window
    elif causal:
        before = (keep if isinstance(keep, int) else max(1, round(keep * usable))) - 1
    elif isinstance(keep, int):
        before = after = (keep - 1) // 2
    else:
        widths = range(max(usable, 1))
        fitting = [w for w in widths if usable * (2 * w + 1) - w * (w + 1) <= keep * usable**2]
        before = after = max(fitting, default=0)
    return before, 0 if causal else after


def pattern(mechanism, mask, batch, n_q, n_k):
    """(b, h | 1, n_q, n_k) bool: in the window, global or in a random block, whatever the mask says of the pair."""
    j = torch.arange(n_k)
    rows = []
    for b in range(batch):
        kept = torch.ones(n_k, dtype=torch.bool) if mask.key_keep is None else mask.key_keep[b]
        real = torch.ones(n_q, dtype=torch.bool) if mask.query_keep is None else mask.query_keep[b]
        is_global = kept & (kept.cumsum(0) <= mechanism.global_tokens)
        for i in range(n_q):
            position = i + mask.query_offset
            usable = int((kept & (j <= position)).sum() if mask.causal else kept.sum())
            before, after = reach(mechanism, usable, mask.causal)
            row = (j - position >= -before) & (j - position <= after) | is_global
            rank = int(real[:i].sum()) + mask.query_offset
            rows.append(row | (rank < mechanism.global_tokens and bool(real[i]) and not mask.causal))
    near = torch.stack(rows).view(batch, 1, n_q, n_k)
    if mechanism.random.count == 0:
        return near
    # Which blocks are drawn is tested by itself; here, that the drawn blocks are the ones that are seen.
    index, is_open = mechanism.random.choose(mechanism.num_heads, n_q, n_k, mask, near.device)
    seen = near.repeat(1, mechanism.num_heads, 1, 1)
    size = mechanism.random.block_size
    for b, h, i, r in torch.cartesian_prod(*map(torch.arange, (batch, seen.shape[1], n_q, index.shape[-1]))).tolist():
        sample = b % index.shape[0]
        row = (i + mask.query_offset) // size - mask.query_offset // size
        if is_open[sample, h, row, r]:
            start = int(index[sample, h, row, r]) * size
            seen[b, h, i, start : start + size] = True
    return seen


def naive(mechanism, query, key, value, mask, scale):
    scores = naive_cap(scale * query @ key.transpose(-2, -1), mask)
    if mask.bias is not None:
        scores = scores + mask.finite_bias()
    keep = pattern(mechanism, mask, scores.shape[0], *scores.shape[-2:])
    allowed = mask.dense_keep(*scores.shape[-2:], query.device)
    if allowed is not None:
        keep = keep & allowed
    return naive_softmax(scores.masked_fill(~keep, float("-inf")), mask).nan_to_num(0.0) @ value
