"""Text classification by bytes or by a tokenizer, from a hub id or a local folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from approx_attn.data.base import DataSpec
from approx_attn.data.cache import quiet_datasets
from approx_attn.data.labelled import LabelledData
from approx_attn.data.packing import BYTE_VOCAB_SIZE, PAD, PackedSequences
from approx_attn.data.sources import require_column, require_texts
from approx_attn.errors import require_one_of


@dataclass(kw_only=True, eq=False, repr=False)
class TextClassificationData(LabelledData):
    """Any text classification set with a text and a label column.

    Args:
        text_column: column with the texts.
        max_length: longest sequence in tokens; longer texts are cut.
        truncation_side: the end that is cut off, "right" or "left".
        tokenizer: None for bytes (byte v is token v + 1, 0 is padding), else the hub id or folder of a
            tokenizer of the transformers library, which must then be installed.

    Other options: see `LabelledData` and `SequenceDataModule`.
    """

    eval_batch_size: int = 64
    pad_to_longest: bool = False
    text_column: str = "text"
    max_length: int = 1000
    truncation_side: str = "right"
    tokenizer: str | None = None

    input_kind = "text"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_counts(max_length=1)
        require_one_of("data.truncation_side", self.truncation_side, ("right", "left"))
        self._vocab_size, self._pad_id = BYTE_VOCAB_SIZE, PAD

    def find_inputs(self, splits: dict[str, datasets.Dataset]) -> str:
        for split in splits.values():
            require_column(split, self.text_column, "data.text_column", str(self.path))
        require_texts(splits, self.text_column, str(self.path))
        return self.text_column

    def read_inputs(self, splits: dict[str, datasets.Dataset], column: str) -> dict[str, datasets.Dataset]:
        """Texts as tokens: their bytes, or ids by the tokenizer, kept in the cache of the `datasets` library."""
        if self.tokenizer is None:
            return {name: split.rename_column(column, "tokens") for name, split in splits.items()}
        tokenizer = load_tokenizer(str(self.tokenizer))
        tokenizer.truncation_side = self.truncation_side
        self._vocab_size, self._pad_id = len(tokenizer), tokenizer.pad_token_id or 0
        options = {"tokenizer": tokenizer, "column": column, "max_length": self.max_length}
        return {
            name: split.map(tokenize, batched=True, remove_columns=[column], fn_kwargs=options, desc="tokenizing")
            for name, split in splits.items()
        }

    def pack_inputs(self, inputs: Sequence[str], spec: DataSpec) -> PackedSequences:
        texts = datasets.Dataset.from_dict({self.text_column: list(inputs)})
        with quiet_datasets():
            return self.pack("test", self.read_inputs({"test": texts}, self.text_column)["test"], spec)

    def make_spec(self) -> DataSpec:
        unit = "bytes" if self.tokenizer is None else f"tokens of {self.tokenizer}"
        described = f"text classification of {self.path}, up to {self.max_length} {unit}"
        return self.class_spec(self._vocab_size, self.max_length, described, pad_id=self._pad_id)

    def pack(self, split: str, dataset: datasets.Dataset, spec: DataSpec) -> PackedSequences:
        return PackedSequences(
            dataset,
            spec.max_length,
            pad_to_longest=self.pad_to_longest,
            pad_id=spec.pad_id,
            truncation_side=self.truncation_side,
        )


def load_tokenizer(source: str) -> Any:
    """A tokenizer of the transformers library, which is imported only here."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ValueError(
            f"data.tokenizer={source!r} needs the transformers library: pip install 'approx-attn[hf]', "
            "or use data.tokenizer=null for bytes."
        ) from error
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:
        raise ValueError(
            f"data.tokenizer={source!r} could not be loaded; it must be null for bytes, or the hub id or folder of a "
            f"tokenizer ({str(error).splitlines()[0]})."
        ) from error


def tokenize(batch: dict[str, list[str]], tokenizer: Any, column: str, max_length: int) -> dict[str, Any]:
    """Token ids of a batch of texts, for `datasets.Dataset.map`."""
    return {
        "tokens": tokenizer([text or "" for text in batch[column]], truncation=True, max_length=max_length)["input_ids"]
    }
