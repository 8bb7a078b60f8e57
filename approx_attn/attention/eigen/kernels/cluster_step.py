"""A few last queries over stored cluster moments and few keys: the decoding step of `eigen_cluster`.

Where it runs: one compiled operator (cluster_cpu/step.h) on a CPU in float32 or bfloat16, PyTorch operators elsewhere
and for scores that are soft-capped or have sinks beside them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from approx_attn.attention.base import repeat_heads
from approx_attn.attention.eigen.kernels import native
from approx_attn.attention.eigen.kernels.cluster import runs_compiled
from approx_attn.attention.eigen.kernels.cluster_torch import SPREAD_LIMIT, Layout, capped, make_clusters
from approx_attn.attention.mask import at_least_float32, masked_softmax

EMPTY = torch.finfo(torch.float32).min / 4  # instead of the logarithm of no key at all


class Moments(NamedTuple):
    """Moments of the clusters of some runs, one after the other.

    h_s heads have clusters of their own: the query heads, or the key heads where these share the map that cuts.

    Attributes:
        members: (b, h_s, C, L) int32, positions of the keys in the sequence; -1 in empty slots.
        centre: (b, h_s, C, d), mean keys.
        values: (b, h_s, C, o, d_v), mean values, and at order 2 their mean products with each deviation.
        spread: (b, h_s, C, f), of ½ a Σ aᵀ the factor of each product of two coordinates of a; f = 0 at order 0.
        log_count: (b, h_s, C); `EMPTY` where a cluster has no open key.
    """

    members: Tensor
    centre: Tensor
    values: Tensor
    spread: Tensor
    log_count: Tensor

    def clusters(self, first: int, last: int) -> Moments:
        """Those of clusters first..last-1."""
        return Moments(*(x[:, :, first:last] for x in self))


class Spans(NamedTuple):
    """What the queries of one block and sample see: [first, last) each, empty where last is not above first.

    Attributes:
        far: clusters, of those in `Moments`.
        before, after: positions of exact keys before and after the far runs.
        own: clusters per query.
    """

    far: tuple[int, int]
    before: tuple[int, int]
    after: tuple[int, int]
    own: int


class Step(NamedTuple):
    """Queries of one block, and where they and the keys stand.

    Attributes:
        query: (b, h, m, d), multiplied by the scale, at least float32.
        key: (b, h_kv, n, d), as cached. value: (b, h_kv, n, d_v).
        query_map: (h | 1, d, r).
        key_open: (b, n) bool; None if all are.
        position: of the first query in the sequence.
        first: position of the first key.
        window: of the mask, 0 without one.
        spans: of each sample, or one for all.
        softcap, sinks: of the mask.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    query_map: Tensor
    key_open: Tensor | None
    position: int
    first: int
    window: int
    spans: list[Spans]
    softcap: float | None = None
    sinks: Tensor | None = None


def make_moments(
    key: Tensor, value: Tensor, key_map: Tensor, key_open: Tensor | None, start: int, layout: Layout
) -> Moments:
    """Moments of whole runs.

    Args:
        key: (b, h_kv, runs · run, d). value: likewise with d_v.
        key_map: (h | 1, d, r).
        key_open: (b, runs · run) bool or None.
        start: position of the first key in the sequence.
        layout: `run`, `cluster` and `order` count.
    """
    key, value = at_least_float32(key), at_least_float32(value)
    if len(key_map) > 1:
        key, value = repeat_heads(key, len(key_map)), repeat_heads(value, len(key_map))
    if key_open is None:
        key_open = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
    closed = ~key_open[:, None, :, None]
    key, value = key.masked_fill(closed, 0.0), value.masked_fill(closed, 0.0)
    found = make_clusters(key, value, key @ key_map, key_open, layout)
    rank = key_map.shape[-1]
    rows, columns = torch.triu_indices(rank, rank, device=key.device)
    spread = found.spread[..., rows, columns] * torch.where(rows == columns, 0.5, 1.0)  # (b, h_s, C, f)
    values = found.values[..., None, :]
    return Moments(
        members=(found.members + start).masked_fill(~found.filled, -1).int(),
        centre=found.centre,
        values=torch.cat((values, found.tilt), dim=-2) if layout.order == 2 else values,
        spread=spread if layout.order > 0 else spread[..., :0],
        log_count=found.log_count.clamp_min(EMPTY),
    )


def attend_step(step: Step, moments: Moments) -> Tensor:
    """Output (b, h, m, d_v) of one softmax over near keys, keys of own clusters, and the other far clusters."""
    plain = step.softcap is None and step.sinks is None
    if plain and runs_compiled(step.key) and step.query.dtype == torch.float32:
        return _compiled(step, moments)
    if len(set(step.spans)) == 1:
        return _attend(step, step.spans[0], moments.clusters(*step.spans[0].far))
    outputs = []
    for i, spans in enumerate(step.spans):
        at = slice(i, i + 1)
        key_open = None if step.key_open is None else step.key_open[at]
        part = step._replace(query=step.query[at], key=step.key[at], value=step.value[at], key_open=key_open)
        outputs.append(_attend(part, spans, Moments(*(x[at] for x in moments.clusters(*spans.far)))))
    return torch.cat(outputs)


