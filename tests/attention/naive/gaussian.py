"""Gaussian attention: the density of the distance of every pair, normalised over the pairs that are kept.

Heads behind the Gaussian ones take the exponential of the score.
"""

import math

CASES = {
    "default": {},
    "grid": {"grid_width": 5, "sigma": [0.8, 3.0], "train_sigma": False},
    "one_head": {"gaussian_heads": 1},
}


def point(mechanism, position):
    return (position,) if mechanism.grid_width is None else divmod(position, mechanism.grid_width)


def naive(mechanism, query, key, value, mask, scale):
    n_q, n_k = query.shape[-2], key.shape[-2]
    weights = query.new_zeros(*query.shape[:-1], n_k)  # (b, h, n_q, n_k), not yet normalised
    for h, log_sigma in enumerate(mechanism.log_sigma.tolist()):
        for i in range(n_q):
            for j in range(n_k):
                distance = math.dist(point(mechanism, i + mask.query_offset), point(mechanism, j))
                weights[:, h, i, j] = math.exp(-(distance**2) / (2 * math.exp(log_sigma) ** 2))
    others = slice(mechanism.gaussian_heads, None)
    scores = scale * query[:, others] @ key[:, others].transpose(-2, -1)
    weights[:, others] = (scores - scores.amax(-1, keepdim=True)).exp()
    if mask.bias is not None:
        weights = weights * mask.finite_bias().exp()
    keep = mask.dense_keep(n_q, n_k, query.device)
    if keep is not None:
        weights = weights * keep
    return (weights / weights.sum(-1, keepdim=True)).nan_to_num(0.0) @ value
