"""Scores of rows given their observed entries: as interpolated keys, or row by row (`eigen_row`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from approx_attn.attention.eigen.position_basis import PositionPrior, centred_products, posterior_covariance
from approx_attn.attention.mask import AttentionMask, at_least_float32

AUXILIARY_PAIRS = 256  # pairs sampled per head and block of queries for the auxiliary loss


@dataclass(frozen=True)
class QueryBlock:
    """A block of consecutive queries and the keys that matter to it.

    Attributes:
        start, stop: the queries.
        n_k: leading keys that any of them may see.
        columns: keys that every query observes (those below n_k count).
        observed: keys whose scores are computed for the block: columns and the window around it.
        query_offset: position of query 0 among the keys.
        window: keys at most this far from a query are observed by it; 0 for none.
    """

    start: int
    stop: int
    n_k: int
    columns: tuple[int, ...]
    observed: tuple[int, ...]
    query_offset: int
    window: int

    def observed_by(self, index: Tensor) -> Tensor | None:
        """(c, m) bool: which of the observed keys belong to which row; None if all to all."""
        if self.window == 0:
            return None
        columns = set(self.columns)
        is_column = torch.tensor([j in columns for j in self.observed], dtype=torch.bool, device=index.device)
        positions = torch.arange(self.start, self.stop, device=index.device) + self.query_offset
        return is_column | ((index - positions[:, None]).abs() <= self.window)

    def count_exact(self, causal: bool) -> int:
        """Pairs of one head whose exact score can enter the result."""
        index = torch.tensor(self.observed, dtype=torch.long)
        observed = self.observed_by(index)
        rows = self.stop - self.start
        observed = torch.ones(rows, len(self.observed), dtype=torch.bool) if observed is None else observed
        if causal:
            observed = observed & (index <= torch.arange(self.start, self.stop)[:, None] + self.query_offset)
        return int(observed.sum())

    def systems(self) -> tuple[list[int], list[int]]:
        """Rows of the block that see different columns in their past, and for each row the one it agrees with.

        Returns:
            Rows, as offsets into the block, and for each of the c rows an index into these.
        """
        columns = set(self.observed)
        rows, group_of_row = [0], [0]
        for row in range(1, self.stop - self.start):
            if self.start + row + self.query_offset in columns:  # the query's own key joins its past
                rows.append(row)
            group_of_row.append(len(rows) - 1)
        return rows, group_of_row


def prior_table(prior: PositionPrior) -> Tensor:
    """(g, n, r + 2): whitened basis, one and mean at every position, whose products with coefficients are rows."""
    return torch.cat([prior.factor, torch.ones_like(prior.mean)[..., None], prior.mean[..., None]], dim=-1)


def interpolated_keys(
    key: Tensor, key_keep: Tensor | None, prior: PositionPrior, columns: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Keys and biases whose scores s·q·k̃ + bias are the reconstructed rows.

    Args:
        key: (b, h, n, d), zero where padded.
        key_keep: (b, n) bool or None.
        columns: positions of the observed keys; they keep their key and get bias zero.

    Returns:
        Keys (b, h, n, d) and bias (b, h, n), in at least float32; the bias of a padded key is minus infinity.
    """
    b, h, _, d = key.shape
    index = torch.tensor(columns, dtype=torch.long, device=key.device)
    observed = at_least_float32(key.index_select(-2, index))  # (b, h, m, d)
    factor = prior.factor.index_select(1, index)  # (g, m, r)
    weight = prior.weights_at(index)[None]  # (1, g | 1, m)
    if key_keep is not None:
        weight = weight * key_keep.index_select(1, index)[:, None].to(factor.dtype)  # (b, g | 1, m)
    total = nonzero(weight.sum(-1, keepdim=True))[..., None]  # (b | 1, g | 1, 1, 1)
    centre = (weight[:, :, None] @ factor) / total  # (b | 1, g, 1, r)
    centred = factor - centre  # (b | 1, g, m, r)
    weighted = (centred * weight[..., None]).transpose(-2, -1)  # (b | 1, g, r, m)
    covariance = posterior_covariance(weighted @ centred, prior.noise)  # (b | 1, g, r, r)
    gain = covariance @ weighted  # (b | 1, g, r, m)

    # A row of scores is linear in its observed keys and in the mean: interpolate both side by side.
    mean = prior.mean.index_select(1, index)[None, :, :, None].expand(b, h, -1, 1)
    sources = torch.cat([observed, -mean], dim=-1)  # (b, h, m, d + 1)
    coefficients = gain @ sources  # (b, h, r, d + 1)
    average = (sources * weight[..., None]).sum(-2, keepdim=True) / total
    shift = average - centre @ coefficients  # (b, h, 1, d + 1)
    own_mean = F.pad(factor.new_ones(1, 1, 1, 1), (d, 0)).expand(b, h, 1, d + 1)
    keys = prior_table(prior) @ torch.cat(
        [coefficients, shift, own_mean], dim=-2
    )  # (g, n, r + 2) @ (b, h, r + 2, d + 1)
    keys = keys.index_copy(-2, index, F.pad(observed, (0, 1)))
    bias = keys[..., d]
    if key_keep is not None:
        bias = bias.masked_fill(~key_keep[:, None], float("-inf"))
    return keys[..., :d], bias


