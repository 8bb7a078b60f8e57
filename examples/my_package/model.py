"""A model of one's own: the encoder of this project, and a head on the largest feature over the tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from approx_attn.attention.registry import AttentionSpec
from approx_attn.models import Transformer
from approx_attn.models.base import SequenceModel


class MaxPoolClassifier(SequenceModel):
    """Encoder, maximum over the real tokens, linear head.

    Args:
        vocab_size, num_classes, max_length: of the data, which fill them in.
        dim: features of a token.
        depth: blocks.
        num_heads: attention heads.
        attention: the mechanism of every layer.
    """

    def __init__(
        self,
        vocab_size: int,
        num_classes: int,
        max_length: int,
        *,
        dim: int = 32,
        depth: int = 2,
        num_heads: int = 4,
        attention: AttentionSpec = "exact",
    ) -> None:
        super().__init__()
        self.encoder = Transformer(
            vocab_size, max_length, dim=dim, depth=depth, num_heads=num_heads, attention=attention
        )
        self.head = nn.Linear(dim, num_classes)

    def forward(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """Tokens (b, n) and `keep` (b, n), True for real ones, to logits (b, num_classes)."""
        x = self.encoder(tokens, keep)  # (b, n, dim)
        if keep is not None:
            x = x.masked_fill(~keep[..., None], torch.finfo(x.dtype).min)
        return self.head(x.amax(dim=1))
