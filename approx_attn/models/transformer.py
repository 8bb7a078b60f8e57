"""The body that all models share: token and position embeddings, pre-LN blocks, a final norm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from approx_attn.attention import AttentionMechanism
from approx_attn.attention.exact import ExactAttention
from approx_attn.attention.multihead import MultiheadAttention
from approx_attn.attention.registry import AttentionSpec
from approx_attn.errors import require_count, require_one_of
from approx_attn.models.base import attention_mechanisms
from approx_attn.models.feed_forward import FeedForward, TopKFeedForward

POSITIONS = ("learned", "sinusoidal", "rotary")
FEED_FORWARDS = ("dense", "topk")


class Transformer(nn.Module):
    """Tokens to features: embedding, `depth` pre-LN blocks, layer norm.

    Where tokens come with coordinates, a linear map of these is added to the embedding in place of what stands for
    positions: the tokens are a set of points, whatever their order.

    Every layer builds a mechanism of its own from `attention`; where the options of the mechanism say that
    layers share parameters, later layers are tied to the first.

    Args:
        vocab_size: token ids are 0 … vocab_size − 1.
        max_length: longest input.
        causal: no token sees a later one.
        first_layer: attention layers of the model before these, for mechanisms with one basis per layer.
        coordinate_dim: numbers that say where each token stands; None: tokens have positions only.
        dim: features of a token.
        depth: number of blocks.
        num_heads: attention heads, a divisor of `dim`.
        feed_forward_dim: hidden units of the feed-forward layers.
        dropout: of embeddings, feed-forward hidden units and residual branches, 0 to 1.
        attention_dropout: of attention weights, 0 to 1.
        attention: the mechanism; see `approx_attn.attention.registry.AttentionSpec`.
        feed_forward: `dense`, or `topk` (only the largest hidden units of a token are used).
        feed_forward_keep: share (float) or number (int) of hidden units that `topk` keeps.
        activation: of the feed-forward layers: gelu, relu or silu.
        positions: `learned`; `sinusoidal`, without parameters; or `rotary`, where attention knows distances alone and
            serves sequences of other lengths than it was trained on best.

    Raises:
        ValueError: an impossible value, or a mechanism that cannot be causal in a causal model.
    """

    def __init__(
        self,
        vocab_size: int,
        max_length: int,
        causal: bool = False,
        first_layer: int = 0,
        coordinate_dim: int | None = None,
        *,
        dim: int = 64,
        depth: int = 2,
        num_heads: int = 4,
        feed_forward_dim: int = 128,
        dropout: float = 0.1,
        attention_dropout: float = 0.0,
        attention: AttentionSpec = "exact",
        feed_forward: str = "dense",
        feed_forward_keep: float | int = 0.25,
        activation: str = "gelu",
        positions: str = "learned",
    ) -> None:
        super().__init__()
        self.vocab_size = require_count("model.vocab_size", vocab_size)
        self.max_length = require_count("model.max_length", max_length)
        self.dim = require_count("model.dim", dim)
        self.feed_forward_dim = require_count("model.feed_forward_dim", feed_forward_dim)
        self.causal = causal
        depth = require_count("model.depth", depth)
        if dim % require_count("model.num_heads", num_heads):
            raise ValueError(f"model.num_heads must divide model.dim={dim}, got {num_heads}.")
        require_probability("model.dropout", dropout)
        require_probability("model.attention_dropout", attention_dropout)
        if isinstance(attention, AttentionMechanism) and depth > 1:
            raise ValueError("attention must be a name, a mapping or a factory: each layer needs its own mechanism.")

        self.token_embedding = nn.Embedding(vocab_size, dim)
        self.coordinate_dim = coordinate_dim
        require_one_of("model.positions", positions, POSITIONS)
        self.positions = build_positions(positions, max_length, dim, coordinate_dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                MultiheadAttention(
                    dim,
                    num_heads,
                    dropout=attention_dropout,
                    batch_first=True,
                    attention=attention,
                    max_length=max_length,
                    causal=causal,
                    layer_index=first_layer + index,
                    coordinate_dim=coordinate_dim,
                    rotary=self.positions is None,
                ),
                build_feed_forward(feed_forward, dim, feed_forward_dim, dropout, activation, feed_forward_keep),
                dropout,
            )
            for index in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        nn.init.normal_(self.token_embedding.weight, std=dim**-0.5)
        tie_layers(attention_mechanisms(self))

    def forward(self, tokens: Tensor, keep: Tensor | None = None, coordinates: Tensor | None = None) -> Tensor:
        """Features of tokens.

        Args:
            tokens: (b, n) int64, n at most `max_length`.
            keep: (b, n) bool, False where padded; all real if None.
            coordinates: (b, n, coordinate_dim), where the tokens stand; None where they have positions only.

        Returns:
            (b, n, dim). What stands at padded positions means nothing.

        Raises:
            ValueError: input longer than `max_length`, or coordinates that are missing or not asked for.
        """
        x = self.embed(tokens, coordinates)  # (b, n, dim)
        future = self.future(tokens) if self.causal else None
        padding = None if keep is None else ~keep
        for block in self.blocks:
            x = block(x, future, padding, coordinates)
        return self.norm(x)

    def embed(self, tokens: Tensor, coordinates: Tensor | None = None) -> Tensor:
        """(b, n) tokens to (b, n, dim), with their positions or (b, n, coordinate_dim) coordinates.

        Raises:
            ValueError: as `forward`.
        """
        length = tokens.shape[1]
        if length > self.max_length:
            raise ValueError(
                f"a sequence of {length} tokens is longer than model.max_length={self.max_length}: "
                "shorten it (data.max_length) or train a model for longer ones."
            )
        if (coordinates is None) != (self.coordinate_dim is None):
            raise ValueError(
                f"coordinates must be given where model.coordinate_dim is, which is {self.coordinate_dim}."
            )
        x = self.token_embedding(tokens)
        if self.positions is not None:
            x = x + self.positions(length if coordinates is None else coordinates)
        return self.dropout(x)

    def future(self, tokens: Tensor) -> Tensor:
        """(n, n) bool, True above the diagonal, for layers that read it: PyTorch's own exact attention."""
        length, device = tokens.shape[1], tokens.device
        rotary = self.positions is None
        if not rotary and any(isinstance(mechanism, ExactAttention) for mechanism in attention_mechanisms(self)):
            return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)  # True = masked out
        # Other layers know from `is_causal` and only ask that a mask is there: one number in place of n².
        return torch.ones(1, 1, dtype=torch.bool, device=device).expand(length, length)


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, attention: MultiheadAttention, feed_forward: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        dim = attention.embed_dim
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = attention
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.feed_forward = feed_forward
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        future: Tensor | None = None,
        padding: Tensor | None = None,
        coordinates: Tensor | None = None,
    ) -> Tensor:
        """(b, n, dim) -> (b, n, dim).

        Args:
            future: (n, n) bool, True above the diagonal, in a causal model; else None. Exact layers alone read it.
            padding: (b, n) bool, True where padded; None if nothing is.
            coordinates: (b, n, c), where the tokens stand, for mechanisms that go by distance.
        """
        return self.feed(self.attend(x, future, padding, coordinates))

    def attend(
        self,
        x: Tensor,
        future: Tensor | None = None,
        padding: Tensor | None = None,
        coordinates: Tensor | None = None,
    ) -> Tensor:
        """The first half: x + attention(norm(x))."""
        h = self.attention_norm(x)
        h, _ = self.attention(
            h,
            h,
            h,
            key_padding_mask=padding,
            attn_mask=future,
            is_causal=future is not None,
            need_weights=False,
            coordinates=coordinates,
        )
        return x + self.dropout(h)

    def feed(self, x: Tensor) -> Tensor:
        """The second half: x + feed_forward(norm(x))."""
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class Positions(nn.Module):
    """What is added to the token at each position: (n, dim).

    Args:
        max_length: number of positions.
        dim: features.
        kind: `learned` or `sinusoidal` (Vaswani et al. 2017, arXiv 1706.03762, §3.5).
    """

    def __init__(self, max_length: int, dim: int, kind: str = "learned") -> None:
        super().__init__()
        table = sinusoids(max_length, dim) * (2.0 / dim) ** 0.5  # of unit length, as the token embeddings
        if kind == "learned":
            self.table = nn.Parameter(torch.randn(max_length, dim) * dim**-0.5)
        else:
            self.register_buffer("table", table, persistent=False)

    def forward(self, length: int) -> Tensor:
        """(length, dim)."""
        return self.table[:length]


