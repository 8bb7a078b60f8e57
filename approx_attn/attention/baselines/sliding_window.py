"""Attention to near keys, a few global tokens and random blocks, computed in blocks without n×n work.

Window and global tokens: Beltagy, Peters, Cohan: *Longformer: The Long-Document Transformer*, arXiv 2004.05150.
With random blocks: Zaheer et al.: *Big Bird: Transformers for Longer Sequences*, arXiv 2007.14062.
With attention sinks: Xiao, Tian, Chen, Han, Lewis: *Efficient Streaming Language Models with Attention Sinks*, arXiv
2309.17453.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from approx_attn.attention.base import AttentionMechanism, Capabilities, Cost, Request, apply_dropout
from approx_attn.attention.exact import exact_attention_with_weights
from approx_attn.attention.layouts.band import Band
from approx_attn.attention.layouts.random_blocks import RandomBlocks, allowed_at, gather_pairs
from approx_attn.attention.layouts.window import Window
from approx_attn.attention.mask import AttentionMask, at_least_float32, masked_softmax, query_chunks
from approx_attn.attention.registry import register_attention
from approx_attn.attention.shape import AttentionShape
from approx_attn.errors import require_count

SEGMENTS, LEAST_SEGMENT = 4, 256
"""Parts into which queries are cut where the window grows with the position, each as wide as its last query's, and
the fewest queries in one. With 4 parts the work is 2 times the pairs in use, with one 3; shorter parts cost more in
calls than they save."""


@register_attention("sliding_window")
class SlidingWindowAttention(AttentionMechanism):
    """Query i attends to the keys within a window around its position, to global tokens, and to random blocks.

    A global token is seen by every query and, unless the attention is causal, sees every key. Causal ones are therefore
    attention sinks, of which the paper keeps 4 beside the window; its renumbering of positions, which is for text
    beyond the trained length, is not done here. A window of the mask, a model's own, closes them too; a cache that
    forgets what is outside of it leaves the first of the remaining keys as global, so do without in such a model.

    A query far from every key (queries outnumber keys) gets zeros. With padding on the left the first real tokens are
    global, but random blocks lie elsewhere than without.

    Args:
        keep: width of the window. A fraction means the widest window that holds at most this fraction of the pairs
            that exact attention would use; under a causal mask the window then grows with the position, so
            that a token's result does not depend on what follows. A whole number means keys per query:
            half of them on either side, or all before it under a causal mask.
        window: half-width w of the window in place of `keep`: keys at most w positions away.
        global_tokens: number of leading tokens that are global, padding left out. They come on top of the window.
        random_blocks: number of random blocks of keys for each block of queries and head, on top of both.
        block_size: tokens in a random block.
        seed: of the random blocks; each layer draws its own.
    """

    capabilities = Capabilities(window=True, softcap=True, sinks=True)
    cost_formula = "n·(3w + g + r·b)·d"

    def __init__(
        self,
        shape: AttentionShape,
        *,
        keep: float | int = 0.25,
        window: int | None = None,
        global_tokens: int = 0,
        random_blocks: int = 0,
        block_size: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        self.window = Window(keep, window)
        self.global_tokens = require_count("attention.global_tokens", global_tokens, 0)
        own_seed = require_count("attention.seed", seed, 0) + 65_537 * shape.layer_index
        self.random = RandomBlocks(random_blocks, block_size, own_seed)

    @classmethod
    def full_budget(cls, length: int, head_dim: int) -> dict[str, float]:
        return {"keep": 1.0}

    # -- forward -------------------------------------------------------------------------------------------

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> tuple[Tensor, Tensor | None]:
        mask, scale, dropout_p, need_weights = request
        n_q, n_k = query.shape[-2], key.shape[-2]
        band = self.window.band(n_q, n_k, mask.causal, mask.query_offset, limit=mask.window)
        if need_weights or self.random.count > 0:
            output, weights = self._by_parts(query, key, value, request, band)
        else:
            output, weights = self._in_segments(query, key, value, request), None
        rows = self._global_queries(band.n_q, mask.causal, mask.query_offset)
        if rows > 0:
            index = first_kept(mask.real_queries(band.n_q), band.n_q, rows, query.device)
            pair_keep = take_queries(mask.pair_keep, index)
            if mask.window is not None:
                near = near_rows(index + mask.query_offset, n_k, mask.window)
                pair_keep = near if pair_keep is None else pair_keep & near
            part = AttentionMask(
                key_keep=mask.key_keep,
                pair_keep=pair_keep,
                bias=take_queries(mask.bias, index),
                softcap=mask.softcap,
                sinks=mask.sinks,
            )
            top, top_weights = exact_attention_with_weights(take(query, index), key, value, part, scale, dropout_p)
            output = put(output, index, top)
            weights = None if weights is None else put(weights, index, top_weights)
        return output, weights

    def _in_segments(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> Tensor:
        mask, outputs = request.mask, []
        for start, stop, seen in self._segments(query.shape[-2], key.shape[-2], mask.causal, mask.query_offset):
            part = mask.queries(start, stop).keys(0, seen)
            band = self.window.band(stop - start, seen, mask.causal, part.query_offset, limit=mask.window)
            inputs = (query[:, :, start:stop], key[:, :, :seen], value[:, :, :seen])
            if mask.softcap is None and mask.sinks is None:
                outputs.append(self._fused(*inputs, request._replace(mask=part), band))
            else:  # which the fused kernel does not know
                outputs.append(self._by_parts(*inputs, request._replace(mask=part), band)[0])
        return torch.cat(outputs, dim=-2)

    def _segments(self, n_q: int, n_k: int, causal: bool, offset: int) -> list[tuple[int, int, int]]:
        """(start, stop, keys): runs of queries that are laid out in a band of their own, over the first keys."""
        if not (causal and self.window.half_width is None and isinstance(self.window.budget, float)):
            return [(0, n_q, n_k)]
        return query_chunks(n_q, n_k, max(LEAST_SEGMENT, -(-n_q // SEGMENTS)), causal, offset)

    def _fused(self, query: Tensor, key: Tensor, value: Tensor, request: Request, band: Band) -> Tensor:
        """Window and global tokens by PyTorch's fused kernel, with blocks in place of heads: (b·h, n_blocks, ...)."""
        mask, scale, dropout_p, _ = request
        n_global = min(self.global_tokens, band.n_k)
        pairs = [self._near_pairs(band, mask, query.device)]
        keys, values = band.key_blocks(key), band.key_blocks(value)  # (b, h, n_blocks, span, d)
        if n_global > 0:
            index = first_kept(mask.key_keep, band.n_k, n_global, query.device)  # (b | 1, g)
            pairs.append(self._global_pairs(band, mask, index))
            everywhere = (key.shape[0], self.num_heads, band.n_blocks, n_global, -1)
            keys = torch.cat([keys, take(key, index)[:, :, None].expand(everywhere)], dim=-2)
            values = torch.cat([values, take(value, index)[:, :, None].expand(everywhere)], dim=-2)
        keep = side_by_side([keep for _, keep in pairs])
        bias = None if pairs[0][0] is None else side_by_side([bias for bias, _ in pairs if bias is not None])
        # The lowest finite number, not minus infinity: a query without keys stays finite, and is cleared below.
        additive = torch.zeros((), dtype=query.dtype, device=query.device) if bias is None else bias.to(query.dtype)
        additive = additive.masked_fill(~keep, torch.finfo(query.dtype).min)  # (b | 1, h | 1, n_blocks, block, keys)
        if additive.shape[:2] == (1, 1):
            additive = additive[0]  # the same for all samples and heads
        else:
            additive = additive.expand(*query.shape[:2], *additive.shape[2:]).flatten(0, 1)
        output = F.scaled_dot_product_attention(
            band.query_blocks(query).flatten(0, 1),
            keys.flatten(0, 1),
            values.flatten(0, 1),
            attn_mask=additive,
            dropout_p=dropout_p,
            scale=scale,
        ).unflatten(0, query.shape[:2])
        return band.merge_queries(output.masked_fill(~keep.any(dim=-1, keepdim=True), 0.0))

    def _by_parts(
        self, query: Tensor, key: Tensor, value: Tensor, request: Request, band: Band
    ) -> tuple[Tensor, Tensor | None]:
        """Window, global tokens and random blocks, each in its own layout, under one softmax."""
        mask, scale, dropout_p, need_weights = request
        n_q, n_k, offset, n_global = band.n_q, band.n_k, band.query_offset, min(self.global_tokens, band.n_k)
        query = query * scale  # first: in 16 bits a product may overflow where its score does not
        queries = band.query_blocks(query)  # (b, h, n_blocks, block, d)
        near = queries @ band.key_blocks(key).transpose(-2, -1)  # (b, h, n_blocks, block, span)
        index_global = first_kept(mask.key_keep, n_k, n_global, query.device)  # (b | 1, g)
        wide = queries @ take(key, index_global)[:, :, None].transpose(-2, -1)  # (b, h, n_blocks, block, g)
        scores, widths = [near, wide], [band.span, n_global]
        pairs = [self._near_pairs(band, mask, query.device), self._global_pairs(band, mask, index_global)]
        if self.random.count > 0:
            index, is_open = self.random.choose(self.num_heads, n_q, n_k, mask, query.device)
            chosen = self.random.query_blocks(query, offset) @ self.random.take(key, index).transpose(-2, -1)
            chosen = self.random.merge_queries(chosen, n_q, offset)  # (b, h, n_q, e)
            scores.append(band.query_blocks(chosen))
            pairs.append(self._random_pairs(band, mask, index, is_open))
            widths.append(self.random.width)
        weights = self._weights(scores, pairs, mask)  # (b, h, n_blocks, block, span + g + e)
        parts = apply_dropout(weights, dropout_p).to(value.dtype).split(widths, dim=-1)
        everywhere = take(value, index_global)[:, :, None]  # (b, h, 1, g, d_v)
        output = band.merge_queries(parts[0] @ band.key_blocks(value) + parts[1] @ everywhere)
        if self.random.count > 0:
            chosen = self.random.query_blocks(band.merge_queries(parts[2]), offset)
            output = output + self.random.merge_queries(chosen @ self.random.take(value, index), n_q, offset)
        if not need_weights:
            return output, None

        dense = band.dense(parts[0])  # (b, h, n_q, n_k)
        wide = band.merge_queries(parts[1])  # (b, h, n_q, g)
        dense = dense.scatter_add(-1, index_global[:, None, None].expand(wide.shape), wide)
        if self.random.count > 0:
            positions = self.random.positions(index, n_q, offset).clamp(max=n_k - 1)
            chosen = band.merge_queries(parts[2])
            dense = dense.scatter_add(-1, positions.expand(chosen.shape), chosen)
        return output, dense

    @staticmethod
    def _weights(scores: list[Tensor], pairs: list[tuple[Tensor | None, Tensor]], mask: AttentionMask) -> Tensor:
        """One softmax over all kinds of keys; `pairs` are (bias or None, keep) that broadcast to `scores`."""
        logits, keeps = [], []
        for products, (bias, keep) in zip(scores, pairs, strict=True):
            products = mask.capped(at_least_float32(products))
            logits.append(products if bias is None else products + bias)
            keeps.append(keep.expand(products.shape))
        return masked_softmax(torch.cat(logits, dim=-1), torch.cat(keeps, dim=-1), mask.sinks)

    # -- which pairs are used: (bias or None, keep), in the layout of the band. No pair counts twice. --------

    def _near_pairs(self, band: Band, mask: AttentionMask, device: torch.device) -> tuple[Tensor | None, Tensor]:
        """(b | 1, h | 1, n_blocks, block, span): keys in the window that are not global."""
        keep = self.window.allowed(band, mask, device)
        if self.global_tokens > 0:
            positions = band.key_positions(device).clamp(0, band.n_k - 1)  # (n_blocks, span)
            keep = keep & ~self._is_global(mask, band.n_k, device)[:, positions][:, None, :, None]
        return band.bias(mask), keep

    def _global_pairs(self, band: Band, mask: AttentionMask, index: Tensor) -> tuple[Tensor | None, Tensor]:
        """(b | 1, h | 1, n_blocks, block, g): global keys, at the positions (b | 1, g)."""
        positions = index[:, None, None].expand(-1, -1, band.n_q, -1)  # (b | 1, 1, n_q, g)
        bias = mask.finite_bias()
        if bias is not None:
            bias = band.query_blocks(gather_pairs(bias, positions))
        return bias, band.query_blocks(allowed_at(mask, positions, band.n_k))

    def _is_global(self, mask: AttentionMask, n_k: int, device: torch.device) -> Tensor:
        """(b | 1, n_k) bool: the first keys that are not padded."""
        if mask.key_keep is None:
            return torch.arange(n_k, device=device)[None] < self.global_tokens
        return mask.key_keep & (mask.key_keep.cumsum(dim=-1) <= self.global_tokens)

    def _random_pairs(
        self, band: Band, mask: AttentionMask, index: Tensor, is_open: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """(b | 1, h, n_blocks, block, e): keys of random blocks that are neither in the window nor global."""
        positions = self.random.positions(index, band.n_q, band.query_offset)  # (b | 1, h, n_q, e)
        is_global = self._is_global(mask, band.n_k, index.device)[:, None, None]  # (b | 1, 1, 1, n_k)
        keep = self.random.allowed(positions, is_open, band.n_k, mask) & ~gather_pairs(is_global, positions)
        queries = mask.query_positions(band.n_q, index.device)  # (n_q,)
        before, after = (x[:, None, 0, :, None] for x in self.window.reach_at(queries[None], mask, band.n_k))
        distance = positions - queries[:, None]
        keep = keep & ((distance < -before) | (distance > after))
        bias = mask.finite_bias()
        if bias is not None:
            bias = band.query_blocks(gather_pairs(bias, positions))
        return bias, band.query_blocks(keep)

    def _global_queries(self, n_q: int, causal: bool, query_offset: int) -> int:
        """Number of queries that see every key; under a causal mask the global keys are all they may see."""
        return 0 if causal else max(0, min(self.global_tokens - query_offset, n_q))

    # -- cost ------------------------------------------------------------------------------------------------

    def cost(self, query_length: int, key_length: int | None = None, *, causal: bool | None = None) -> Cost:
        n_q, n_k, pairs, causal = self._pairs(query_length, key_length, causal)
        offset = n_k - n_q if causal else 0
        band = self.window.band(n_q, n_k, causal, offset)
        n_global, rows = min(self.global_tokens, n_k), self._global_queries(n_q, causal, offset)
        exact = rows * n_k + self.window.pairs(n_q, n_k, causal, offset, first_query=rows, global_keys=n_global)
        bands = [band]
        if self.random.count == 0:
            segments = self._segments(n_q, n_k, causal, offset)
            bands = [self.window.band(stop - start, keys, causal, offset + start) for start, stop, keys in segments]
        state = sum(b.n_blocks * b.block * (b.span + min(n_global, b.n_k)) for b in bands)  # masks, of all heads alike
        computed = state + rows * n_k
        exact = self.num_heads * exact
        if self.random.count == 0:  # slices of keys and values beside each block of queries
            slices = sum(b.n_blocks * (b.span + min(n_global, b.n_k)) for b in bands)
            state += self.num_heads * slices * (self.head_dim + self.value_dim)
        else:
            mask, device = AttentionMask(causal=causal, query_offset=offset), torch.device("cpu")
            index, is_open = self.random.choose(self.num_heads, n_q, n_k, mask, device)
            _, keep = self._random_pairs(band, mask, index, is_open)
            exact += int(band.merge_queries(keep)[:, :, rows:].sum())
            computed += index.shape[2] * self.random.block_size * self.random.width
            gathered = (band.n_blocks * band.span + index.shape[2] * self.random.width) * (
                self.head_dim + self.value_dim
            )
            state += self.num_heads * (2 * computed + gathered)
        return Cost(
            exact_pairs=exact,
            total_pairs=self.num_heads * pairs,
            score_multiply_adds=self.num_heads * computed * self.head_dim,
            value_multiply_adds=self.num_heads * computed * self.value_dim,
            state=state,
            computed_pairs=self.num_heads * computed,
        )


def side_by_side(parts: list[Tensor]) -> Tensor:
    """Arrays (..., e) that broadcast to one another but for e, along the last axis."""
    shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*shape, -1) for part in parts], dim=-1)


