"""A transformer that predicts a token at every position: causal, or seeing both sides (masked modelling)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from approx_attn.errors import require_count
from approx_attn.models.base import SequenceModel, passes_options_to
from approx_attn.models.transformer import Transformer


class LanguageModel(SequenceModel):
    """Transformer and a linear map to the vocabulary.

    Shifting or masking is the business of the data: the logits at position i are compared with the label
    at position i.

    Args:
        vocab_size, max_length: of the data.
        num_classes: outputs per position; `vocab_size` if None.
        causal: no position sees a later one.
        coordinate_dim: of the data, see `Transformer`.
        tie_embeddings: use the token embedding as the output map too.
        options: of the `Transformer`.

    Raises:
        ValueError: an impossible value, or a mechanism that cannot be causal with `causal`.
    """

    @passes_options_to(Transformer)
    def __init__(
        self,
        vocab_size: int,
        max_length: int,
        num_classes: int | None = None,
        *,
        causal: bool = True,
        coordinate_dim: int | None = None,
        tie_embeddings: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.num_classes = require_count("model.num_classes", vocab_size if num_classes is None else num_classes)
        self.decoder = Transformer(vocab_size, max_length, causal, coordinate_dim=coordinate_dim, **options)
        self.head = nn.Linear(self.decoder.dim, self.num_classes, bias=not tie_embeddings)
        if tie_embeddings:
            if self.num_classes != vocab_size:
                raise ValueError(
                    f"model.tie_embeddings needs as many classes as tokens, got {self.num_classes} and {vocab_size}."
                )
            self.head.weight = self.decoder.token_embedding.weight

    def forward(self, tokens: Tensor, keep: Tensor | None = None, coordinates: Tensor | None = None) -> Tensor:
        """Scores of every token at every position.

        Args:
            tokens: (b, n) int64.
            keep: (b, n) bool, False where padded; all real if None.
            coordinates: (b, n, coordinate_dim), where the data has them.

        Returns:
            (b, n, num_classes) logits.
        """
        return self.head(self.decoder(tokens, keep, coordinates))
