"""One canonical description of which (query, key) pairs an attention mechanism may use, and how their scores count.

PyTorch alone has four conventions (boolean keep-masks in `scaled_dot_product_attention`, boolean
drop-masks in `nn.MultiheadAttention`, additive float masks, `is_causal`); Hugging Face adds another.
Every adapter translates its own into an `AttentionMask`, and mechanisms read nothing else, so a mask
is interpreted once and structure (padding, causality, a window) is never lost in a dense array.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionMask:
    """Which keys each query may attend to, `True` always meaning *keep*, and what becomes of their scores.

    A pair (i, j) is kept when every part that is present keeps it.

    Attributes:
        key_keep: (batch, n_k) bool, False for padded keys.
        query_keep: (batch, n_q) bool, False for padded queries. Never forbids a pair: their output is
            not read by anyone, but mechanisms that pool queries must leave them out (see `real_queries`).
        causal: query i uses key j only if j <= i + query_offset.
        query_offset: position of the first query among the keys. 0 aligns upper-left as
            `scaled_dot_product_attention(is_causal=True)` does; n_k - n_q aligns lower-right, as
            decoding with a key-value cache needs. Also tells position bases where the queries stand.
        window: query i at position p = i + query_offset uses key j only if |p - j| < window; with `causal` these
            are the last `window` keys up to its own.
        pair_keep: (batch | 1, heads | 1, n_q, n_k) bool, an arbitrary pattern.
        bias: float, broadcastable to (batch, heads, n_q, n_k), added to the scaled scores. Minus
            infinity, or the lowest finite number of its type, closes a pair.
        softcap: scores s become softcap·tanh(s / softcap) before `bias` is added, whether exact or estimated (Gemma
            Team: *Gemma 2*, arXiv 2408.00118).
        sinks: (heads,) float, for each head a logit that joins the softmax as one more column without a value (OpenAI:
            *gpt-oss*, arXiv 2508.10925), so that weights sum to less than 1. A query without any key gives zeros.
        query_coordinates: (batch, n_q, c) float, where in space the queries stand, for mechanisms that go by distance;
            the others do not read it. None: tokens stand at their positions.
        key_coordinates: (batch, n_k, c) float, likewise the keys; both are given or none.
    """

    key_keep: Tensor | None = None
    query_keep: Tensor | None = None
    causal: bool = False
    query_offset: int = 0
    pair_keep: Tensor | None = None
    bias: Tensor | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    query_coordinates: Tensor | None = None
    key_coordinates: Tensor | None = None

    def __post_init__(self) -> None:
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"mask.softcap must be a number above 0 or None, got {self.softcap!r}.")
        if self.window is not None and (
            isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1
        ):
            raise ValueError(f"mask.window must be a whole number of at least 1 or None, got {self.window!r}.")
        for name in ("key_keep", "query_keep", "pair_keep"):
            part = getattr(self, name)
            if part is not None and part.dtype != torch.bool:
                raise ValueError(f"mask.{name} must be boolean (True = keep), got {part.dtype}.")
        if (self.query_coordinates is None) != (self.key_coordinates is None):
            raise ValueError("mask.query_coordinates and mask.key_coordinates must both be given, got one of them.")

    @classmethod
    def from_attn_mask(
        cls, attn_mask: Tensor | None = None, *, is_causal: bool = False, key_keep: Tensor | None = None
    ) -> AttentionMask:
        """Translate the `attn_mask` / `is_causal` pair of `scaled_dot_product_attention`.

        Args:
            attn_mask: broadcastable to (batch, heads, n_q, n_k); bool (True = keep) or float (added).
            is_causal: upper-left aligned causal mask, in addition to `attn_mask`.
            key_keep: (batch, n_k) bool, False for padded keys.
        """
        if attn_mask is None:
            return cls(key_keep=key_keep, causal=is_causal)
        while attn_mask.dim() < 4:
            attn_mask = attn_mask.unsqueeze(0)
        if attn_mask.dtype == torch.bool:
            return cls(key_keep=key_keep, causal=is_causal, pair_keep=attn_mask)
        return cls(key_keep=key_keep, causal=is_causal, bias=attn_mask)

    @classmethod
    def from_dense(cls, keep: Tensor) -> AttentionMask:
        """Recover padding, causality and a window from a dense keep-mask, so that structured mechanisms can run.

        Args:
            keep: (batch, heads | 1, n_q, n_k) bool. Recognised: key padding, lower-right aligned
                causality, a lower-right aligned window, and these together; anything else is kept as an
                arbitrary pattern. Keys that no query uses count as padded.

        Looks at the values, which waits for the device: for adapters that get nothing better.
        """
        n_q, n_k = keep.shape[-2:]
        key_keep = keep.any(dim=-2, keepdim=True)  # (b, h|1, 1, n_k)
        same_for_all_heads = keep.shape[1] == 1 or bool((key_keep == key_keep[:, :1]).all())
        if same_for_all_heads:
            padding = None if bool(key_keep.all()) else key_keep[:, 0, 0]
            if bool((keep == key_keep).all()):
                return cls(key_keep=padding)
            offset = n_k - n_q
            causal = causal_keep(n_q, n_k, offset, keep.device)
            if bool((keep == (key_keep & causal)).all()):
                return cls(key_keep=padding, causal=True, query_offset=offset)
            for parts in _windows_around(keep, offset):
                window = cls(key_keep=padding, query_offset=offset, **parts)
                expected = window.dense_keep(n_q, n_k, keep.device)
                if expected is not None and bool((keep == expected).all()):
                    return window
        return cls(pair_keep=keep)

    @property
    def is_trivial(self) -> bool:
        """True when every pair is kept and the softmax is one of the scores as they are."""
        plain = self.softcap is None and self.sinks is None
        return plain and self.key_keep is None and not self.causal and self.window is None and self.is_structured

    @property
    def is_structured(self) -> bool:
        """True when padding, causality and a window say everything, so no n_q x n_k array is needed."""
        return self.pair_keep is None and self.bias is None

    def real_queries(self, n_q: int) -> Tensor | None:
        """(batch, n_q) bool or None: the queries that mechanisms which pool queries may use.

        Where `query_keep` is missing and queries are as many as keys and start with them, they are taken for the
        same tokens: this is how self-attention with a key padding mask arrives from most callers.
        """
        if self.query_keep is None and self.key_keep is not None and self.query_offset == 0:
            return self.key_keep if self.key_keep.shape[-1] == n_q else None
        return self.query_keep

    def with_padding_cleared(self, n_q: int) -> AttentionMask:
        """The mask with zeros where padded tokens would stand: even a NaN there must not reach a gradient."""
        if self.query_coordinates is None or self.key_coordinates is None:
            return self
        real, queries, keys = self.real_queries(n_q), self.query_coordinates, self.key_coordinates
        return replace(
            self,
            query_coordinates=queries if real is None else queries.masked_fill(~real[..., None], 0.0),
            key_coordinates=keys if self.key_keep is None else keys.masked_fill(~self.key_keep[..., None], 0.0),
        )

    def query_positions(self, n_q: int, device: torch.device) -> Tensor:
        """(n_q,) int64: the position of each query on the axis of the keys."""
        return torch.arange(n_q, device=device) + self.query_offset

    def sums_over_keys(self, x: Tensor, n_q: int) -> Tensor:
        """For every query the sum over the keys that causality and window leave it: (..., n_k, d) -> (..., n_q | 1, d).

        Linear in length. A window takes the difference of two running sums, rounded as those are.
        """
        if not self.causal and self.window is None:
            return x.sum(dim=-2, keepdim=True)
        n_k, position = x.shape[-2], self.query_positions(n_q, x.device)
        sums = torch.nn.functional.pad(x.cumsum(dim=-2), (0, 0, 1, 0))  # sums[k] is over k keys
        stop = position + (1 if self.causal or self.window is None else self.window)
        total = sums.index_select(-2, stop.clamp(0, n_k))
        if self.window is None:
            return total
        return total - sums.index_select(-2, (position - self.window + 1).clamp(0, n_k))

    def dense_keep(self, n_q: int, n_k: int, device: torch.device) -> Tensor | None:
        """(batch | 1, heads | 1, n_q | 1, n_k) bool with every boolean part joined; None if all is kept.

        Minus infinity (or the lowest finite number) in `bias` counts as not kept.
        """
        keep: Tensor | None = None
        if self.key_keep is not None:
            keep = self.key_keep[:, None, None, :]
        if self.causal:
            causal = causal_keep(n_q, n_k, self.query_offset, device)
            keep = causal if keep is None else keep & causal
        if self.window is not None:
            near = near_keep(n_q, n_k, self.query_offset, self.window, device)
            keep = near if keep is None else keep & near
        if self.pair_keep is not None:
            keep = self.pair_keep if keep is None else keep & self.pair_keep
        if self.bias is not None:
            open_pairs = ~self._closed_by_bias(self.bias)
            keep = open_pairs if keep is None else keep & open_pairs
        return None if keep is None else keep.expand(*keep.shape[:-1], n_k)

    def finite_bias(self) -> Tensor | None:
        """`bias` with minus infinity replaced by zero: closed pairs are reported by `dense_keep`."""
        if self.bias is None:
            return None
        return self.bias.masked_fill(self._closed_by_bias(self.bias), 0.0)

    def capped(self, scores: Tensor) -> Tensor:
        """Scaled scores of any shape after `softcap`."""
        return scores if self.softcap is None else self.softcap * (scores / self.softcap).tanh()

    def logits(self, scores: Tensor) -> Tensor:
        """Scaled scores, broadcastable to (batch, heads, n_q, n_k), after `softcap` and with `finite_bias`."""
        bias = self.finite_bias()
        return self.capped(scores) if bias is None else self.capped(scores) + bias

    @staticmethod
    def _closed_by_bias(bias: Tensor) -> Tensor:
        # Many libraries write the lowest finite number where they mean minus infinity.
        return bias <= torch.finfo(bias.dtype).min

    def additive(self, n_q: int, n_k: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """The whole mask as one float array to add to the scores (closed pairs: minus infinity)."""
        keep = self.dense_keep(n_q, n_k, device)
        if keep is None:
            return None
        bias = self.finite_bias()
        base = torch.zeros((), dtype=dtype, device=device) if bias is None else bias.to(dtype)
        return torch.where(keep, base, torch.full((), float("-inf"), dtype=dtype, device=device))

    def queries(self, start: int, stop: int) -> AttentionMask:
        """The mask of queries start..stop-1, for mechanisms that process queries in chunks."""

        def rows(part: Tensor | None) -> Tensor | None:
            if part is None or part.dim() < 2 or part.shape[-2] == 1:
                return part
            return part[..., start:stop, :]

        return replace(
            self,
            query_keep=None if self.query_keep is None else self.query_keep[:, start:stop],
            query_coordinates=None if self.query_coordinates is None else self.query_coordinates[:, start:stop],
            query_offset=self.query_offset + start,
            pair_keep=rows(self.pair_keep),
            bias=rows(self.bias),
        )

    def keys(self, start: int, stop: int) -> AttentionMask:
        """The mask over keys start..stop-1 only."""

        def columns(part: Tensor | None) -> Tensor | None:
            return part if part is None or part.shape[-1] == 1 else part[..., start:stop]

        return replace(
            self,
            key_keep=None if self.key_keep is None else self.key_keep[:, start:stop],
            key_coordinates=None if self.key_coordinates is None else self.key_coordinates[:, start:stop],
            pair_keep=columns(self.pair_keep),
            query_offset=self.query_offset - start,
            bias=columns(self.bias),
        )


def query_chunks(n_q: int, n_k: int, chunk_size: int, causal: bool, query_offset: int | None = None) -> list[tuple]:
    """(start, stop, keys): queries start..stop-1 see only the first `keys` keys. Lower-right aligned by default."""
    offset = n_k - n_q if query_offset is None else query_offset
    chunks = []
    for start in range(0, n_q, chunk_size):
        stop = min(start + chunk_size, n_q)
        chunks.append((start, stop, max(1, min(n_k, stop + offset)) if causal else n_k))
    return chunks


def causal_keep(n_q: int, n_k: int, query_offset: int, device: torch.device) -> Tensor:
    """(n_q, n_k) bool: key j <= query i + query_offset."""
    return torch.ones(n_q, n_k, dtype=torch.bool, device=device).tril(query_offset)


def near_keep(n_q: int, n_k: int, query_offset: int, window: int, device: torch.device) -> Tensor:
    """(n_q, n_k) bool: key j is less than `window` away from query i at position i + query_offset."""
    everything = torch.ones(n_q, n_k, dtype=torch.bool, device=device)
    return everything.tril(query_offset + window - 1).triu(query_offset - window + 1)


def _windows_around(keep: Tensor, offset: int) -> list[dict[str, Any]]:
    """`causal` and `window` of the narrowest windows that hold every kept pair of (batch, heads, n_q, n_k)."""
    kept = keep.flatten(0, 1).any(dim=0)  # (n_q, n_k)
    used = kept.any(dim=-1)
    if not bool(used.any()):
        return []
    n_k, position = kept.shape[-1], torch.arange(kept.shape[0], device=keep.device) + offset
    before = position - kept.byte().argmax(dim=-1)
    after = n_k - 1 - kept.flip(-1).byte().argmax(dim=-1) - position
    first, last = int(before[used].max()), int(after[used].max())
    causal = [{"causal": True, "window": first + 1}] if last <= 0 <= first else []
    return [*causal, {"window": max(first, last) + 1}]


def masked_softmax(scores: Tensor, keep: Tensor | None, sinks: Tensor | None = None) -> Tensor:
    """Softmax over the last axis in at least float32; closed pairs get exactly zero.

    Args:
        scores: (..., n_k), any float type. Where `keep` is False they may hold anything finite.
        keep: bool, broadcastable to `scores`, or None.
        sinks: (heads,) logits of one more column, which is left out of the result; heads are the second axis of
            `scores`. None: no such column.

    Returns:
        Weights of the shape of `scores`, float32 (float64 stays). A row with nothing kept is all zeros
        and sends zero gradient back, where a plain softmax over minus infinity gives NaN.
    """
    scores = at_least_float32(scores)
    # The smallest finite number, not minus infinity: a fully closed row stays finite in both directions.
    lowest = torch.finfo(scores.dtype).min
    logits = scores if keep is None else scores.masked_fill(~keep, lowest)
    if sinks is None:
        weights = logits.softmax(dim=-1)
    else:
        column = sinks.to(logits.dtype).view(-1, *(1,) * (logits.dim() - 2)).expand(*logits.shape[:-1], 1)
        weights = torch.cat([logits, column], dim=-1).softmax(dim=-1)[..., :-1]
    return weights if keep is None else weights.masked_fill(~keep, 0.0)


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or unchanged if it is float64 already."""
    return x if x.dtype == torch.float64 else x.float()