def _compiled(step: Step, moments: Moments) -> Tensor:
    kernel = native.load()
    assert kernel is not None
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (step.key, step.value))
    spans = torch.tensor([(*x.far, *x.before, *x.after, x.own) for x in step.spans])
    key_open = None if step.key_open is None else step.key_open.contiguous()
    contiguous = (x.contiguous() for x in moments)
    query, query_map = step.query.contiguous(), step.query_map.contiguous()
    places = step.position, step.first, step.window
    return kernel.cluster_step(query, key, value, query_map, key_open, *contiguous, spans, *places)


def _attend(step: Step, spans: Spans, moments: Moments) -> Tensor:
    """`attend_step` by PyTorch's operators, of samples with the same spans, the far clusters of which are given."""
    query, key, value = step.query, step.key, step.value
    b, h, m, d = query.shape
    heads, position = moments.centre.shape[1], torch.arange(m, device=query.device)[:, None] + step.position
    coordinates = query @ step.query_map  # (b, h, m, r)
    *found, slope = _logits(query, coordinates, moments, step.softcap)
    logits, rating = (x.view(b, h, m, -1) for x in found)
    own = min(spans.own, rating.shape[-1])
    chosen = rating.sort(dim=-1, descending=True, stable=True).indices[..., :own]  # (b, h, m, T), equal ones by place
    far = (moments.log_count > EMPTY / 2).repeat_interleave(h // heads, 1)[:, :, None].expand_as(logits)
    far = far.scatter(-1, chosen, False)

    samples = torch.arange(b, device=query.device)[:, None, None, None]
    head = torch.arange(h, device=query.device)[:, None, None]
    slots = moments.members[samples, head // (h // heads), chosen].flatten(-2).long()  # (b, h, m, T · L)
    rows = (samples, head // (h // key.shape[1]), (slots - step.first).clamp_min(0))
    own_open = slots >= 0
    own_scores = (key[rows].to(query.dtype) @ query[..., None]).squeeze(-1).masked_fill(~own_open, 0.0)
    own_values = value[rows].to(query.dtype)

    near_keys, near_values = (_near(x, step.first, spans).to(query.dtype) for x in (key, value))
    places = torch.cat([torch.arange(*span, device=query.device) for span in (spans.before, spans.after)])  # (near,)
    near = places <= position  # (m, near)
    if step.window:
        near = near & (position - places < step.window)
    near = near.expand(b, -1, -1)
    if step.key_open is not None:
        is_open = step.key_open[:, places - step.first]
        near = near & is_open[:, None]
        closed = ~is_open[:, None, :, None]  # whatever stands in the padding, even NaN
        near_keys, near_values = near_keys.masked_fill(closed, 0.0), near_values.masked_fill(closed, 0.0)
        own_values = own_values.masked_fill(~own_open[..., None], 0.0)
    near_scores = (query.reshape(b, key.shape[1], -1, d) @ near_keys.mT).view(b, h, m, -1)

    near_scores, own_scores = (capped(x, step.softcap)[0] for x in (near_scores, own_scores))
    scores = torch.cat((near_scores, own_scores, logits), dim=-1)
    keep = torch.cat((near[:, None].expand(-1, h, -1, -1), own_open, far), dim=-1)
    weights = masked_softmax(scores, keep, step.sinks).to(query.dtype)
    of_near, of_own, of_far = weights.split([len(places), slots.shape[-1], logits.shape[-1]], dim=-1)
    output = (of_near.reshape(b, key.shape[1], -1, len(places)) @ near_values).view(b, h, m, -1)
    output = output + (of_own[..., None, :] @ own_values).squeeze(-2)
    of_far = of_far.reshape(b, heads, h // heads * m, of_far.shape[-1])
    output = output + (of_far @ moments.values[..., 0, :]).view(output.shape)
    if moments.values.shape[-2] == 1:
        return output
    tilts = (slope * of_far) @ moments.values[..., 1:, :].flatten(-2)
    return output + (coordinates[..., None, :] @ tilts.view(b, h, m, -1, value.shape[-1])).squeeze(-2)


def _logits(
    query: Tensor, coordinates: Tensor, moments: Moments, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of all clusters, the ratings that own ones are chosen by, and the slope of the cap at their means.

    (b, h_s, h / h_s · m, C) each; the slope is one number without a cap.
    """
    b, heads = moments.centre.shape[:2]
    means, slope = capped(query.reshape(b, heads, -1, query.shape[-1]) @ moments.centre.mT, softcap)
    logits = means + moments.log_count[:, :, None]
    if not moments.spread.shape[-1]:
        return logits, logits, slope
    rank = coordinates.shape[-1]
    rows, columns = torch.triu_indices(rank, rank, device=query.device)
    pairs = coordinates[..., rows] * coordinates[..., columns]  # (b, h, m, f)
    spread = slope**2 * (pairs.reshape(b, heads, -1, len(rows)) @ moments.spread.mT)
    logits = logits + spread.clamp_max(SPREAD_LIMIT)
    return logits, logits + (2.0 * spread).clamp_min(0.0).sqrt(), slope


def _near(x: Tensor, first: int, spans: Spans) -> Tensor:
    """The exact ones of keys or values beside those of own clusters."""
    parts = [x[:, :, start - first : stop - first] for start, stop in (spans.before, spans.after) if start < stop]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
