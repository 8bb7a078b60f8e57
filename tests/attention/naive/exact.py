"""Exact attention, straight from its formula."""

from helpers import naive_cap, naive_softmax


def naive(mechanism, query, key, value, mask, scale):
    scores = naive_cap(scale * query @ key.transpose(-2, -1), mask)
    if mask.bias is not None:
        scores = scores + mask.finite_bias()
    keep = mask.dense_keep(query.shape[-2], key.shape[-2], query.device)
    if keep is not None:
        scores = scores.masked_fill(~keep, float("-inf"))
    return naive_softmax(scores, mask).nan_to_num(0.0) @ value
