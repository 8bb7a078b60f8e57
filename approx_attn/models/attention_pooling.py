"""A classifier with one attention over the tokens: every token gets one weight, and a head reads their mean."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from approx_attn.attention.base import Cost
from approx_attn.attention.multihead import MultiheadAttention
from approx_attn.attention.registry import AttentionSpec
from approx_attn.errors import require_count, require_one_of
from approx_attn.models.base import SequenceModel
from approx_attn.models.transformer import require_probability

ENCODERS = ("lstm", "affine")


class AttentionPooling(SequenceModel):
    """Token vectors x_t, their mean under attention weights α_t, linear head.

    The classifier of Jain and Wallace (arXiv 1902.10186) and of Wiegreffe and Pinter (arXiv 1908.04626), with
    α = softmax_t(q·W_K x_t / √d) of a learned query q in place of additive attention. With `encoder=affine`
    x_t = tanh(W e_t + b) knows its own embedding e_t alone, neither context nor position, so the weights are the only
    way by which tokens act on each other; with `encoder=lstm` x_t is the state of a bidirectional LSTM.

    Args:
        vocab_size, max_length: of the data.
        num_classes: outputs.
        encoder: `lstm` or `affine`.
        dim: features of a token, even with `lstm`, which has half of them in each direction.
        num_heads: weights per token, a divisor of `dim`.
        dropout: of embeddings and of the mean, 0 to 1.
        attention: the mechanism; see `approx_attn.attention.registry.AttentionSpec`.

    Raises:
        ValueError: an impossible value; the message names its key.
    """

    def __init__(
        self,
        vocab_size: int,
        num_classes: int,
        max_length: int,
        *,
        encoder: str = "lstm",
        dim: int = 64,
        num_heads: int = 1,
        dropout: float = 0.1,
        attention: AttentionSpec = "exact",
    ) -> None:
        super().__init__()
        require_one_of("model.encoder", encoder, ENCODERS)
        dim = require_count("model.dim", dim)
        if encoder == "lstm" and dim % 2:
            raise ValueError(f"model.dim must be even with model.encoder=lstm, got {dim}.")
        if dim % require_count("model.num_heads", num_heads):
            raise ValueError(f"model.num_heads must divide model.dim={dim}, got {num_heads}.")
        self.token_embedding = nn.Embedding(require_count("model.vocab_size", vocab_size), dim)
        self.encoder: nn.Module = (
            nn.LSTM(dim, dim // 2, batch_first=True, bidirectional=True)
            if encoder == "lstm"
            else nn.Sequential(nn.Linear(dim, dim), nn.Tanh())
        )
        self.query = nn.Parameter(torch.randn(1, dim) * dim**-0.5)
        self.attention = MultiheadAttention(
            dim, num_heads, batch_first=True, attention=attention, max_length=max_length
        )
        self.dropout = nn.Dropout(require_probability("model.dropout", dropout))
        self.head = nn.Linear(dim, require_count("model.num_classes", num_classes))

    def forward(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """Class scores.

        Args:
            tokens: (b, n) int64.
            keep: (b, n) bool, False where padded, which is behind the real tokens; all real if None.

        Returns:
            (b, num_classes) logits.
        """
        x = self._encode(self.dropout(self.token_embedding(tokens)), keep)  # (b, n, dim)
        query = self.query.expand(len(tokens), 1, -1)
        padding = None if keep is None else ~keep
        mean, _ = self.attention(query, x, x, key_padding_mask=padding, need_weights=False)  # (b, 1, dim)
        return self.head(self.dropout(mean[:, 0]))

    def _encode(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """(b, n, dim) -> (b, n, dim)."""
        if not isinstance(self.encoder, nn.LSTM):
            return self.encoder(x)
        if keep is None:
            return self.encoder(x)[0]
        # The backward direction would else begin in the padding. One token at least: an empty sequence has no states.
        lengths = keep.sum(1).clamp_min(1).cpu()
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.encoder(packed)[0], batch_first=True, total_length=x.shape[1])[0]

    def costs(self, length: int, causal: bool) -> list[Cost]:
        """One query over all tokens."""
        return [mechanism.cost(1, length, causal=causal) for mechanism in self.mechanisms]
