"""Differentiable mask in evaluation: exact attention over the pairs whose gate is open."""

import torch

CASES = {
    "default": {},
    "absolute": {"alignment": "absolute", "penalty": 0.1},
    "sparse": {"initial_open": 0.1, "closed_offsets": [0, 2], "lr_multiplier": 10.0},
}


def prepare(mechanism):
    values = mechanism.gates.values
    torch.nn.init.normal_(values, mean=0.5 if values.mean() > 0 else -1.5)


def naive(mechanism, query, key, value, mask, scale):
    n_q, n_k, last = query.shape[-2], key.shape[-2], mechanism.max_length - 1
    is_open = torch.empty(query.shape[1], n_q, n_k, dtype=torch.bool)
    for i in range(n_q):
        for j in range(n_k):
            position = i + mask.query_offset
            if mechanism.gates.alignment == "absolute":
                is_open[:, i, j] = mechanism.gates.values[:, min(max(position, 0), last), min(j, last)] > 0
            else:
                is_open[:, i, j] = mechanism.gates.values[:, min(max(j - position, -last), last) + last] > 0
            if j - position in mechanism.closed_offsets:
                is_open[:, i, j] = False
    scores = scale * query @ key.transpose(-2, -1)
    if mask.bias is not None:
        scores = scores + mask.finite_bias()
    keep = mask.dense_keep(n_q, n_k, query.device)
    keep = is_open if keep is None else keep & is_open
    return torch.softmax(scores.masked_fill(~keep, float("-inf")), dim=-1).nan_to_num(0.0) @ value
