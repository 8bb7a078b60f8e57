"""What kind of token stands at each position: special, punctuation or other, and which of them."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from approx_attn.conversion.layers import CROSS_ATTENTION, DECODER

CATEGORIES = ("[CLS]", "[SEP]", "other special", "comma", "period", "other punctuation", "other")
CLS, SEP, SPECIAL, COMMA, PERIOD, PUNCTUATION, OTHER = range(len(CATEGORIES))
GROUPS = {"special": (CLS, SEP, SPECIAL), "punctuation": (COMMA, PERIOD, PUNCTUATION), "other": (OTHER,)}
MARKS = {",": COMMA, ".": PERIOD}
WORD_MARKS = "▁ĠĊ"  # how tokenizers write the space or line break before a piece


class TokenCategories:
    """Category of the key tokens of an attention call, from the batch that the model was given.

    Special tokens are those the tokenizer calls so, [CLS] and [SEP] what it uses as such whatever their names;
    punctuation are tokens of punctuation marks and symbols alone. Of image models, the tokens in front of the patches
    are special, the first of them [CLS]. Where nothing is known of the tokens, all are "other".

    Args:
        tokenizer: of the library transformers; None if there is none.
        vocabulary: category by token id, instead of a tokenizer: (vocabulary size,) int64.
    """

    def __init__(self, tokenizer: Any = None, vocabulary: Tensor | None = None) -> None:
        self.vocabulary = vocabulary_categories(tokenizer) if tokenizer is not None else vocabulary

    def __call__(self, layer: str, batch: Any, batch_size: int, length: int) -> Tensor:
        """(batch_size, length) int64, indices into `CATEGORIES`.

        Args:
            layer: name of the attention layer, which tells encoder, decoder and cross-attention apart.
            batch: what the model was given.
            batch_size, length: of the keys.
        """
        categories = torch.full((batch_size, length), OTHER)
        if not isinstance(batch, Mapping):
            return categories
        if isinstance(batch.get("pixel_values"), Tensor):
            categories = categories.index_fill(1, torch.arange(_leading_tokens(length)), SPECIAL)
            return categories.index_fill(1, torch.arange(min(_leading_tokens(length), 1)), CLS)
        in_decoder = DECODER.search(layer) is not None and CROSS_ATTENTION.search(layer) is None
        names = ("decoder_input_ids", "input_ids", "tokens") if in_decoder else ("input_ids", "tokens")
        tokens = next((batch[name] for name in names if isinstance(batch.get(name), Tensor)), None)
        if tokens is None or self.vocabulary is None or tokens.shape != (batch_size, length):
            return categories
        known = tokens.cpu().clamp(max=len(self.vocabulary) - 1)
        return self.vocabulary[known]


def vocabulary_categories(tokenizer: Any) -> Tensor:
    """(vocabulary size,) int64: the category of every token id."""
    categories = torch.full((len(tokenizer),), OTHER)
    for text, token in tokenizer.get_vocab().items():
        if token < len(categories) and is_punctuation(text):
            categories[token] = MARKS.get(bare(text), PUNCTUATION)
    categories[[token for token in tokenizer.all_special_ids if token < len(categories)]] = SPECIAL
    for token, category in ((tokenizer.sep_token_id, SEP), (tokenizer.cls_token_id, CLS)):
        if token is not None and token < len(categories):
            categories[token] = category
    return categories


def is_punctuation(token: str) -> bool:
    """Does a token consist of punctuation marks and symbols alone, once marks of word boundaries are off?"""
    text = bare(token)
    return bool(text) and all(unicodedata.category(character)[0] in "PS" for character in text)


def bare(token: str) -> str:
    """A token without the marks of word boundaries."""
    return token.removeprefix("##").strip(WORD_MARKS + " ") or token.strip(WORD_MARKS + " ")


def _leading_tokens(length: int) -> int:
    """Tokens in front of a square of patches."""
    return length - int(length**0.5) ** 2


def random_tokens(batch: Mapping[str, Tensor], ordinary: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """The same batch with every ordinary token replaced by one drawn uniformly from the ordinary ones.

    Special tokens and padding stay where they are, so the frame of the input is the model's own.

    Args:
        batch: `input_ids` or `tokens`, (b, n) int64, and whatever else the model takes.
        ordinary: ids to draw from; ids that are not among them stay.
        generator: of the draw.
    """
    name = next(name for name in ("input_ids", "tokens") if name in batch)
    tokens = batch[name]
    drawn = ordinary[torch.randint(len(ordinary), tokens.shape, generator=generator)]
    return {**batch, name: torch.where(torch.isin(tokens, ordinary), drawn, tokens)}


def with_decoder_inputs(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text batch for an encoder-decoder: the decoder reads the same text, shifted right by its start token."""
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False) or "input_ids" not in batch or "decoder_input_ids" in batch:
        return dict(batch)
    tokens = batch["input_ids"]
    start = getattr(config, "decoder_start_token_id", None)
    start = getattr(config, "pad_token_id", 0) if start is None else start
    shifted = torch.cat([tokens.new_full((len(tokens), 1), start or 0), tokens[:, :-1]], dim=1)
    return {**batch, "decoder_input_ids": shifted}


def without_decoder(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch as it was before `with_decoder_inputs`."""
    return {key: part for key, part in batch.items() if key != "decoder_input_ids"}
