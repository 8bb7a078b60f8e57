"""The shape of the attention layer that a mechanism serves."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from approx_attn.errors import require_count


@dataclass(frozen=True)
class AttentionShape:
    """What a mechanism has to know of the attention layer it serves.

    Attributes:
        num_heads: query heads h.
        head_dim: dimension d of a query and key in one head.
        value_dim: dimension d_v of a value in one head; `head_dim` if None.
        num_key_value_heads: key/value heads h_kv; `num_heads` if None, else a divisor of it.
        max_length: longest input a length-dependent part is laid out for; some mechanisms require it.
        causal: declares that the mechanism will be used under a causal mask, so that one that cannot refuses before
            any training. The mask given to `forward` decides what happens.
        layer_index: which layer of a model this is, for mechanisms that load a basis fitted per layer.
        coordinate_dim: numbers that say where each token stands, which come with every input
            (`AttentionMask.query_coordinates`); None: tokens have their positions only.

    Raises:
        ValueError: a size that is no whole number above 0, or key/value heads that do not divide the query heads.
    """

    num_heads: int
    head_dim: int
    value_dim: int = None  # type: ignore[assignment]  # never None once built
    num_key_value_heads: int = None  # type: ignore[assignment]
    max_length: int | None = None
    causal: bool = False
    layer_index: int = 0
    coordinate_dim: int | None = None

    def __post_init__(self) -> None:
        if self.value_dim is None:
            object.__setattr__(self, "value_dim", self.head_dim)
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_heads)
        for key in ("num_heads", "head_dim", "value_dim"):
            require_count(key, getattr(self, key))
        if self.max_length is not None:
            require_count("max_length", self.max_length)
        if self.coordinate_dim is not None:
            require_count("coordinate_dim", self.coordinate_dim)
        if self.num_key_value_heads < 1 or self.num_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads must divide num_heads={self.num_heads}, got {self.num_key_value_heads}."
            )

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        max_length: int | None = None,
        causal: bool = False,
        layer_index: int = 0,
    ) -> AttentionShape:
        """The shape that (b, h, n, d) tensors show."""
        return cls(*_sizes(query, key, value), max_length, causal, layer_index)

    def fits(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether (b, h, n, d) tensors have these heads and dimensions."""
        return (self.num_heads, self.head_dim, self.value_dim, self.num_key_value_heads) == _sizes(query, key, value)


def _sizes(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, int, int, int]:
    return query.shape[1], query.shape[-1], value.shape[-1], key.shape[1]