def block_scores(
    query: Tensor,
    key: Tensor,
    keep: Tensor | None,
    table: Tensor,
    prior: PositionPrior,
    block: QueryBlock,
    scale: float,
    rows_share: bool,
) -> Tensor:
    """Rows of scores of a block of queries: exact where observed, else the posterior mean.

    Args:
        query: (b, h, c, d).
        key: (b, h, n, d).
        keep: (b | 1, h | 1, c | 1, n) bool or None; what is not kept is no evidence.
        table: (g, n, r + 2), `prior_table(prior)`.
        prior: at these keys or at more.
        rows_share: rows that see equally many of the columns have the same system (`QueryBlock.systems`).

    Returns:
        (b, h, c, n) in at least float32.
    """
    index = torch.tensor(block.observed, dtype=torch.long, device=query.device)
    exact = at_least_float32((query * scale) @ key.index_select(-2, index).transpose(-2, -1))  # (b, h, c, m)
    observed = block.observed_by(index)  # (c, m)
    evidence = (
        exact.new_ones(1, 1, 1, len(block.observed)) if observed is None else observed.to(exact.dtype)[None, None]
    )
    if keep is not None:
        evidence = evidence * keep.index_select(-1, index)  # (b | 1, h | 1, c | 1, m)
    if prior.weight is not None:
        evidence = evidence * prior.weights_at(index)[:, None]
    at_observed = table.index_select(1, index)  # (g, m, r + 2)
    factor, mean = at_observed[..., :-2], at_observed[:, None, :, -1]

    group: Tensor | None = None
    distinct = evidence
    if rows_share and evidence.shape[2] > 1:
        rows, group_of_row = block.systems()
        group = torch.tensor(group_of_row, device=query.device)
        distinct = evidence.index_select(2, torch.tensor(rows, device=query.device))  # (b | 1, h | 1, c', m)
    total = nonzero(distinct.sum(-1, keepdim=True))  # (b | 1, h | 1, c' | 1, 1)
    centre = distinct @ factor / total
    rank = factor.shape[-1]
    outer = (factor[..., :, None] * factor[..., None, :]).flatten(-2)  # (g, m, r²)
    second = (distinct @ outer).unflatten(-1, (rank, rank))
    covariance = posterior_covariance(
        centred_products(second, centre, total), prior.noise[:, None]
    )  # (b | 1, g | h, c', r, r)
    if group is not None:
        total, centre, covariance = (part.index_select(2, group) for part in (total, centre, covariance))

    residual = evidence * (exact - mean)  # (b, h, c, m)
    average = residual.sum(-1, keepdim=True) / total
    moment = residual @ factor - total * average * centre
    coefficients = torch.einsum("bhcrs,bhcs->bhcr", covariance, moment)
    shift = average - (centre * coefficients).sum(-1, keepdim=True)
    coefficients = torch.cat([coefficients, shift, torch.ones_like(shift)], dim=-1)  # (b, h, c, r + 2)
    scores = coefficients @ table.transpose(-2, -1)
    if observed is not None:
        exact = torch.where(observed, exact, scores.index_select(-1, index))
    return scores.index_copy(-1, index, exact)


def nonzero(total: Tensor) -> Tensor:
    """Sums of weights to divide by: one for a row without evidence, whose sums are all zero."""
    return total + (total == 0).to(total.dtype)


def entries(scores: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """(..., n_q, n_k) at pairs of queries and keys (pairs,) -> (..., pairs)."""
    return scores[..., i, j]


def sampled_errors(
    estimate: Callable[[Tensor, Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    keep: Tensor | None,
    mask: AttentionMask,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Sum of the squared errors of estimated scores on random pairs that may be used, and their number.

    Args:
        estimate: gives (b, h, pairs) estimated scores of queries i and keys j, (pairs,) int64 each.
        query: (b, h, n_q, d).
        key: (b, h, n_k, d).
        keep: what the mask says of pairs, (b | 1, h | 1, n_q | 1, n_k) bool; None where it closes keys alone.
        mask: of these queries and keys.
        scale: factor on query-key products.
    """
    i = torch.randint(query.shape[-2], (AUXILIARY_PAIRS,), device=query.device)
    j = torch.randint(key.shape[-2], (AUXILIARY_PAIRS,), device=query.device)
    exact = (at_least_float32(query[..., i, :]) * at_least_float32(key[..., j, :])).sum(-1) * scale  # (b, h, pairs)
    return squared_error(estimate(i, j), exact, pair_keep(keep, mask, i, j))


def pair_keep(keep: Tensor | None, mask: AttentionMask, i: Tensor, j: Tensor) -> Tensor | None:
    """(b | 1, h | 1, pairs) bool: sampled pairs that may be used, by queries that are not padding."""
    pairs = None
    if keep is not None:
        pairs = keep[..., i if keep.shape[-2] > 1 else torch.zeros_like(i), j]
    elif mask.key_keep is not None:
        pairs = mask.key_keep[:, None, j]
    if mask.query_keep is not None:
        real = mask.query_keep[:, None, i]
        pairs = real if pairs is None else pairs & real
    return pairs


def squared_error(estimate: Tensor, exact: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum of squared errors over the kept pairs, and their number. The exact score gets no gradient."""
    error = estimate - exact.detach()
    if keep is None:
        return error.square().sum(), error.new_tensor(float(error.numel()))
    keep = keep.expand_as(error)
    # Masked before it is squared: an excluded estimate may be infinite.
    return error.masked_fill(~keep, 0.0).square().sum(), keep.sum().to(error.dtype)
