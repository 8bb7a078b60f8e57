"""Attention over exact keys and cluster moments by PyTorch operators: any device, any float type, with dropout.

Differentiated by autograd. Query blocks are processed in chunks, whose intermediate arrays are computed again in the
backward pass, so that memory stays linear in the length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from approx_attn.attention.base import apply_dropout, repeat_heads
from approx_attn.attention.mask import masked_softmax

SPREAD_LIMIT = 2.0
"""Most that the spread of a cluster's scores may add to its logit: the Gaussian estimate explodes beyond."""

CHUNK_NUMBERS = 1 << 24  # numbers in the gathered keys and values of a chunk


class Layout(NamedTuple):
    """Where n_q queries and n_k keys stand and how they are cut.

    Query blocks and runs of keys have `run` positions and start at multiples of it; query i stands at i + offset.
    Runs are cut into clusters of `cluster` keys. `window`: of the mask, 0 without one. `order` says which moments
    of clusters count. `drops_rest`: the clusters that are no query's own choose, but do not enter the softmax.
    """

    n_q: int
    n_k: int
    causal: bool
    offset: int
    window: int
    run: int
    cluster: int
    order: int
    drops_rest: bool = False


class Inputs(NamedTuple):
    """What attention is computed from.

    Attributes:
        query: (b, h, n_q, d), multiplied by the scale.
        key: (b, h_kv, n_k, d). value: (b, h_kv, n_k, d_v).
        query_map: (h, d, r), A. key_map: (h, d, r), B.
        key_open: (b, n_k) bool, usable keys; None if all are.
        softcap, sinks: of the mask.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    query_map: Tensor
    key_map: Tensor
    key_open: Tensor | None
    softcap: float | None = None
    sinks: Tensor | None = None


class Clusters(NamedTuple):
    """Clusters of all keys, C = runs · run / cluster of them.

    Attributes:
        members: (b, h, C, L) int64, positions of the keys; 0 in empty slots.
        filled: (b, h, C, L) bool, which slots hold an open key.
        centre: (b, h, C, d), mean keys. values: (b, h, C, d_v), mean values.
        deviations: (b, h, C, L, r), coordinates about the cluster's mean; zero in empty slots.
        spread: (b, h, C, r, r), their second moment.
        tilt: (b, h, C, r, d_v), mean products of deviations and values.
        log_count: (b, h, C); minus infinity where a cluster is empty.
    """

    members: Tensor
    filled: Tensor
    centre: Tensor
    values: Tensor
    deviations: Tensor
    spread: Tensor
    tilt: Tensor
    log_count: Tensor


def attend(
    inputs: Inputs,
    plan: Tensor,
    near_runs: Sequence[Sequence[int]],
    most: int,
    layout: Layout,
    dropout_p: float = 0.0,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`cluster_attention` of kernels/cluster.py, and the weights (b, h, n_q, n_k) if they are asked for.

    Args beyond its:
        plan: of `make_plan`.
        near_runs: runs that may be near, for each query block.
        most: no query has more own clusters.
    """
    query, key, value, _, key_map, key_open, _, _ = inputs
    b, h, n_q, d = query.shape
    key, value = repeat_heads(key, h), repeat_heads(value, h)
    missing = -layout.n_k % layout.run
    if key_open is None:
        key_open = torch.ones(b, layout.n_k, dtype=torch.bool, device=key.device)
    key, value = F.pad(key, (0, 0, 0, missing)), F.pad(value, (0, 0, 0, missing))
    key_open = F.pad(key_open, (0, missing))
    clusters = make_clusters(key, value, key @ key_map, key_open, layout)
    largest = max(most * layout.cluster, layout.run * max(len(runs) for runs in near_runs))
    step = max(CHUNK_NUMBERS // (b * h * layout.run * max(largest, 1) * (d + value.shape[-1])), 1) * layout.run
    first = layout.offset // layout.run * layout.run - layout.offset
    outputs, weights = [], []
    for start in range(first, n_q, step):
        stop = min(start + step, n_q)
        blocks = slice((start - first) // layout.run, -(-(stop - first) // layout.run))
        near = sorted(set().union(*near_runs[blocks]))
        part = inputs._replace(query=query[:, :, max(start, 0) : stop], key=key, value=value, key_open=key_open)
        chunk = (part, clusters, plan[:, blocks], near, most, layout, max(start, 0))
        if torch.is_grad_enabled() and step < n_q:
            output, weight = checkpoint(_chunk, *chunk, dropout_p, need_weights, use_reentrant=False)
        else:
            output, weight = _chunk(*chunk, dropout_p, need_weights)
        outputs.append(output)
        weights.append(weight)
    return torch.cat(outputs, dim=2), torch.cat(weights, dim=2) if need_weights else None


def make_clusters(key: Tensor, value: Tensor, coordinates: Tensor, key_open: Tensor, layout: Layout) -> Clusters:
    """Cut runs of keys (b, h, runs · run, d) with coordinates (..., r) into clusters, with their moments."""
    members = cut(coordinates.detach(), key_open, layout)
    filled = key_open[:, None].expand(-1, members.shape[1], -1).gather(2, members.flatten(2)).view_as(members)
    used = filled[..., None].to(key.dtype)
    count = used.sum(-2)  # (b, h, C, 1)
    share = used / count.clamp_min(1.0)[..., None, :]  # (b, h, C, L, 1)

    def gathered(x: Tensor) -> Tensor:
        return _rows(x, members.flatten(2)).unflatten(2, members.shape[2:])

    own_coordinates, own_values = gathered(coordinates), gathered(value)
    deviations = (own_coordinates - (share * own_coordinates).sum(-2, keepdim=True)) * used
    weighted = (share * deviations).mT
    return Clusters(
        members=members,
        filled=filled,
        centre=(share * gathered(key)).sum(-2),
        values=(share * own_values).sum(-2),
        deviations=deviations,
        spread=weighted @ deviations,
        tilt=weighted @ own_values,
        log_count=count[..., 0].log(),
    )


@torch.no_grad()
def cut(coordinates: Tensor, key_open: Tensor, layout: Layout) -> Tensor:
    """Members (b, h, C, L) of the clusters: every run is halved at the median of one coordinate after the other.

    Empty slots go last, equal coordinates by position.
    """
    b, h, length, rank = coordinates.shape
    closed = ~key_open[:, None, :, None]
    coordinates = coordinates.nan_to_num().masked_fill(closed, float("inf"))
    members = torch.arange(length, device=coordinates.device).view(-1, layout.run).expand(b, h, -1, -1)
    size, axis = layout.run, 0
    while size > layout.cluster:
        members = members.reshape(b, h, -1, size).sort(-1).values
        along = coordinates[..., axis].gather(2, members.flatten(2)).view_as(members)
        members = members.gather(-1, along.sort(dim=-1, stable=True).indices)
        size, axis = size // 2, (axis + 1) % rank
    return members.reshape(b, h, -1, layout.cluster)


def capped(scores: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Scores after `softcap`, and the derivative of that, for all of them 1 without a cap."""
    if softcap is None:
        return scores, scores.new_ones(())
    bent = (scores / softcap).tanh()
    return softcap * bent, 1.0 - bent.square()


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """(b, h, n, d) at (b, h, m) -> (b, h, m, d)."""
    return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))


def _chunk(
    inputs: Inputs,
    clusters: Clusters,
    plan: Tensor,
    near_runs: Sequence[int],
    most: int,
    layout: Layout,
    start: int,
    dropout_p: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """Output and weights of some query blocks, the first query of which is `start`; plan: (b | 1, blocks, 5)."""
    query, key, value, query_map, _, key_open, softcap, sinks = inputs
    assert key_open is not None
    b, h, n, _ = query.shape
    position = torch.arange(start, start + n, device=query.device) + layout.offset  # (n,)
    block = torch.div(position, layout.run, rounding_mode="floor")
    far_first, far_last, near_first, near_last, own = plan[:, block - block[0], None].unbind(-1)  # (b | 1, n, 1) each
    run_of_cluster = torch.arange(clusters.centre.shape[2], device=query.device) // (layout.run // layout.cluster)
    far = (run_of_cluster >= far_first) & (run_of_cluster < far_last)  # (b | 1, n, C)
    far = far[:, None] & (clusters.log_count > float("-inf"))[:, :, None]  # (b, h, n, C)

    coordinates = query @ query_map  # (b, h, n, r)
    means, slope = capped(query @ clusters.centre.mT, softcap)  # (b, h, n, C)
    logits = means + clusters.log_count.clamp_min(0.0)[:, :, None]
    rating = logits.detach()
    if layout.order > 0:
        pairs = (coordinates[..., :, None] * coordinates[..., None, :]).flatten(-2)  # (b, h, n, r²)
        variance = slope**2 * (pairs @ clusters.spread.flatten(-2).mT)
        logits = logits + (variance / 2).clamp_max(SPREAD_LIMIT)
        rating = logits.detach() + variance.detach().clamp_min(0.0).sqrt()
    most = min(most, rating.shape[-1])
    rating = rating.masked_fill(~far, float("-inf"))
    chosen = rating.sort(dim=-1, descending=True, stable=True).indices[..., :most]  # (b, h, n, T), equal ones by place
    is_own = torch.arange(most, device=query.device) < own[:, None]  # (b | 1, 1, n, T)
    is_own = is_own & far.gather(-1, chosen)
    far = far & ~torch.zeros_like(far).scatter(-1, chosen, is_own)
    if layout.drops_rest:
        far = torch.zeros_like(far)

    run = torch.tensor(near_runs, dtype=torch.long, device=query.device)
    near_keys = (run[:, None] * layout.run + torch.arange(layout.run, device=run.device)).flatten()
    run = near_keys // layout.run
    near = (run >= near_first) & (run < near_last) & ~((run >= far_first) & (run < far_last))  # (b | 1, n, near)
    if layout.causal:
        near = near & (near_keys <= position[:, None])
    if layout.window:
        near = near & ((near_keys - position[:, None]).abs() < layout.window)
    near = (near & key_open[:, None, near_keys])[:, None].expand(-1, h, -1, -1)  # (b, h, n, near)

    slots = _rows(clusters.members, chosen.flatten(2)).flatten(2)  # (b, h, n · T · L)
    filled = _rows(clusters.filled, chosen.flatten(2)).view(b, h, n, -1)  # (b, h, n, T · L)
    own_open = filled & is_own.expand(b, h, -1, -1).repeat_interleave(layout.cluster, -1)
    own_scores = (_rows(key, slots).view(b, h, n, -1, key.shape[-1]) @ query[..., None]).squeeze(-1)
    near_scores = query @ key[:, :, near_keys].mT

    scores = torch.cat((capped(near_scores, softcap)[0], capped(own_scores, softcap)[0], logits), dim=-1)
    keep = torch.cat((near, own_open, far), dim=-1)
    weights = apply_dropout(masked_softmax(scores, keep, sinks).to(query.dtype), dropout_p)
    of_near, of_own, of_far = weights.split([near.shape[-1], own_open.shape[-1], far.shape[-1]], dim=-1)
    output = of_near @ value[:, :, near_keys]
    if not layout.drops_rest:
        output = output + of_far @ clusters.values
    output = output + (of_own[..., None, :] @ _rows(value, slots).view(b, h, n, -1, value.shape[-1])).squeeze(-2)
    if layout.order == 2 and not layout.drops_rest:
        tilted = (slope * of_far @ clusters.tilt.flatten(3)).view(b, h, n, -1, value.shape[-1])
        output = output + (coordinates[..., None, :] @ tilted).squeeze(-2)
    if not need_weights:
        return output, None
    dense = weights.new_zeros(b, h, n, key.shape[2])
    dense[..., near_keys] = of_near
    dense = dense.scatter_add(-1, slots.view(b, h, n, -1), of_own)
    filled_count = clusters.filled.sum(-1).clamp_min(1)[:, :, None, :, None]
    shares = of_far[..., None] * clusters.filled[:, :, None] / filled_count  # (b, h, n, C, L)
    if layout.order == 2:
        tilts = coordinates @ clusters.deviations.flatten(2, 3).mT  # (b, h, n, C · L)
        shares = shares * (1.0 + slope[..., None] * tilts.view_as(shares))
    dense = dense.scatter_add(-1, clusters.members.flatten(2)[:, :, None].expand(-1, -1, n, -1), shares.flatten(-2))
    return output, dense[..., : layout.n_k]