def first_kept(keep: Tensor | None, n: int, count: int, device: torch.device) -> Tensor:
    """(b | 1, count) int64: the first kept positions of each sample, followed by others where it has fewer.

    Args:
        keep: (b, n) bool, or None for all.
    """
    if keep is None:
        return torch.arange(count, device=device)[None]
    return (~keep).byte().argsort(dim=-1, stable=True)[:, :count]


def take(x: Tensor, index: Tensor) -> Tensor:
    """(b, h, n, d) and (b | 1, r) -> (b, h, r, d)."""
    return x.gather(2, index[:, None, :, None].expand(*x.shape[:2], -1, x.shape[-1]))


def put(x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """(b, h, n, d) with the rows (b, h, r, d) in the places (b | 1, r)."""
    return x.scatter(2, index[:, None, :, None].expand_as(rows), rows.to(x.dtype))


def near_rows(positions: Tensor, n_k: int, window: int) -> Tensor:
    """(b | 1, r) positions of queries -> (b | 1, 1, r, n_k) bool: which keys are less than `window` away."""
    return (torch.arange(n_k, device=positions.device) - positions[:, None, :, None]).abs() < window


def take_queries(part: Tensor | None, index: Tensor) -> Tensor | None:
    """The rows (b | 1, r) of a part of a mask that is broadcastable to (b, h, n_q, n_k)."""
    if part is None or part.dim() < 2 or part.shape[-2] == 1:
        return part
    part = part[(None,) * (4 - part.dim())]
    part = part.expand(max(part.shape[0], index.shape[0]), -1, -1, -1)
    return part.gather(2, index[:, None, :, None].expand(*part.shape[:2], -1, part.shape[-1]))
