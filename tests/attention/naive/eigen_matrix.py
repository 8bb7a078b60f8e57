"""eigen_matrix as one least-squares problem over the observed pairs, row offsets as free unknowns."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from approx_attn.attention import AttentionMask, AttentionMechanism
from helpers import naive_cap, naive_softmax

CASES = {
    "default": {},
    "random": {"selection": "random", "share": "head", "rank": 3, "seed": 3},
    "greedy": {"selection": "greedy", "keep": 0.1, "rank": 4, "factor_rank": 2},
}
POOLS_QUERIES = True  # a matrix is estimated from all queries that are given


def prepare(mechanism: AttentionMechanism) -> None:
    with torch.no_grad():
        for parameter in mechanism.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    mechanism.select_greedily()


def naive(
    mechanism: AttentionMechanism, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float
) -> Tensor:
    n_q, n_k = query.shape[2], key.shape[2]
    exact = scale * query @ key.transpose(-2, -1)
    keep = mask.dense_keep(n_q, n_k, query.device)
    keep = torch.ones(1, 1, 1, 1, dtype=torch.bool) if keep is None else keep
    keep = keep.expand(*query.shape[:2], n_q, n_k)
    usable = keep & mechanism.observed(n_q, n_k, mask.query_offset)
    if mask.query_keep is not None:
        usable = usable & mask.query_keep[:, None, :, None]
    output = torch.zeros(*query.shape[:3], value.shape[-1], dtype=query.dtype)
    for b, h in itertools.product(range(query.shape[0]), range(query.shape[1])):
        components, mean, precision = basis(mechanism, h, n_q, n_k, mask.query_offset)
        whole = None
        for i in range(n_q):
            kept = keep[b, h, i]
            if not kept.any():
                continue
            if mask.causal:
                past = usable[b, h] & (torch.arange(n_q)[:, None] <= i)
                estimate = posterior(exact[b, h], past, components, mean, precision)
            else:
                whole = posterior(exact[b, h], usable[b, h], components, mean, precision) if whole is None else whole
                estimate = whole
            observed = mechanism.observed(n_q, n_k, mask.query_offset)[i]
            row = torch.where(observed, exact[b, h, i], estimate[i])
            output[b, h, i] = naive_softmax(naive_cap(row[kept], mask), mask, h) @ value[b, h][kept]
    return output


def posterior(exact: Tensor, usable: Tensor, components: Tensor, mean: Tensor, precision: Tensor) -> Tensor:
    """(n_q, n_k): minimise ‖S − offset − M − Σ c E‖² over the usable pairs + cᵀ precision c."""
    rank, n_q, _ = components.shape
    rows = [i for i in range(n_q) if usable[i].any()]
    pairs = usable.nonzero().tolist()
    design = torch.zeros(len(pairs), rank + len(rows), dtype=exact.dtype)
    target = torch.zeros(len(pairs), dtype=exact.dtype)
    for at, (i, j) in enumerate(pairs):
        design[at, :rank] = components[:, i, j]
        design[at, rank + rows.index(i)] = 1.0
        target[at] = exact[i, j] - mean[i, j]
    normal = design.T @ design
    normal[:rank, :rank] += precision
    solution = torch.linalg.solve(normal, design.T @ target)
    estimate = mean + torch.einsum("r,rij->ij", solution[:rank], components)
    for at, i in enumerate(rows):
        estimate[i] += solution[rank + at]
    return estimate


def basis(
    mechanism: AttentionMechanism, head: int, n_q: int, n_k: int, query_offset: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Components (r, n_q, n_k), mean (n_q, n_k) and σ²Λ⁻¹, for truncation; zero beyond what is learned."""
    group = head if mechanism.left.shape[0] > 1 else 0
    whole = torch.einsum("rip,rjp->rij", mechanism.left[group], mechanism.right[group])
    table = torch.zeros(whole.shape[0], n_q, n_k, dtype=whole.dtype)
    for i, j in itertools.product(range(n_q), range(n_k)):
        if 0 <= i + query_offset < whole.shape[1] and j < whole.shape[2]:
            table[:, i, j] = whole[:, i + query_offset, j]
    precision = torch.diag(mechanism.log_noise[group].exp() / mechanism.log_eigenvalues[group].exp())
    return table[:-1], table[-1], precision
