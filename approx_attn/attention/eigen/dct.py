"""Rows of scores interpolated by a fixed cosine basis (`dct`)."""

from __future__ import annotations

from approx_attn.attention.eigen.row import RowAttention
from approx_attn.attention.registry import register_attention
from approx_attn.attention.shape import AttentionShape


@register_attention("dct")
class DctAttention(RowAttention):
    """`eigen_row` with a fixed cosine basis and nothing learned.

    Smooth rows are interpolated from a fraction of the keys. After the idea of DCT-Former (arXiv 2203.01178), that a
    cosine basis compresses attention; here it is the basis of `eigen_row`. Options as there.
    """

    def __init__(
        self,
        shape: AttentionShape,
        *,
        keep: float | int = 0.25,
        rank: int | None = None,
        selection: str = "strided",
        window: int = 0,
        global_tokens: int = 0,
        lengths: str = "truncate",
        seed: int = 0,
    ) -> None:
        super().__init__(
            shape,
            keep=keep,
            rank=rank,
            selection=selection,
            window=window,
            global_tokens=global_tokens,
            lengths=lengths,
            seed=seed,
        )
