"""What `eigen_cluster` keeps beside a key/value cache: the moments of the clusters of all whole runs."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from approx_attn.attention.decoding import DecodingCache
from approx_attn.attention.eigen.content_basis import HasContentBasis
from approx_attn.attention.eigen.kernels.cluster import make_plan, places, unpadded_plan
from approx_attn.attention.eigen.kernels.cluster_step import Moments, Spans, Step, attend_step, make_moments
from approx_attn.attention.eigen.kernels.cluster_torch import Layout
from approx_attn.attention.mask import AttentionMask, at_least_float32


class HasClusters(HasContentBasis):
    """The mechanism as its cache sees it: options of `EigenClusterAttention`."""

    keep: float | int
    block_size: int
    cluster_size: int
    order: int


class ClusterCache(DecodingCache):
    """Clusters of the runs that are whole, each cut once, when the first query needs it.

    A step of one query scores all clusters by their moments, which are (d + f + o·d_v + 1) / L numbers per key instead
    of d + d_v (f = r (r + 1) / 2 from order 1 on, o = 1 + r at order 2, else 1), and reads the keys and values of its
    own clusters and of the run it stands in. It takes the same clusters and choices as a pass over the whole sequence.
    With `share=head` each query head has clusters of its own, with any other `share` each key head.

    Up to `block_size` queries are a step; more of them, as a prompt is, take the pass over all keys.
    """

    def __init__(self, mechanism: HasClusters) -> None:
        self.mechanism = mechanism
        self._version: int | None = None  # of the map that cut
        self._first = self._last = 0  # runs whose moments are kept
        self._moments: Moments | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> ClusterCache:
        """With caches of which copies are meant: of the same mechanism, with the same tensors, which never change."""
        return copy.copy(self)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: AttentionMask,
        *,
        first: int = 0,
        window: int | None = None,
        scale: float | None = None,
        dropout_p: float = 0.0,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if first:
            mask = replace(mask, window=mask.window or window)
        dropout_p = dropout_p if self.mechanism.training else 0.0
        if dropout_p == 0.0 and not need_weights and self._is_step(query, key, value, mask, first):
            scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
            with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
                return self._step(at_least_float32(query) * scale, key, value, mask, first).to(query.dtype), None
        return self._pass(query, key, value, mask, first, scale, dropout_p, need_weights)

    def select(self, samples: Tensor) -> None:
        if self._moments is not None:
            self._moments = Moments(*(x.index_select(0, samples.to(x.device)) for x in self._moments))

    def crop(self, length: int) -> None:
        last = max(length // self.mechanism.block_size, self._first)
        if self._moments is not None and last < self._last:
            self._moments = self._moments.clusters(0, (last - self._first) * self._per_run)
            self._last = last

    @property
    def _per_run(self) -> int:
        return self.mechanism.block_size // self.mechanism.cluster_size

    # -- all keys ----------------------------------------------------------------------------------

    def _pass(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: AttentionMask,
        first: int,
        scale: float | None,
        dropout_p: float,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The mechanism's own, with closed keys before those of a sliding cache, so that runs start where they did."""
        missing = 0
        if first:
            layout = self._layout(query.shape[-2], key.shape[-2], mask, first)
            missing = first - places(layout)[0].near_first * layout.run
            key, value = (F.pad(x, (0, 0, missing, 0)) for x in (key, value))
            keep = mask.key_keep
            keep = torch.ones(key.shape[0], 1, dtype=torch.bool, device=key.device) if keep is None else keep
            keep = F.pad(keep.expand(-1, key.shape[-2] - missing), (missing, 0))
            mask = replace(mask, key_keep=keep, query_offset=mask.query_offset + missing)
        words = {"dropout_p": dropout_p, "need_weights": need_weights}
        output, weights = self.mechanism(query, key, value, mask, scale=scale, **words)
        # Sliced only where needed: a slice is not on the way to the output, so it gets no gradient.
        return output, weights[..., missing:] if weights is not None and missing else weights

    def _layout(self, n_q: int, n_k: int, mask: AttentionMask, first: int) -> Layout:
        """Where queries and keys stand in the whole sequence."""
        its = self.mechanism
        cut = (its.block_size, its.cluster_size, its.order)
        return Layout(n_q, first + n_k, mask.causal, first + mask.query_offset, mask.window or 0, *cut)

    # -- few keys ----------------------------------------------------------------------------------

    def _is_step(self, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, first: int) -> bool:
        its, n_q = self.mechanism, query.shape[-2]
        parts = (query, key, value, its.basis.query_map, its.basis.key_map, mask.sinks)
        learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in parts)
        return (
            mask.causal
            and mask.is_structured
            and its.substitute is None
            and 0 < n_q <= its.block_size
            and mask.query_offset >= 0
            and n_q + mask.query_offset <= key.shape[-2]
            and first + mask.query_offset > 0
            and query.shape[0] > 0
            and not learns  # moments are of keys that are cut once: no gradient flows to them
        )

    def _step(self, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, first: int) -> Tensor:
        its = self.mechanism
        its.basis.require_ready()
        layout = self._layout(query.shape[-2], key.shape[-2], mask, first)
        rows = self._plan(layout, mask, first)
        far = [row[:2] for sample in rows for row in sample if row[0] < row[1]]
        if far:
            self._keep_runs(min(low for low, _ in far), max(high for _, high in far), key, value, mask.key_keep, first)
        moments = self._make(key[:, :, :0], value[:, :, :0], None, 0) if self._moments is None else self._moments
        query_map = its.basis.query_map.to(query.dtype)
        outputs, first_block = [], layout.offset // layout.run
        for block in range(first_block, (layout.offset + layout.n_q - 1) // layout.run + 1):
            low = max(block * layout.run - layout.offset, 0)
            part = query[:, :, low : (block + 1) * layout.run - layout.offset]
            position = layout.offset + low
            spans = [self._spans(sample[block - first_block], first, position + part.shape[-2]) for sample in rows]
            where = position, first, layout.window, spans, mask.softcap, mask.sinks
            outputs.append(attend_step(Step(part, key, value, query_map, mask.key_keep, *where), moments))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def _plan(self, layout: Layout, mask: AttentionMask, first: int) -> list[list[list[int]]]:
        """`make_plan` as numbers: by sample (one for all where none is padded) and block."""
        keep = self.mechanism.keep
        if mask.key_keep is None:
            return [[list(row) for row in unpadded_plan(layout, keep)]]
        return make_plan(layout, keep, F.pad(mask.key_keep, (first, 0)), mask.key_keep.device).tolist()

    def _spans(self, plan: list[int], first: int, end: int) -> Spans:
        """A row of the plan as clusters that are kept and keys that are there, from `first` to before `end`."""
        far_first, far_last, near_first, near_last, own = plan
        run = self.mechanism.block_size

        def keys(start: int, stop: int) -> tuple[int, int]:
            return min(max(start * run, first), end), min(max(stop * run, first), end)

        is_far = far_first < far_last
        far = (
            ((far_first - self._first) * self._per_run, (far_last - self._first) * self._per_run) if is_far else (0, 0)
        )
        return Spans(far, keys(near_first, far_first), keys(far_last, near_last), own)

    def _keep_runs(self, low: int, high: int, key: Tensor, value: Tensor, key_open: Tensor | None, first: int) -> None:
        """Have the moments of runs low..high-1."""
        key_map, run = self.mechanism.basis.key_map, self.mechanism.block_size
        version = None if key_map.is_inference() else key_map._version  # count of in-place changes
        kept = self._moments
        fits = kept is not None and kept.centre.shape[0] == len(key) and version == self._version
        if not (fits and self._first <= low <= self._last):
            kept, self._first, self._last, self._version = None, low, low, version
        if self._last >= high:
            return
        start, stop = self._last * run, high * run
        new = slice(start - first, stop - first)
        made = self._make(key[:, :, new], value[:, :, new], None if key_open is None else key_open[:, new], start)
        if kept is not None:
            kept = kept.clusters((low - self._first) * self._per_run, kept.centre.shape[2])
            made = Moments(*(torch.cat(parts, dim=2) for parts in zip(kept, made, strict=True)))
            self._first = low
        self._moments, self._last = made, high

    def _make(self, key: Tensor, value: Tensor, key_open: Tensor | None, start: int) -> Moments:
        its = self.mechanism
        dtype = torch.promote_types(key.dtype, torch.float32)
        layout = Layout(0, key.shape[-2], True, 0, 0, its.block_size, its.cluster_size, its.order)
        return make_moments(key, value, its.basis.key_map.to(dtype), key_open, start, layout)
