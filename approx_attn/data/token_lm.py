"""Causal language modelling over the tokens of a pretrained model's tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

import datasets
import numpy as np

from approx_attn.data.base import DataSpec
from approx_attn.data.packing import BYTE_VOCAB_SIZE
from approx_attn.data.text_classification import load_tokenizer
from approx_attn.data.text_lm import TextBlocks


@dataclass(kw_only=True, eq=False, repr=False)
class TokenLMData(TextBlocks):
    """Blocks of `max_length` tokens of any text; at every position the next token is predicted.

    Args:
        tokenizer: hub id or folder of a tokenizer of the transformers library; required.

    Other options: see `TextBlocks`, `SourceData` and `SequenceDataModule`.
    """

    batch_size: int = 16
    eval_batch_size: int = 32
    max_length: int = 128
    tokenizer: str | None = None

    has_static_spec = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tokenizer:
            raise ValueError("data.tokenizer must be the hub id or folder of a tokenizer, got nothing.")
        self._vocab_size = BYTE_VOCAB_SIZE  # until the tokenizer is read

    def make_spec(self) -> DataSpec:
        return self.lm_spec(self._vocab_size, f"tokens of {self.tokenizer}")

    def make_splits(self) -> dict[str, datasets.Dataset]:
        self._tokenizer = load_tokenizer(str(self.tokenizer))
        self._tokenizer.model_max_length = int(1e9)  # a text is cut into blocks here: no need to warn that it is long
        self._vocab_size = len(self._tokenizer)
        return super().make_splits()

    def tokens(self, text: bytes) -> np.ndarray:
        """The token ids of a text, without the marks that a tokenizer puts around a sentence."""
        ids = self._tokenizer(text.decode(errors="replace"), add_special_tokens=False)["input_ids"]
        return np.asarray(ids, np.int32)
