"""A transformer that reads one sequence and writes another: encoder, decoder and the cross-attention between them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from approx_attn.attention import AttentionMechanism
from approx_attn.attention.multihead import MultiheadAttention
from approx_attn.attention.registry import AttentionSpec
from approx_attn.models.base import SequenceModel, attention_mechanisms, passes_options_to
from approx_attn.models.transformer import Transformer, TransformerBlock, tie_layers


class EncoderDecoder(SequenceModel):
    """Encoder over the source, causal decoder over the target with cross-attention to the encoder's output.

    All three kinds of attention use the mechanism of `attention`, `depth` layers of each. A mechanism that cannot be
    causal is refused, and so is one whose queries see each other, which in cross-attention are words still to come.
    Layers count encoder, decoder, cross-attention, in this order. The output map is the embedding of the target words
    (Press and Wolf 2017, arXiv 1608.05859).

    Args:
        vocab_size: source tokens.
        num_classes: target tokens.
        max_length: longest source and longest target.
        options: of the `Transformer`, the same for encoder and decoder.

    Raises:
        ValueError: an impossible value, or a mechanism that a decoder cannot use.
    """

    translates = True

    @passes_options_to(Transformer)
    def __init__(self, vocab_size: int, num_classes: int, max_length: int, **options: Any) -> None:
        super().__init__()
        if isinstance(options.get("attention"), AttentionMechanism):
            raise ValueError("attention must be a name, a mapping or a factory: each layer needs its own mechanism.")
        self.encoder = Transformer(vocab_size, max_length, False, **options)
        self.decoder = Decoder(num_classes, max_length, len(self.encoder.blocks), **options)

    def forward(
        self, tokens: Tensor, tokens_b: Tensor, keep: Tensor | None = None, keep_b: Tensor | None = None
    ) -> Tensor:
        """Scores of the target token that follows each of those given.

        Args:
            tokens: (b, n) int64, the source.
            tokens_b: (b, m) int64, the target so far, from its first token on.
            keep, keep_b: (b, n) and (b, m) bool, False where padded; all real if None.

        Returns:
            (b, m, num_classes) logits.
        """
        return self.decode(self.encoder(tokens, keep), tokens_b, keep, keep_b)

    def decode(
        self, memory: Tensor, tokens_b: Tensor, keep: Tensor | None = None, keep_b: Tensor | None = None
    ) -> Tensor:
        """(b, m, num_classes) logits from (b, n, dim) features of the source; other arguments as of `forward`."""
        features = self.decoder(tokens_b, keep_b, memory, keep)
        return F.linear(features, self.decoder.token_embedding.weight)


class Decoder(Transformer):
    """A causal `Transformer` whose blocks attend to the features of a source between their two halves.

    Args:
        vocab_size, max_length: of the target.
        first_layer: attention layers of the model before these.
        options: of the `Transformer`.
    """

    def __init__(self, vocab_size: int, max_length: int, first_layer: int, **options: Any) -> None:
        super().__init__(vocab_size, max_length, True, first_layer, **options)
        spec, first_cross = options.get("attention", "exact"), first_layer + len(self.blocks)
        self.cross = nn.ModuleList(
            CrossAttention(block, spec, max_length, first_cross + index)  # type: ignore[arg-type]
            for index, block in enumerate(self.blocks)
        )
        tie_layers(attention_mechanisms(self.cross))

    def forward(  # type: ignore[override]
        self, tokens: Tensor, keep: Tensor | None, memory: Tensor, memory_keep: Tensor | None
    ) -> Tensor:
        """Features of target tokens.

        Args:
            tokens: (b, m) int64.
            keep: (b, m) bool, False where padded; all real if None.
            memory: (b, n, dim) features of the source.
            memory_keep: (b, n) bool, likewise.

        Returns:
            (b, m, dim).
        """
        x, future = self.embed(tokens), self.future(tokens)
        padding = None if keep is None else ~keep
        memory_padding = None if memory_keep is None else ~memory_keep
        layers = cast(Iterable[tuple[TransformerBlock, CrossAttention]], zip(self.blocks, self.cross, strict=True))
        for block, cross in layers:
            x = block.attend(x, future, padding)
            x = cross(x, memory, memory_padding)
            x = block.feed(x)
        return self.norm(x)


class CrossAttention(nn.Module):
    """x + attention(norm(x), memory).

    Args:
        block: the decoder block that it stands in, whose shape it takes.
        attention: the mechanism.
        max_length: longest source and longest target.
        layer_index: position of the layer in the model.
    """

    def __init__(self, block: TransformerBlock, attention: AttentionSpec, max_length: int, layer_index: int) -> None:
        super().__init__()
        beside = block.attention
        self.attention_norm = nn.LayerNorm(beside.embed_dim)
        self.attention = MultiheadAttention(
            beside.embed_dim,
            beside.num_heads,
            dropout=beside.dropout,
            batch_first=True,
            attention=attention,
            max_length=max_length,
            layer_index=layer_index,
        )
        self.attention.attention.require_independent_queries()
        self.dropout = nn.Dropout(block.dropout.p)

    def forward(self, x: Tensor, memory: Tensor, padding: Tensor | None = None) -> Tensor:
        """(b, m, dim) target and (b, n, dim) source features to (b, m, dim); `padding` (b, n) True where padded."""
        h, _ = self.attention(self.attention_norm(x), memory, memory, key_padding_mask=padding, need_weights=False)
        return x + self.dropout(h)


@torch.no_grad()
def greedy_decode(
    model: EncoderDecoder, tokens: Tensor, keep: Tensor | None, length: int, begin: int, end: int, pad: int
) -> Tensor:
    """The target, one best token after the other.

    Without a cache: at each step the decoder runs over all positions, those not yet written masked, so that
    a budget that is a share of the length is the same as in training.

    Args:
        model: in evaluation mode.
        tokens, keep: the source, as of `EncoderDecoder.forward`.
        length: most target tokens.
        begin, end, pad: token ids.

    Returns:
        (b, length) int64, from the token after `begin` on; `pad` after `end`.
    """
    memory = model.encoder(tokens, keep)
    written = tokens.new_full((len(tokens), length + 1), pad)
    written[:, 0] = begin
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for step in range(length):
        known = torch.arange(length, device=tokens.device) <= step  # (m,)
        logits = model.decode(memory, written[:, :-1], keep, known.expand(len(tokens), -1))[:, step]
        written[:, step + 1] = logits.argmax(-1).masked_fill(ended, pad)
        ended = ended | (written[:, step + 1] == end)
        if bool(ended.all()):
            break
    return written[:, 1:]
