"""MRA-2 from its formula: a dense matrix of weights, filled block by block."""

import math

import torch

CASES = {
    "default": {"block_size": 4},
    "wide blocks": {"keep": 0.5},
    "count": {"keep": 5, "block_size": 3},
    "drop": {"block_size": 4, "rest": "drop", "keep": 0.6},
}
POOLS_QUERIES = True
BFLOAT16_TOLERANCE = 0.3  # nearly equal blocks change places


def blocks(kept, size):
    """Positions that are kept, by block."""
    n = len(kept)
    return [[i for i in range(start, min(start + size, n)) if kept[i]] for start in range(0, n, size)]


def naive(mechanism, query, key, value, mask, scale):
    n_q, n_k = query.shape[-2], key.shape[-2]
    output = torch.zeros(*query.shape[:-1], value.shape[-1], dtype=query.dtype)
    for b, h in torch.cartesian_prod(*map(torch.arange, query.shape[:2])).tolist():
        q, k, v = query[b, h], key[b, h], value[b, h]
        q_blocks = blocks([True] * n_q if mask.query_keep is None else mask.query_keep[b], mechanism.block_size)
        k_blocks = blocks([True] * n_k if mask.key_keep is None else mask.key_keep[b], mechanism.block_size)
        q_blocks, k_blocks = [x for x in q_blocks if x], [x for x in k_blocks if x]
        pairs = [(i, j) for i in q_blocks for j in k_blocks]
        score = [(scale * q[i].mean(0) @ k[j].mean(0)).item() for i, j in pairs]
        if isinstance(mechanism.keep, int):
            per_query = math.ceil(mechanism.keep / mechanism.block_size)
            budget = len(q_blocks) * min(per_query, len(k_blocks))
        else:
            budget = max(1, round(mechanism.keep * len(pairs)))
        chosen = sorted(range(len(pairs)), key=lambda x: -score[x])[:budget]
        weights = torch.zeros(n_q, n_k, dtype=query.dtype)
        for index, (i, j) in enumerate(pairs):
            rows, columns = torch.tensor(i)[:, None], torch.tensor(j)[None, :]
            if index in chosen:
                weights[rows, columns] = torch.exp(scale * q[i] @ k[j].T)
            elif mechanism.rest == "coarse":
                weights[rows, columns] = torch.exp(torch.tensor(score[index], dtype=query.dtype))
        output[b, h] = (weights / weights.sum(-1, keepdim=True)).nan_to_num(0.0) @ v
    return output
