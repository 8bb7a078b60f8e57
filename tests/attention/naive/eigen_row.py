"""eigen_row, one row at a time: c = (BᵀΨ⁻¹B + Λ⁻¹)⁻¹ BᵀΨ⁻¹(P − μ), the constant vector a column with a flat prior."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from approx_attn.attention import AttentionMask, AttentionMechanism
from helpers import naive_cap, naive_softmax

CASES = {
    "default": {},
    "greedy": {"selection": "greedy", "keep": 0.3, "global_tokens": 2, "share": "layer"},
    "window": {"window": 2, "rank": 3, "selection": "random", "seed": 1},
    "noise": {"noise": "position"},
    "greedy_noise": {"noise": "position", "selection": "greedy", "window": 1},
    "random_basis": {"window": 1, "keep": 0.2, "basis_init": "random"},
}


def prepare(mechanism: AttentionMechanism) -> None:
    with torch.no_grad():
        for parameter in mechanism.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    mechanism.select_greedily()


def naive(
    mechanism: AttentionMechanism, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float
) -> Tensor:
    return reconstruct(mechanism, query, key, value, mask, scale)[0]


def reconstruct(
    mechanism: AttentionMechanism, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float
) -> tuple[Tensor, Tensor]:
    """Output (b, h, n_q, d_v) and scores (b, h, n_q, n_k) as they stand before mask and bias."""
    n_q, n_k = query.shape[2], key.shape[2]
    keep = mask.dense_keep(n_q, n_k, query.device)
    keep = torch.ones(1, 1, 1, 1, dtype=torch.bool) if keep is None else keep
    keep = keep.expand(*query.shape[:2], n_q, n_k)
    bias = mask.finite_bias()
    exact = query @ key.transpose(-2, -1) * scale
    columns = mechanism.columns(n_k)
    position = mechanism.position
    scores, output = (
        torch.zeros(*query.shape[:2], n_q, n_k, dtype=query.dtype),
        torch.zeros(*query.shape[:-1], value.shape[-1], dtype=query.dtype),
    )
    for b, h, i in itertools.product(range(query.shape[0]), range(query.shape[1]), range(n_q)):
        group = h if position.mean.shape[0] > 1 else 0
        place = i + mask.query_offset
        mean, basis = rows_of_basis(mechanism, group, n_k)
        eigenvalues, noise = position.log_eigenvalues[group].exp(), noise_of_positions(mechanism, group, n_k)
        window = range(place - mechanism.window, place + mechanism.window + 1) if mechanism.window else ()
        observed = [j for j in range(n_k) if j in columns or j in window]
        usable = [j for j in observed if keep[b, h, i, j]]
        row = mean.clone()
        if usable:
            columns_of_basis = torch.cat([basis, torch.ones(n_k, 1, dtype=basis.dtype)], dim=1)
            prior = torch.diag(torch.cat([1 / eigenvalues, torch.zeros(1, dtype=basis.dtype)]))
            seen = columns_of_basis[usable]
            weighted = seen.T / noise[usable]
            c = torch.linalg.solve(weighted @ seen + prior, weighted @ (exact[b, h, i, usable] - mean[usable]))
            row = mean + columns_of_basis @ c
        row[observed] = exact[b, h, i, observed]
        scores[b, h, i] = row
        row = naive_cap(row, mask)
        if bias is not None:
            row = row + bias.expand(*query.shape[:2], n_q, n_k)[b, h, i]
        kept = keep[b, h, i]
        if kept.any():
            output[b, h, i] = naive_softmax(row[kept], mask, h) @ value[b, h][kept]
    return output, scores


def rows_of_basis(mechanism: AttentionMechanism, group: int, n_k: int) -> tuple[Tensor, Tensor]:
    """Mean (n_k,) and basis (n_k, r) of a row, for truncation; zero beyond what is learned."""
    mean, basis = mechanism.position.mean[group], mechanism.position.basis[group]
    out_mean, out_basis = torch.zeros(n_k, dtype=mean.dtype), torch.zeros(n_k, basis.shape[1], dtype=mean.dtype)
    for j in range(min(n_k, mean.shape[0])):
        out_mean[j], out_basis[j] = mean[j], basis[j]
    return out_mean, out_basis


def noise_of_positions(mechanism: AttentionMechanism, group: int, n_k: int) -> Tensor:
    """Noise (n_k,) of a row; the geometric mean beyond what is learned."""
    log_noise = mechanism.position.log_noise[group]
    out = log_noise.mean().expand(n_k).clone()
    if log_noise.dim():
        out[: len(log_noise)] = log_noise[:n_k]
    return out.exp()
