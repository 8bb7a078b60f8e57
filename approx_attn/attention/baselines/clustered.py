"""Queries in clusters: one row of attention per cluster, its largest entries computed again for each query.

Vyas, Katharopoulos, Fleuret: *Fast Transformers with Clustered Attention*, arXiv 2007.04825; this is its improved
clustered attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from approx_attn.attention.base import AttentionMechanism, Capabilities, Cost, Request, apply_dropout
from approx_attn.attention.baselines.sliding_window import first_kept
from approx_attn.attention.baselines.topk import in_autocast_type
from approx_attn.attention.budget import kept_pairs, keys_per_query, require_budget, resolve_count
from approx_attn.attention.layouts.routed import routed_attention
from approx_attn.attention.mask import AttentionMask, at_least_float32, masked_softmax
from approx_attn.attention.registry import register_attention
from approx_attn.attention.shape import AttentionShape
from approx_attn.errors import require_count


@register_attention("clustered")
class ClusteredAttention(AttentionMechanism):
    """Improved clustered attention: query i of cluster c, with mean query q̄_c, a_c = softmax(s·q̄_c Kᵀ) and T_c its k
    largest entries, has the weights (equations 8 to 11 of the paper)

        m_c · exp(s·q_i·k_j) / Σ_{l ∈ T_c} exp(s·q_i·k_l) for j in T_c,    a_cj for the others    (m_c = Σ_{T_c} a_cj)

    Clusters are found by Lloyd's iterations on the signs of random projections of the queries, with Hamming distance,
    from the first queries on, as in the authors' code; a cluster that has no query keeps its centre. They get no
    gradient. A cluster's mean reads later queries, so it is not causal. Padded queries are in no mean; where
    `mask.query_keep` is missing, queries as many as the keys are taken for the same tokens.

    Args:
        keep: k, keys computed again for each query: a fraction of those it may use, or a number (the paper has 32).
        num_clusters: C, clamped to the number of queries.
        bits: signs of one query; the paper has 63, and 32 take half the time.
        iterations: of Lloyd's algorithm, fewer where nothing changes any more.
        seed: of the projections; each layer draws its own.
    """

    capabilities = Capabilities(causal=False, arbitrary_mask=False, returns_weights=False, independent_queries=False)
    cost_formula = "n·C·(d + bits·iterations) + keep·n²·d"
    planes: Tensor

    def __init__(
        self,
        shape: AttentionShape,
        *,
        keep: float | int = 32,
        num_clusters: int = 100,
        bits: int = 32,
        iterations: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        self.keep = require_budget("attention.keep", keep)
        self.num_clusters = require_count("attention.num_clusters", num_clusters)
        self.bits = require_count("attention.bits", bits)
        self.iterations = require_count("attention.iterations", iterations)
        self.seed = require_count("attention.seed", seed, 0)
        generator = torch.Generator().manual_seed(self.seed + 65_537 * shape.layer_index)
        # A buffer: a checkpoint goes on with its planes. The last column is their distance from the origin.
        self.register_buffer("planes", torch.randn(self.bits, shape.head_dim + 1, generator=generator))

    @classmethod
    def full_budget(cls, length: int, head_dim: int) -> dict[str, Any]:
        return {"keep": 1.0}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> tuple[Tensor, Tensor | None]:
        mask, scale, dropout_p, _ = request
        if mask.query_keep is not None:  # whatever stands there must not reach a mean, not even as 0 · NaN
            query = query.masked_fill(~mask.query_keep[:, None, :, None], 0.0)
        cluster = self._clusters(query, mask)  # (b, h, n_q)
        query, key, value = in_autocast_type(query * scale, key, value)
        centres = self._means(query, cluster, mask)  # (b, h, C, d)

        keep = None if mask.key_keep is None else mask.key_keep[:, None, None, :]
        scores = at_least_float32(centres @ key.transpose(-2, -1))  # (b, h, C, n_k)
        top, is_open = self._top(scores, keep)  # (b, h, C, k)
        weights = masked_softmax(scores, keep)
        largest = weights.gather(-1, top)  # (b, h, C, k)
        mass = largest.masked_fill(~is_open, 0.0).sum(dim=-1, keepdim=True)  # (b, h, C, 1)
        # Not by a scattered bool mask, which inductor (torch 2.13, CPU) compiles wrongly where there are gradients.
        weights = weights.scatter(-1, top, largest.masked_fill(is_open, 0.0))
        rest = apply_dropout(weights, dropout_p).to(value.dtype) @ value  # (b, h, C, d_v)

        block, one = cluster[..., None], torch.ones_like(cluster[..., None], dtype=torch.bool)
        near = routed_attention(query, take(key, top), take(value, top), is_open, block, one, dropout_p=dropout_p)
        of_cluster = torch.cat([at_least_float32(rest), mass], dim=-1)
        rest, mass = of_cluster.gather(2, block.expand(*block.shape[:3], of_cluster.shape[-1])).split(
            [self.value_dim, 1], dim=-1
        )
        return mass * near + rest, None

    @torch.no_grad()
    @torch.compiler.disable
    def _clusters(self, query: Tensor, mask: AttentionMask) -> Tensor:
        """(b, h, n_q) int64: the cluster of each query, 0..C-1 with C = min(num_clusters, n_q)."""
        n_q = query.shape[-2]
        count, real = min(self.num_clusters, n_q), mask.real_queries(n_q)
        with torch.autocast(query.device.type, enabled=False):
            query = at_least_float32(query)
            planes = self.planes.to(query.dtype)
            signs = (query @ planes[:, :-1].T + planes[:, -1] > 0).to(query.dtype) * 2 - 1  # (b, h, n_q, bits)
            start = first_kept(real, n_q, count, query.device)  # (b | 1, C)
            centres = signs.gather(2, start[:, None, :, None].expand(*signs.shape[:2], -1, signs.shape[-1]))
            kept = torch.ones_like(signs[:1, :1, :, 0]) if real is None else real[:, None].to(signs.dtype)
            missing = torch.arange(count, device=query.device) >= kept.sum(dim=-1, keepdim=True)  # (b | 1, 1, C)
            cluster = torch.empty(0)
            for _ in range(self.iterations):
                agreement = signs @ centres.transpose(-2, -1)  # (b, h, n_q, C): bits less twice the distance
                before, cluster = cluster, agreement.masked_fill_(missing[:, :, None], float("-inf")).argmax(dim=-1)
                if torch.equal(before, cluster):
                    break
                votes = add_rows(signs * kept[..., None], cluster, count)  # (b, h, C, bits)
                size = add_rows(kept[..., None].expand(*cluster.shape, 1), cluster, count)
                centres = torch.where(size == 0, centres, (votes > 0).to(votes.dtype) * 2 - 1)
        return cluster

    def _means(self, query: Tensor, cluster: Tensor, mask: AttentionMask) -> Tensor:
        """(b, h, C, d): the mean of the real queries of each cluster, zero where there are none."""
        real, count = mask.real_queries(query.shape[-2]), min(self.num_clusters, query.shape[-2])
        x = at_least_float32(query)
        kept = torch.ones_like(x[:1, :1, :, :1]) if real is None else real[:, None, :, None].to(x.dtype)
        size = add_rows(kept.expand(*cluster.shape, 1), cluster, count)
        return (add_rows(x.masked_fill(kept == 0, 0.0), cluster, count) / size.clamp(min=1)).to(query.dtype)

    @torch.no_grad()
    def _top(self, scores: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """The keys of the largest scores (b, h, C, n_k) of each cluster, (b, h, C, k), and which of them count."""
        n_k = scores.shape[-1]
        usable = torch.full((1, 1, 1, 1), n_k, device=scores.device)
        if keep is not None:
            scores, usable = scores.masked_fill(~keep, float("-inf")), keep.sum(dim=-1, keepdim=True)
        top = scores.topk(resolve_count(self.keep, n_k), dim=-1).indices
        count = torch.minimum(keys_per_query(self.keep, usable), usable)
        return top, (torch.arange(top.shape[-1], device=top.device) < count).expand(top.shape)

    def cost(self, query_length: int, key_length: int | None = None, *, causal: bool | None = None) -> Cost:
        """With all iterations; rows that fill up the last tile of a cluster, at most 63, are left out."""
        n_q, n_k, pairs, _ = self._pairs(query_length, key_length, causal)
        h, d, d_v, count, k = self.num_heads, self.head_dim, self.value_dim, min(self.num_clusters, n_q), self.keep
        exact, kept = kept_pairs(k, n_q, n_k, False), resolve_count(k, n_k)
        clustering = n_q * self.bits * (d + self.iterations * count)
        return Cost(
            exact_pairs=h * exact,
            total_pairs=h * pairs,
            score_multiply_adds=h * (clustering + (count * n_k + exact) * d),
            value_multiply_adds=h * (count * n_k + exact + n_q) * d_v,
            state=self.planes.numel()
            + h * (n_q * (count + self.bits + d_v) + count * (3 * n_k + d + d_v + kept * (d + d_v))),
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, keep={self.keep}, num_clusters={self.num_clusters}"


def add_rows(x: Tensor, index: Tensor, count: int) -> Tensor:
    """(b, h, n, d) and (b, h, n) in 0..count-1 -> (b, h, count, d): the sum of the rows with each number."""
    sums = x.new_zeros(*x.shape[:2], count, x.shape[-1])
    return sums.scatter_add(2, index[..., None].expand(x.shape), x)


def take(x: Tensor, index: Tensor) -> Tensor:
    """(b, h, n, d) and (b, h, c, k) -> (b, h, c, k, d)."""
    rows = index.flatten(2)[..., None].expand(*x.shape[:2], -1, x.shape[-1])
    return x.gather(2, rows).unflatten(2, index.shape[2:])
