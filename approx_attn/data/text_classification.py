"""Text classification by bytes or by a tokenizer, from a hub id or a local folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets

from approx_attn.data.base import DataSpec, SequenceDataModule, require_count, require_one_of
from approx_attn.data.cache import quiet_datasets
from approx_attn.data.packing import BYTE_VOCAB_SIZE, PAD, PackedSequences
from approx_attn.data.sources import (
    carve,
    checked_splitting,
    class_labels,
    load_source,
    require_column,
    require_texts,
    with_labels,
)


class TextClassificationData(SequenceDataModule):
    """Any text classification set with a text and a label column.

    Args:
        path: hub id, local folder (parquet, csv, tsv, json, arrow) or local file; required.
        name: configuration of a hub data set that has several.
        text_column, label_column: columns; labels are 0 … C − 1 or text.
        train_split, val_split, test_split: names of the source's splits. With `val_split` None, `val_share` of
            the training split is set aside for validation; with `test_split` None, or with a single file, which has no
            splits, `test_share` of it for the test.
        val_share, test_share: see `val_split`; `test_share` None means as much as `val_share`.
        train_size, val_size, test_size: items drawn at random from each split; None for all.
        data_seed: seed of these draws. Apart from `seed`, so that runs with several seeds share a test set.
        max_length: longest sequence in tokens; longer texts are cut.
        truncation_side: the end that is cut off, "right" or "left".
        tokenizer: None for bytes (byte v is token v + 1, 0 is padding), else the hub id or folder of a
            tokenizer of the transformers library, which must then be installed.
        batch_size, eval_batch_size, num_workers, seed, pad_to_longest: see `SequenceDataModule`.

    YAML:
        _target_: approx_attn.data.text_classification.TextClassificationData
        batch_size: 32
        eval_batch_size: 64
        num_workers: 0
        seed: 0
        pad_to_longest: false
        path: ???
        name: null
        text_column: text
        label_column: label
        train_split: train
        val_split: null
        test_split: test
        val_share: 0.1
        test_share: null
        train_size: null
        val_size: null
        test_size: null
        data_seed: 0
        max_length: 1000
        truncation_side: right
        tokenizer: null
    """

    has_static_spec = False
    input_kind = "text"

    def __init__(
        self,
        *,
        path: str | None = None,
        name: str | None = None,
        text_column: str = "text",
        label_column: str = "label",
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = "test",
        val_share: float = 0.1,
        test_share: float | None = None,
        train_size: int | None = None,
        val_size: int | None = None,
        test_size: int | None = None,
        data_seed: int = 0,
        max_length: int = 1000,
        truncation_side: str = "right",
        tokenizer: str | None = None,
        batch_size: int = 32,
        eval_batch_size: int | None = 64,
        num_workers: int = 0,
        seed: int = 0,
        pad_to_longest: bool = False,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            pad_to_longest=pad_to_longest,
        )
        if not path:
            raise ValueError("data.path must be a local folder or file, or a hub id, got nothing.")
        self.path, self.name = str(path), name
        self.text_column, self.label_column = text_column, label_column
        self.data_seed = require_count("data.data_seed", data_seed, least=0)
        self.splitting = checked_splitting(
            train_split, val_split, test_split, val_share, test_share, (train_size, val_size, test_size), data_seed
        )
        self.max_length = require_count("data.max_length", max_length)
        self.truncation_side = require_one_of("data.truncation_side", truncation_side, ("right", "left"))
        self.tokenizer = tokenizer
        self._class_names: tuple[str, ...] = ()
        self._vocab_size, self._pad_id = BYTE_VOCAB_SIZE, PAD

    def prepare_data(self) -> None:
        load_source(self.path, self.name)

    def make_splits(self) -> dict[str, datasets.Dataset]:
        source = load_source(self.path, self.name)
        splits = carve(source, self.path, **self.splitting)
        for split in splits.values():
            require_column(split, self.text_column, "data.text_column", self.path)
            require_column(split, self.label_column, "data.label_column", self.path)
        require_texts(splits, self.text_column, self.path)
        labels, self._class_names = class_labels(
            source[self.splitting["train_split"]], splits, self.label_column, self.path
        )
        tokens = self._tokens({name: split.select_columns([self.text_column]) for name, split in splits.items()})
        return {name: with_labels(split, labels[name]) for name, split in tokens.items()}

    def pack_inputs(self, inputs: Sequence[str], spec: DataSpec) -> PackedSequences:
        with quiet_datasets():
            split = self._tokens({"test": datasets.Dataset.from_dict({self.text_column: list(inputs)})})["test"]
        return self.pack("test", split, spec)

    def _tokens(self, splits: dict[str, datasets.Dataset]) -> dict[str, datasets.Dataset]:
        """Columns of texts as columns of tokens."""
        if self.tokenizer is None:
            return {name: split.rename_column(self.text_column, "tokens") for name, split in splits.items()}
        return self._tokenize(splits)

    def _tokenize(self, splits: dict[str, datasets.Dataset]) -> dict[str, datasets.Dataset]:
        """Token ids by the tokenizer, kept in the cache of the `datasets` library."""
        tokenizer = load_tokenizer(str(self.tokenizer))
        tokenizer.truncation_side = self.truncation_side
        self._vocab_size, self._pad_id = len(tokenizer), tokenizer.pad_token_id or 0
        options = {"tokenizer": tokenizer, "column": self.text_column, "max_length": self.max_length}
        return {
            name: split.map(
                tokenize, batched=True, remove_columns=[self.text_column], fn_kwargs=options, desc="tokenizing"
            )
            for name, split in splits.items()
        }

    def make_spec(self) -> DataSpec:
        unit = "bytes" if self.tokenizer is None else f"tokens of {self.tokenizer}"
        return DataSpec(
            kind="classification",
            vocab_size=self._vocab_size,
            num_classes=len(self._class_names),
            class_names=self._class_names,
            max_length=self.max_length,
            causal=False,
            pad_id=self._pad_id,
            describe=f"text classification of {self.path}, up to {self.max_length} {unit}",
        )

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
