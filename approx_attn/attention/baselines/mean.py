"""Mean attention: the average attention matrix of some data, the same for every input."""

from __future__ import annotations

import torch
from torch import Tensor

from approx_attn.attention.base import Capabilities, repeat_heads
from approx_attn.attention.baselines.positional import PositionalAttention
from approx_attn.attention.calibrated import ObservingMechanism
from approx_attn.attention.mask import AttentionMask, at_least_float32, masked_softmax
from approx_attn.attention.registry import register_attention
from approx_attn.attention.shape import AttentionShape


@register_attention("mean")
class MeanAttention(PositionalAttention, ObservingMechanism):
    """Ā·V, renormalised over the keys a query may use, with Ā_ij (or Ā_{j−i}) an average of exact weights.

    Source: PAPA (Hassid et al., *How Much Does Attention Actually Attend?*, arXiv 2211.03495). Call `observe`
    on the queries and keys of exact attention, batch after batch, then `fit`. A pair's average is over the
    samples in which the mask allowed it, so padding and short samples do not dilute it. Until it is fitted
    it is uniform attention; as a parameter it can also be learned, which makes it `positional` with a
    calibrated start. Positions past `max_length` use the numbers of the last one.

    Args:
        alignment: absolute: an average per pair of positions; relative: per offset, over all pairs that have it.
        trainable: go on learning from the averages (as logarithms), or keep them fixed.
    """

    capabilities = Capabilities(has_parameters=True, needs_calibration=True, window=True)
    cost_formula = "0 (n²·d_v for the values)"

    def __init__(
        self,
        shape: AttentionShape,
        *,
        alignment: str = "absolute",
        trainable: bool = True,
    ) -> None:
        super().__init__(
            shape,
            alignment=alignment,
        )
        self.table.values.requires_grad_(trainable)
        self._sums: Tensor | None = None  # float64, of the shape of the table, while observing
        self._counts: Tensor | None = None

    @torch.no_grad()
    def observe(
        self, query: Tensor, key: Tensor, mask: AttentionMask | None = None, *, scale: float | None = None
    ) -> None:
        """Add the exact attention weights of a batch to the averages that `fit` will take."""
        mask = AttentionMask() if mask is None else mask
        n_q, n_k = query.shape[-2], key.shape[-2]
        scores = at_least_float32(query) @ at_least_float32(repeat_heads(key, self.num_heads)).transpose(-2, -1)
        scores = scores * (self.head_dim**-0.5 if scale is None else scale)  # (b, h, n_q, n_k)
        keep = mask.dense_keep(n_q, n_k, query.device)
        weights = masked_softmax(mask.logits(scores), keep).double()
        counted = torch.ones_like(weights) if keep is None else keep.expand_as(weights).double()
        if mask.query_keep is not None:
            counted = counted * mask.query_keep[:, None, :, None]
        self._accumulate((weights * counted).sum(dim=0), counted.sum(dim=0), mask.query_offset)

    def _accumulate(self, weights: Tensor, counts: Tensor, query_offset: int) -> None:
        """Add (h, n_q, n_k) sums over samples, each pair at its place in the table."""
        table, length = self.table.values, self.table.max_length
        if self._sums is None or self._counts is None:
            self._sums, self._counts = (torch.zeros_like(table, dtype=torch.float64) for _ in range(2))
        rows = torch.arange(weights.shape[-2], device=table.device) + query_offset
        columns = torch.arange(weights.shape[-1], device=table.device)
        if self.table.alignment == "relative":
            place = (columns - rows[:, None]).clamp(1 - length, length - 1) + length - 1  # (n_q, n_k)
        else:
            inside = (rows[:, None] >= 0) & (rows[:, None] < length) & (columns < length)
            weights, counts = weights * inside, counts * inside  # no average of the pairs past the table
            place = rows[:, None].clamp(0, length - 1) * length + columns.clamp(max=length - 1)
        for total, part in ((self._sums, weights), (self._counts, counts)):
            total.view(self.num_heads, -1).index_add_(1, place.flatten(), part.flatten(1))

    @torch.no_grad()
    def fit(self) -> None:
        """Take the averages of what was observed; pairs never seen get the weight 1/max_length."""
        if self._sums is None or self._counts is None:
            raise ValueError("attention=mean: call observe(query, key, mask) before fit(), got no observations.")
        unseen = self._counts == 0
        averages = (self._sums / self._counts.masked_fill(unseen, 1.0)).masked_fill(unseen, 1.0 / self.table.max_length)
        # A pair that was seen and never used gets a weight that rounds away rather than minus infinity, which could not
        # be learned again.
        self.table.values.copy_(averages.clamp(min=1e-12).log())
        self._sums = self._counts = None
