"""MoBA, query by query: its own block and those of the best mean key, then exact attention over their keys."""

import math

import torch

CASES = {
    "default": {"block_size": 4},
    "count": {"keep": 9, "block_size": 3},
    "wide": {"keep": 0.7, "block_size": 2},
}
BFLOAT16_TOLERANCE = 0.3  # nearly equal blocks change places


def naive(mechanism, query, key, value, mask, scale):
    n_k, size = key.shape[-2], mechanism.block_size
    output = torch.zeros(*query.shape[:-1], value.shape[-1], dtype=query.dtype)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, query.shape[:3])).tolist():
        position = i + mask.query_offset
        kept = range(n_k) if mask.key_keep is None else mask.key_keep[b].nonzero()[:, 0].tolist()
        blocks = {}  # of kept keys
        for j in kept:
            blocks.setdefault(j // size, []).append(j)
        if mask.causal:
            blocks = {number: keys for number, keys in blocks.items() if number * size <= position}
        gate = {number: (query[b, h, i] @ key[b, h, keys].mean(0)).item() for number, keys in blocks.items()}
        if position // size in gate:
            gate[position // size] = math.inf
        keep = mechanism.keep
        count = math.ceil(keep / size) if isinstance(keep, int) else math.ceil(keep * len(blocks))
        chosen = sorted(gate, key=lambda number: -gate[number])[:count]
        keys = [j for number in chosen for j in blocks[number] if not mask.causal or j <= position]
        if keys:
            output[b, h, i] = torch.softmax(scale * key[b, h, keys] @ query[b, h, i], dim=0) @ value[b, h, keys]
    return output
