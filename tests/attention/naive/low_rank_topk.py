"""Loki, row by row: rank the keys by their products in the principal dimensions, exact softmax over the best."""

import torch

from helpers import naive_cap, naive_softmax

CASES = {"default": {}, "small": {"rank": 2, "keep": 4, "chunk_size": 5}}
BFLOAT16_TOLERANCE = 0.3  # nearly equal estimates change places


def prepare(mechanism):
    """A covariance as training leaves it, in place of the starting one."""
    if mechanism.directions_from == "running":
        factor = torch.randn_like(mechanism.covariance)
        mechanism.covariance.copy_(factor @ factor.transpose(-2, -1))


def naive(mechanism, query, key, value, mask, scale):
    keep = mask.dense_keep(query.shape[-2], key.shape[-2], query.device)
    shape = (*query.shape[:-1], key.shape[-2])
    keep = torch.ones(shape, dtype=torch.bool) if keep is None else keep.expand(shape)
    bias = torch.zeros(shape).double() if mask.bias is None else mask.finite_bias().expand(shape)
    output = torch.zeros(*query.shape[:-1], value.shape[-1], dtype=query.dtype)
    for b, h in torch.cartesian_prod(*map(torch.arange, shape[:2])).tolist():
        covariance = mechanism.covariance[h]
        values, vectors = torch.linalg.eig(covariance)
        leading = vectors.real[:, values.real.argsort(descending=True)[: mechanism.rank]]  # (d, r)
        for i in range(shape[2]):
            q = query[b, h, i]
            usable = keep[b, h, i].nonzero()[:, 0]
            if len(usable) == 0:
                continue
            k = mechanism.keep if isinstance(mechanism.keep, int) else max(1, round(mechanism.keep * len(usable)))
            estimate = naive_cap(scale * (key[b, h, usable] @ leading) @ (leading.T @ q), mask)
            estimate = estimate + bias[b, h, i, usable]
            best = usable[estimate.argsort(descending=True)[:k]]
            scores = naive_cap(scale * key[b, h, best] @ q, mask) + bias[b, h, i, best]
            output[b, h, i] = naive_softmax(scores, mask, h) @ value[b, h, best]
    return output
