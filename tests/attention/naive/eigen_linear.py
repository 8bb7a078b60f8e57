"""eigen_linear, one query at a time: weights R·exp(P_i), normalised."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from approx_attn.attention import AttentionMask, AttentionMechanism

CASES = {
    "six": {"num_keys": 6},
    "random, shared": {"num_keys": 0.3, "selection": "random", "share": "layer", "seed": 2},
    "all": {},
    "interpolated": {"num_keys": 5, "lengths": "interpolate"},
}


def prepare(mechanism: AttentionMechanism) -> None:
    with torch.no_grad():
        mechanism.log_reconstruction.add_(torch.randn_like(mechanism.log_reconstruction))


def naive(
    mechanism: AttentionMechanism, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float
) -> Tensor:
    return reconstruct(mechanism, query, key, value, mask, scale)[0]


def reconstruct(
    mechanism: AttentionMechanism, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float
) -> tuple[Tensor, Tensor]:
    """Output (b, h, n_q, d_v) and normalised weights (b, h, n_q, n_k)."""
    n_q, n_k = query.shape[2], key.shape[2]
    output = torch.zeros(*query.shape[:3], value.shape[-1], dtype=query.dtype)
    weights = torch.zeros(*query.shape[:3], n_k, dtype=query.dtype)
    period = mechanism.max_length if mechanism.lengths == "truncate" else n_k
    observed = mechanism.reconstruction(n_k)[1]
    for b, h in itertools.product(range(query.shape[0]), range(query.shape[1])):
        keep = [j for j in range(n_k) if mask.key_keep is None or bool(mask.key_keep[b, j])]
        for i in range(n_q):
            row = torch.zeros(n_k, dtype=query.dtype)
            for j in keep:
                start = j - j % period
                usable = [k for k, p in enumerate(observed) if start + p in keep]
                scores = [scale * query[b, h, i] @ key[b, h, start + observed[k]] for k in usable]
                if j - start in observed:
                    row[j] = scores[usable.index(observed.index(j - start))].exp()
                    continue
                r = row_of_reconstruction(mechanism, h, j - start, period, len(observed))
                if not usable:
                    row[j] = r.sum()
                    continue
                lean = sum(r[k] * score.exp() for k, score in zip(usable, scores, strict=True))
                row[j] = lean * r.sum() / r[usable].sum()
            if keep:
                weights[b, h, i] = row / row.sum()
                output[b, h, i] = weights[b, h, i] @ value[b, h]
    return output, weights


def row_of_reconstruction(mechanism: AttentionMechanism, head: int, j: int, period: int, m: int) -> Tensor:
    """(m,) row j of R, of a table that is interpolated in its logarithm to another period."""
    table = mechanism.log_reconstruction[head if mechanism.log_reconstruction.shape[0] > 1 else 0]
    if period == table.shape[0]:
        return table[j].exp()
    place = j * (table.shape[0] - 1) / (period - 1) if period > 1 else 0.0
    left = min(int(place), table.shape[0] - 2)
    share = place - left
    return ((1 - share) * table[left] + share * table[left + 1])[:m].exp()
