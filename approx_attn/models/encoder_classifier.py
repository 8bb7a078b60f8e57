"""A transformer encoder that gives one label per sequence, or per pair of sequences."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from approx_attn.attention.base import require_positive
from approx_attn.attention.registry import AttentionSpec
from approx_attn.models.base import SequenceModel
from approx_attn.models.transformer import Transformer, attention_mechanisms


class EncoderClassifier(SequenceModel):
    """Encoder, mean over the real tokens, linear head.

    With `two_towers` two sequences are encoded by the same encoder to x₀ and x₁, and the head is a small
    network on [x₀, x₁, x₀·x₁, x₀ − x₁]. The auxiliary loss of a mechanism is then its mean over the two.

    Args:
        vocab_size, max_length: of the data.
        num_classes: outputs.
        two_towers: classify pairs of sequences.
        dim, depth, num_heads, feed_forward_dim, dropout, attention_dropout, attention, feed_forward,
            feed_forward_keep, activation, positions: as in `Transformer`.

    Raises:
        ValueError: an impossible value; the message names its key.
    """

    causal = False

    def __init__(
        self,
        vocab_size: int,
        num_classes: int,
        max_length: int,
        *,
        two_towers: bool = False,
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
        self.num_classes = require_positive("model.num_classes", num_classes)
        self.two_towers = two_towers
        self.encoder = Transformer(
            vocab_size,
            max_length,
            dim=dim,
            depth=depth,
            num_heads=num_heads,
            feed_forward_dim=feed_forward_dim,
            dropout=dropout,
            attention_dropout=attention_dropout,
            attention=attention,
            feed_forward=feed_forward,
            feed_forward_keep=feed_forward_keep,
            activation=activation,
            positions=positions,
        )
        if two_towers:
            self.head: nn.Module = nn.Sequential(
                nn.Linear(4 * dim, feed_forward_dim), nn.GELU(), nn.Linear(feed_forward_dim, num_classes)
            )
        else:
            self.head = nn.Linear(dim, num_classes)

    def forward(
        self,
        tokens: Tensor,
        keep: Tensor | None = None,
        tokens_b: Tensor | None = None,
        keep_b: Tensor | None = None,
    ) -> Tensor:
        """Class scores.

        Args:
            tokens: (b, n) int64.
            keep: (b, n) bool, False where padded; all real if None.
            tokens_b, keep_b: the second sequence, (b, n_b), with `two_towers` only.

        Returns:
            (b, num_classes) logits.
        """
        if (tokens_b is not None) != self.two_towers:
            raise ValueError(f"tokens_b must be given with model.two_towers=true only, which is {self.two_towers}.")
        x = mean_over_tokens(self.encoder(tokens, keep), keep)  # (b, dim)
        if tokens_b is not None:
            mechanisms = attention_mechanisms(self.encoder)
            first_losses = [mechanism.auxiliary_loss for mechanism in mechanisms]
            y = mean_over_tokens(self.encoder(tokens_b, keep_b), keep_b)
            for mechanism, first in zip(mechanisms, first_losses, strict=True):  # the second pass replaced them
                if first is not None and mechanism.auxiliary_loss is not None:
                    mechanism.auxiliary_loss = 0.5 * (first + mechanism.auxiliary_loss)
            x = torch.cat([x, y, x * y, x - y], dim=-1)  # (b, 4·dim)
        return self.head(x)


def mean_over_tokens(x: Tensor, keep: Tensor | None) -> Tensor:
    """(b, n, dim) -> (b, dim): mean over the positions that are kept; zeros where none is."""
    if keep is None:
        return x.mean(dim=1)
    kept = keep[..., None]  # (b, n, 1)
    # masked_fill, not a product: what stands in the padding may be NaN.
    return x.masked_fill(~kept, 0.0).sum(dim=1) / kept.sum(dim=1).clamp(min=1)
