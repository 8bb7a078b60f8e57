"""Scatterbrain as the paper writes it: features for all pairs, subtracted and replaced by exp on the sparse set."""

import torch

CASES = {"default": {}, "window": {"window": 2, "num_features": 5}, "count": {"keep": 4, "num_features": 12}}


def reach(window, usable, causal):
    """(before, after): the window of a query that has `usable` keys."""
    keep = window.budget
    if window.half_width is not None:
        half = window.half_width
    elif causal:
        half = (keep if isinstance(keep, int) else max(1, round(keep * usable))) - 1
    elif isinstance(keep, int):
        half = (keep - 1) // 2
    else:
        fitting = [w for w in range(max(usable, 1)) if usable * (2 * w + 1) - w * (w + 1) <= keep * usable**2]
        half = max(fitting, default=0)
    return half, 0 if causal else half


def sparse_set(window, mask, batch, n_q, n_k):
    """(b, 1, n_q, n_k) bool."""
    j = torch.arange(n_k)
    rows = []
    for b in range(batch):
        kept = torch.ones(n_k, dtype=torch.bool) if mask.key_keep is None else mask.key_keep[b]
        for position in range(mask.query_offset, n_q + mask.query_offset):
            before, after = reach(
                window, int((kept & (j <= position)).sum() if mask.causal else kept.sum()), mask.causal
            )
            rows.append((j - position >= -before) & (j - position <= after))
    return torch.stack(rows).view(batch, 1, n_q, n_k)


def naive(mechanism, query, key, value, mask, scale):
    def phi(x):
        x = x * scale**0.5
        features = [torch.exp(x @ w - x.square().sum(-1) / 2) for w in mechanism.projection]
        return torch.stack(features, dim=-1) / len(features) ** 0.5

    estimate = phi(query) @ phi(key).transpose(-2, -1)
    exact = torch.exp(scale * query @ key.transpose(-2, -1))
    weights = estimate + (exact - estimate) * sparse_set(mechanism.window, mask, *query.shape[:1], *estimate.shape[-2:])
    keep = mask.dense_keep(*estimate.shape[-2:], query.device)
    if keep is not None:
        weights = weights * keep
    return (weights / weights.sum(-1, keepdim=True)).nan_to_num(0.0) @ value
