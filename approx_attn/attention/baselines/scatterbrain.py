"""Exact attention to near keys and random features for all others, under one normaliser.

Chen, Dao, Winsor, Song, Rudra, Ré: *Scatterbrain: Unifying Sparse and Low-rank Attention Approximation*,
arXiv 2110.15343.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from approx_attn.attention.base import AttentionMechanism, Capabilities, Cost, Request, apply_dropout
from approx_attn.attention.baselines.linear import divide_or_zero, log_products
from approx_attn.attention.baselines.performer import log_positive_features, random_directions
from approx_attn.attention.layouts.band import MIN_BLOCK, Band, allowed_in_blocks
from approx_attn.attention.layouts.window import Window
from approx_attn.attention.mask import AttentionMask, at_least_float32, masked_softmax
from approx_attn.attention.registry import register_attention
from approx_attn.attention.shape import AttentionShape
from approx_attn.errors import require_count


@register_attention("scatterbrain")
class ScatterbrainAttention(AttentionMechanism):
    """Weights exp(s·q·k) on a sparse set of pairs, φ(q)·φ(k) on the rest, normalised together.

    The paper adds the feature estimate of all pairs and subtracts it again on the sparse set; here the sums
    of features simply leave that set out, which is the same without the cancellation. The sparse set is a
    window around each query (the paper's is found by hashing); φ are the positive orthogonal random features
    of `performer`. Dropout drops a key for all queries of a head at once, since far weights do not exist.

    Args:
        keep: width of the exact window, as in `sliding_window`: fraction of the pairs, or keys per query.
        window: half-width of the window in place of `keep`.
        num_features: m; head_dim·ln(head_dim), rounded up, if None.
        seed: of the features' directions; each layer draws its own.
    """

    capabilities = Capabilities(arbitrary_mask=False)
    cost_formula = "n·(3w·(d + m) + m·d)"
    projection: Tensor

    def __init__(
        self,
        shape: AttentionShape,
        *,
        keep: float | int = 0.25,
        window: int | None = None,
        num_features: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        self.window = Window(keep, window)
        default = max(1, math.ceil(shape.head_dim * math.log(shape.head_dim)))
        self.num_features = require_count("attention.num_features", default if num_features is None else num_features)
        generator = torch.Generator().manual_seed(require_count("attention.seed", seed, 0))
        for _ in range(shape.layer_index + 1):
            directions = random_directions(self.num_features, shape.head_dim, True, generator)
        self.register_buffer("projection", directions)  # (m, d)

    @classmethod
    def full_budget(cls, length: int, head_dim: int) -> dict[str, float]:
        return {"keep": 1.0}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> tuple[Tensor, Tensor | None]:
        mask, scale, dropout_p, need_weights = request
        band = self._band(query.shape[-2], key.shape[-2], mask.causal, mask.query_offset)
        with torch.autocast(query.device.type, enabled=False):  # sums of many small weights need float32
            query, key, value = at_least_float32(query), at_least_float32(key), at_least_float32(value)
            root = math.sqrt(abs(scale))
            log_query = log_positive_features(query, self.projection, math.copysign(root, scale))
            log_query = log_query - math.log(self.num_features)
            log_key = log_positive_features(key, self.projection, root)  # (b, h, n_k, m)
            kept = apply_dropout(torch.ones_like(value[..., :1]), dropout_p)  # (b, h, n_k, 1)
            if need_weights:
                weights = self._dense_weights(scale * query @ key.transpose(-2, -1), log_query, log_key, mask, band)
                weights = weights * kept.transpose(-2, -1)
                return weights @ value, weights
            columns = torch.cat([value * kept, torch.ones_like(kept)], dim=-1)  # (b, h, n_k, d_v + 1)

            queries = band.query_blocks(log_query)  # (b, h, n_blocks, block, m)
            near = self._near_logs(scale * query, key, queries, log_key, mask, band)
            far, states = self._far_logs(queries, log_key, columns, mask, band)
            top = torch.cat([near, far], dim=-1).detach().amax(dim=-1, keepdim=True)
            totals = (far - top).exp() @ states + (near - top).exp() @ band.key_blocks(columns)
            closed = top <= lowest(top) / 2  # a query that sees no key
            totals = band.merge_queries(totals.masked_fill(closed, 0.0))  # (b, h, n_q, d_v + 1)
            return divide_or_zero(totals[..., :-1], totals[..., -1:]), None

    def _band(self, n_q: int, n_k: int, causal: bool, query_offset: int) -> Band:
        """The window in whole blocks, so that the keys outside the slice of a block are whole blocks too."""
        before, after = self.window.widest(n_k, causal)
        tight = Band.around(n_q, n_k, before, after, query_offset=query_offset)
        block = max(MIN_BLOCK, (tight.before + tight.after) // 2)
        before, after = (-(-width // block) * block for width in (tight.before, tight.after))
        return Band(n_q, n_k, before, after, block, query_offset)

    def _near_logs(
        self, query: Tensor, key: Tensor, log_queries: Tensor, log_key: Tensor, mask: AttentionMask, band: Band
    ) -> Tensor:
        """Logarithms of the weights in the slice of each block: exact in the window, by features beside it."""
        exact = band.query_blocks(query) @ band.key_blocks(key).transpose(-2, -1)  # (b, h, n_blocks, block, span)
        estimate = log_products(log_queries, band.key_blocks(log_key))
        logs = torch.where(self.window.allowed(band, mask, query.device), exact, estimate)
        positions = band.key_positions(query.device)  # (n_blocks, span)
        inside = (positions >= 0) & (positions < band.n_k)
        return logs.masked_fill(~(allowed_in_blocks(band, mask, positions) & inside[:, None, :]), lowest(logs))

    def _far_logs(
        self, log_queries: Tensor, log_key: Tensor, columns: Tensor, mask: AttentionMask, band: Band
    ) -> tuple[Tensor, Tensor]:
        """Queries' features times what they cancel, (b, h, n_blocks, block, f), and the sums over the keys
        outside each slice that they weigh, (b, h, n_blocks, f, d_v + 1); f = m, or 2m with keys after it."""
        if mask.key_keep is not None:
            log_key = log_key.masked_fill(~mask.key_keep[:, None, :, None], lowest(log_key))
        # Segments of `block` keys, on the grid of the query blocks; the first one holds position 0.
        first, lead = divmod(-band.query_offset, band.block)
        tail = -(band.n_k + lead) % band.block
        keys = F.pad(log_key, (0, 0, lead, tail), value=lowest(log_key)).unflatten(-2, (-1, band.block))
        values = F.pad(columns, (0, 0, lead, tail)).unflatten(-2, (-1, band.block))
        n_segments = keys.shape[2]
        blocks = torch.arange(band.n_blocks, device=keys.device) - first  # segment of each query block
        before = (blocks - band.before // band.block).clamp(0, n_segments)  # segments before the slice
        tops, sums = scan(keys, values)
        tops, sums = tops[:, :, before], sums[:, :, before]
        logs = log_queries + tops
        if not mask.causal:
            after = (n_segments - blocks - 1 - band.after // band.block).clamp(0, n_segments)
            tops_after, sums_after = scan(keys.flip(2), values.flip(2))
            logs = torch.cat([logs, log_queries + tops_after[:, :, after]], dim=-1)
            sums = torch.cat([sums, sums_after[:, :, after]], dim=-2)
        return logs, sums

    def _dense_weights(
        self, scores: Tensor, log_query: Tensor, log_key: Tensor, mask: AttentionMask, band: Band
    ) -> Tensor:
        """The (b, h, n_q, n_k) weights, for looking at them."""
        window = self.window.allowed(band, mask, scores.device)
        window = band.dense(window.to(scores.dtype)) > 0  # (b | 1, 1, n_q, n_k)
        logs = torch.where(window, scores, log_products(log_query, log_key))
        keep = mask.dense_keep(band.n_q, band.n_k, logs.device)
        return masked_softmax(logs, keep)

    def cost(self, query_length: int, key_length: int | None = None, *, causal: bool | None = None) -> Cost:
        n_q, n_k, pairs, causal = self._pairs(query_length, key_length, causal)
        offset = n_k - n_q if causal else 0
        band = self._band(n_q, n_k, causal, offset)
        m, d, columns, sides = self.num_features, self.head_dim, self.value_dim + 1, 1 if causal else 2
        rows = band.n_blocks * band.block
        segments = -(-(n_k + -offset % band.block) // band.block)
        return Cost(
            exact_pairs=self.num_heads * self.window.pairs(n_q, n_k, causal, offset),
            total_pairs=self.num_heads * pairs,
            score_multiply_adds=self.num_heads * ((n_q + n_k) * m * d + rows * band.span * (d + m)),
            value_multiply_adds=self.num_heads
            * (sides * m * (segments * band.block + rows) + rows * band.span)
            * columns,
            state=m * d
            + self.num_heads
            * (
                2 * rows * band.span
                + band.n_blocks * band.span * (d + m + columns)  # the slices beside each block of queries
                + (n_q + n_k + sides * rows) * m
                + sides * (segments + band.n_blocks) * m * columns
            ),
            computed_pairs=self.num_heads * rows * band.span,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.window}, num_features={self.num_features}"


def lowest(x: Tensor) -> float:
    """Logarithm of the weight of a closed pair: finite, and far enough from the end that sums stay finite."""
    return torch.finfo(x.dtype).min / 4


def scan(log_keys: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Running sums of features over segments, in order, each divided by the largest feature so far.

    The maximum over the segments so far only, so that under a causal mask nothing reads a later key.

    Args:
        log_keys: (b, h, S, block, m) logarithms of features, `lowest` where closed.
        columns: (b, h, S, block, c).

    Returns:
        tops: (b, h, S + 1, 1, m), largest logarithm over the first 0, ..., S segments.
        sums: (b, h, S + 1, m, c), Σ_j exp(log_key_jf - top_f)·columns_j over them.
    """
    empty = log_keys.new_full((*log_keys.shape[:2], 1, 1, log_keys.shape[-1]), lowest(log_keys))
    own = torch.cat([empty, log_keys.detach().amax(dim=-2, keepdim=True)], dim=2)
    tops = own.cummax(dim=2).values  # (b, h, S + 1, 1, m)
    features = (log_keys - tops[:, :, 1:]).exp().masked_fill(log_keys <= lowest(log_keys), 0.0)
    segments = features.transpose(-2, -1) @ columns  # (b, h, S, m, c)
    fading = (tops[:, :, :-1] - tops[:, :, 1:]).exp().transpose(-2, -1)  # (b, h, S, m, 1)
    sums = [torch.zeros_like(segments[:, :, 0])]
    for segment, fade in zip(segments.unbind(2), fading.unbind(2), strict=True):
        sums.append(sums[-1] * fade + segment)
    return tops, torch.stack(sums, dim=2)