def build_positions(kind: str, max_length: int, dim: int, coordinate_dim: int | None) -> nn.Module | None:
    """What is added to the tokens by their positions, or by their coordinates if they have some; rotary: nothing."""
    if coordinate_dim is not None:
        return nn.Linear(coordinate_dim, dim)
    return None if kind == "rotary" else Positions(max_length, dim, kind)


def sinusoids(length: int, dim: int) -> Tensor:
    """(length, dim): sines in the first half of the features, cosines in the second."""
    half = (dim + 1) // 2
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(half) / half)  # (dim/2,)
    angles = torch.arange(length)[:, None] * frequencies  # (n, dim/2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[:, :dim]


def build_feed_forward(
    kind: str, dim: int, hidden_dim: int, dropout: float, activation: str, keep: float | int
) -> nn.Module:
    """The feed-forward layer that `model.feed_forward` names."""
    require_one_of("model.feed_forward", kind, FEED_FORWARDS)
    if kind == "topk":
        return TopKFeedForward(dim, hidden_dim, dropout, activation, keep)
    return FeedForward(dim, hidden_dim, dropout, activation)


def tie_layers(mechanisms: Sequence[AttentionMechanism]) -> None:
    """Have all layers use the parameters of the first where the options of their mechanism say so."""
    for mechanism in mechanisms[1:]:
        mechanism.tie_to(mechanisms[0])


def auxiliary_loss(mechanisms: Iterable[AttentionMechanism]) -> Tensor | None:
    """Sum of the losses that mechanisms set in their last training forward pass; None if none did."""
    losses = [mechanism.auxiliary_loss for mechanism in mechanisms if mechanism.auxiliary_loss is not None]
    return torch.stack(losses).sum() if losses else None


def require_probability(key: str, value: float) -> float:
    """`value` if it is a number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < 1.0:
        raise ValueError(f"{key} must be a number of at least 0 and below 1, got {value!r}.")
    return float(value)
