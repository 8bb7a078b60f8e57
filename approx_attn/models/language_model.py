"""A transformer that predicts a token at every position: causal, or seeing both sides (masked modelling)."""

from __future__ import annotations

from torch import Tensor, nn

from approx_attn.attention.base import require_positive
from approx_attn.attention.registry import AttentionSpec
from approx_attn.models.base import SequenceModel
from approx_attn.models.transformer import Transformer


class LanguageModel(SequenceModel):
    """Transformer and a linear map to the vocabulary.

    Shifting or masking is the business of the data: the logits at position i are compared with the label
    at position i.

    Args:
        vocab_size, max_length: of the data.
        num_classes: outputs per position; `vocab_size` if None.
        causal: no position sees a later one.
        tie_embeddings: use the token embedding as the output map too.
        dim, depth, num_heads, feed_forward_dim, dropout, attention_dropout, attention, feed_forward,
            feed_forward_keep, activation, positions: as in `Transformer`.

    Raises:
        ValueError: an impossible value, or a mechanism that cannot be causal with `causal`.
    """

    def __init__(
        self,
        vocab_size: int,
        max_length: int,
        num_classes: int | None = None,
        *,
        causal: bool = True,
        tie_embeddings: bool = False,
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
        self.causal = causal
        self.num_classes = require_positive("model.num_classes", vocab_size if num_classes is None else num_classes)
        self.decoder = Transformer(
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
            causal=causal,
        )
        self.head = nn.Linear(dim, self.num_classes, bias=not tie_embeddings)
        if tie_embeddings:
            if self.num_classes != vocab_size:
                raise ValueError(
                    f"model.tie_embeddings needs as many classes as tokens, got {self.num_classes} and {vocab_size}."
                )
            self.head.weight = self.decoder.token_embedding.weight

    def forward(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """Scores of every token at every position.

        Args:
            tokens: (b, n) int64.
            keep: (b, n) bool, False where padded; all real if None.

        Returns:
            (b, n, num_classes) logits.
        """
        return self.head(self.decoder(tokens, keep))
