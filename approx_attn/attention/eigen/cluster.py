"""Exact scores for the clusters of keys that matter to a query, low-rank moments for all others (`eigen_cluster`)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from approx_attn.attention.base import Capabilities, Cost, Request
from approx_attn.attention.budget import require_budget
from approx_attn.attention.eigen.cluster_cache import ClusterCache, HasClusters
from approx_attn.attention.eigen.kernels import native
from approx_attn.attention.eigen.kernels.cluster import (
    cluster_attention,
    multiplies_bfloat16,
    preparation,
    products,
    unpadded_plan,
    work,
)
from approx_attn.attention.eigen.kernels.cluster_torch import Inputs, Layout
from approx_attn.attention.mask import at_least_float32
from approx_attn.attention.registry import register_attention
from approx_attn.attention.shape import AttentionShape
from approx_attn.errors import require_count, require_one_of

ORDERS = (0, 1, 2)
RESTS = ("keep", "drop")


@register_attention("eigen_cluster")
class EigenClusterAttention(HasClusters):
    """Every query scores the keys of a few clusters exactly and sees all other keys through the moments of theirs.

    Keys stand in runs of `block_size` positions. Every run is halved at the median of the first coordinate of the
    content basis, z_j = k_j·B, its halves at the median of the second, and so on, until clusters of `cluster_size` keys
    of like content are left. With N, k̄ and v̄ the number and means of a cluster's keys, z̃ their coordinates about the
    mean, Σ = mean z̃ᵀz̃, M = mean z̃ᵀv and a = s·q·A the coordinates of a query, a cluster enters the softmax with

        logit s·q·k̄ + log N + g,    value v̄ + a·M        g = min(½ a Σ aᵀ, 2) from order 1 on, M at order 2 only

    which is the expansion of Σ_j exp(s·q·k_j)·v_j about its mean key to the cumulants of a Gaussian, the deviations
    seen in r dimensions. A query's own clusters, those of the highest logit + √(a Σ aᵀ) (the mean and the spread of its
    scores there: what the moments miss grows with both), enter key by key with their exact scores instead.

    Under a causal mask or a window, clusters are used of runs that every query of a block of `block_size` positions may
    see whole; keys of the runs at the edges enter exactly. Cuts depend on the keys of a run alone, so no output depends
    on a later input, and decoding equals one pass. Gradient flows through scores, moments and, from order 1 on, both
    maps of the basis, not through cuts and choices.

    With a cap c on scores (`mask.softcap`), c·tanh(s·q·k̄/c) takes the place of s·q·k̄ and a is multiplied by the slope
    1 − tanh²(s·q·k̄/c); such scores are computed by PyTorch's operators alone, in float32.

    The mean key needs no basis, since its score costs 1/L of the exact ones: the basis explains deviations within a
    cluster and finds clusters of little deviation.

    Args:
        keep: exact keys of each query: a fraction of those it may use, or a number, rounded up to clusters. Keys at
            the edges of a causal mask or window count in it; where they alone are more, they are all. 1.0 is exact
            attention. A number keeps the exact work of a query the same at any length.
        cluster_size: keys per cluster; block_size over a power of two. Work on clusters is n²/cluster_size.
        block_size: keys per run, and positions per query block.
        order: terms of the expansion: 0, 1 or 2.
        rest: what the keys of other clusters get. `keep`: the estimate of their cluster. `drop`: nothing, with the same
            choice; the basis then gets no gradient and stays as it starts.
        rank: r, clamped to head_dim.
        share: basis per `head`, per `layer`, or one for the `model`.
        basis_init: `random`, or `calibrated` (to be filled before use; implied by `basis`).
        basis: file written by `approx_attn.calibrate` to start from, or None.
        train_basis: whether A and B learn (at order 0 A is not used and B only cuts).
        seed: of the random start; None follows the seed of the run.
    """

    capabilities = Capabilities(
        arbitrary_mask=False,
        needs_calibration=True,
        window=True,
        has_parameters=True,
        grouped_query=True,
        softcap=True,
        sinks=True,
    )
    cost_formula = "n·t·d + (n²/L)·(d + r²/2 + d_v)"

    def __init__(
        self,
        shape: AttentionShape,
        *,
        keep: float | int = 0.125,
        cluster_size: int = 8,
        block_size: int = 64,
        order: int = 1,
        rest: str = "keep",
        rank: int = 8,
        share: str = "head",
        basis_init: str = "random",
        basis: str | None = None,
        train_basis: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__(shape)
        self.keep = require_budget("attention.keep", keep)
        self.block_size = require_count("attention.block_size", block_size)
        self.cluster_size = require_count("attention.cluster_size", cluster_size)
        halves, remainder = divmod(self.block_size, self.cluster_size)
        if remainder or halves & (halves - 1):
            raise ValueError(
                f"attention.cluster_size must be attention.block_size={block_size} or a half, quarter, eighth ... "
                f"of it, got {cluster_size}."
            )
        if isinstance(order, bool) or order not in ORDERS:
            raise ValueError(f"attention.order must be one of {', '.join(map(str, ORDERS))}, got {order!r}.")
        self.order = order
        self.rest = require_one_of("attention.rest", rest, RESTS)
        learns = train_basis and order > 0 and rest == "keep"
        self._start_basis(rank, share, basis_init, basis, learns, seed)

    @classmethod
    def full_budget(cls, length: int, head_dim: int) -> dict[str, Any]:
        return {"keep": 1.0, "cluster_size": 2, "block_size": 4}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> tuple[Tensor, Tensor | None]:
        mask, scale, dropout_p, need_weights = request
        # Exponentials of sums over clusters: float32, also under autocast; products alone may be of bfloat16.
        with torch.autocast(query.device.type, enabled=False):
            types = {x.dtype for x in (query, key, value)}
            narrow = len(types) == 1 and not need_weights and mask.softcap is None
            narrow = narrow and multiplies_bfloat16(key, self.cluster_size)
            if not narrow:
                key, value = at_least_float32(key), at_least_float32(value)
            if not narrow or math.frexp(scale)[0] != 0.5:  # a power of two rounds nothing
                query = at_least_float32(query)
            query = query * scale
            if mask.query_keep is not None:  # whatever stands in the padding, even NaN
                query = query.masked_fill(~mask.query_keep[:, None, :, None], 0.0)
            self.basis.require_ready()
            expand = (self.num_heads, -1, -1)
            dtype = torch.promote_types(query.dtype, torch.float32)
            query_map = self.basis.query_map.to(dtype).expand(expand)
            key_map = self.basis.key_map.to(dtype).expand(expand)
            inputs = Inputs(query, key, value, query_map, key_map, mask.key_keep, mask.softcap, mask.sinks)
            layout = self._layout(query.shape[-2], key.shape[-2], mask.causal, mask.query_offset, mask.window)
            return cluster_attention(inputs, self.keep, layout, dropout_p, need_weights)

    def start_cache(self) -> ClusterCache | None:
        return ClusterCache(self) if self.rest == "keep" else None

    def runs_compiled(self, device: torch.device, dtype: torch.dtype) -> bool:
        # Narrower types are multiplied as they are or computed in float32.
        return device.type == "cpu" and dtype != torch.float64 and native.is_available()

    def _layout(self, n_q: int, n_k: int, causal: bool, offset: int, window: int | None) -> Layout:
        if not causal and window is None:
            offset = 0  # positions do not matter then
        cut = self.block_size, self.cluster_size, self.order
        return Layout(n_q, n_k, causal, offset, window or 0, *cut, drops_rest=self.rest == "drop")

    def cost(self, query_length: int, key_length: int | None = None, *, causal: bool | None = None) -> Cost:
        n_q, n_k, pairs, causal = self._pairs(query_length, key_length, causal)
        return self._cost(self._layout(n_q, n_k, causal, n_k - n_q, None), pairs, new=n_k)

    def decoding_cost(self, key_length: int) -> Cost:
        if self.rest == "drop":  # nothing is kept
            return super().decoding_cost(key_length)
        return self._cost(self._layout(1, key_length, True, key_length - 1, None), key_length, new=1)

    def _cost(self, layout: Layout, pairs: int, new: int) -> Cost:
        """Cost where `new` of the keys are to be cut into clusters."""
        plan = unpadded_plan(layout, self.keep)
        done = work(layout, plan)
        h, d, d_v, r = self.num_heads, self.head_dim, self.value_dim, self.basis.rank
        of_pair, of_cluster = products(d, d_v, r, self.order, layout.drops_rest)
        (pair_scores, pair_values), (cluster_scores, cluster_values) = of_pair, of_cluster
        pairs_computed = done.near + done.own
        clusters = -(-layout.n_k // self.block_size) * (self.block_size // self.cluster_size)
        moments = sum(products(d, d_v, r, self.order)[1]) + 1  # numbers per cluster, made whether they enter or not
        before = preparation(layout._replace(n_k=new), d, d_v, r)
        block = self.block_size * (clusters + self.block_size + max(row[4] for row in plan) * self.cluster_size)
        return Cost(
            exact_pairs=h * min(done.exact, pairs),
            total_pairs=h * pairs,
            score_multiply_adds=h * (pairs_computed * pair_scores + done.clusters * cluster_scores + before),
            value_multiply_adds=h * (pairs_computed * pair_values + done.clusters * cluster_values),
            state=sum(x.numel() for x in self.parameters()) + h * (clusters * moments + layout.n_k) + block,
            computed_pairs=h * pairs_computed,
        )
