"""Top-k attention, row by row: sort the scores, keep the largest, softmax over them."""

import torch

from helpers import naive_cap, naive_softmax

CASES = {"default": {}, "count": {"keep": 3, "chunk_size": 5}}


def budget(keep, usable):
    """Keys that a row may keep."""
    return min(keep if isinstance(keep, int) else max(1, round(keep * usable)), usable)


def naive(mechanism, query, key, value, mask, scale):
    scores = naive_cap(scale * query @ key.transpose(-2, -1), mask)
    if mask.bias is not None:
        scores = scores + mask.finite_bias()
    keep = mask.dense_keep(*scores.shape[-2:], query.device)
    keep = torch.ones_like(scores, dtype=torch.bool) if keep is None else keep.expand_as(scores)
    output = torch.zeros(*query.shape[:-1], value.shape[-1], dtype=query.dtype)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, scores.shape[:3])).tolist():
        usable = keep[b, h, i].nonzero()[:, 0].tolist()
        best = sorted(usable, key=lambda j: -scores[b, h, i, j].item())[: budget(mechanism.keep, len(usable))]
        if best:
            output[b, h, i] = naive_softmax(scores[b, h, i, best], mask, h) @ value[b, h, best]
    return output
