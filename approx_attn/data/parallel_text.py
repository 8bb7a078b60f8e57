"""Sentences and their translations: two line-aligned files, or two columns of any source."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import datasets

from approx_attn.data.base import DataSpec
from approx_attn.data.sources import CarvedSourceData, load_source, read_text, require_column
from approx_attn.data.translation import FIRST_WORD, PackedSentencePairs

UNKNOWN = FIRST_WORD
"""Token id, in both languages, of words that are not in the vocabulary."""


@dataclass(kw_only=True, eq=False, repr=False)
class ParallelTextData(CarvedSourceData):
    """Translation of any text by words; a word is what stands between spaces.

    The words of a language are the most frequent of its training split, all others are one unknown word, which the
    metrics count as a word like any other. Batches: see `approx_attn.data.translation.PackedSentencePairs`; alignments
    are not known.

    Args:
        path, name, train_split, val_split, test_split, val_share, test_share, train_size, val_size, test_size,
            data_seed: see `CarvedSourceData`; or, with `target_path`, `path` is a text file with one source sentence
            per line, of which `test_share` is set aside for the test.
        target_path: a text file with the translation of each line of `path`; None where `path` has both.
        source_column, target_column: columns with the sentences, where `path` has both.
        vocabulary_size: words of a language, at most, those for padding, beginning, end and unknown words included.
        max_length: words of a sentence, its end included; longer ones are cut.
    """

    path: str | None = None
    target_path: str | None = None
    source_column: str = "source"
    target_column: str = "target"
    vocabulary_size: int = 8_000
    max_length: int = 64
    pad_to_longest: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_counts(vocabulary_size=UNKNOWN + 2, max_length=2)
        self.words: dict[str, list[str]] = {"source": [], "target": []}
        """By side, the words with token ids from `UNKNOWN` + 1 on, once the data have been read."""

    def make_spec(self) -> DataSpec:
        source, target = (UNKNOWN + 1 + len(self.words[side]) for side in ("source", "target"))
        return DataSpec(
            kind="translation",
            vocab_size=source,
            num_classes=target,
            max_length=self.max_length,
            causal=False,
            describe=f"translation of {self.path}, {source:,} and {target:,} words",
        )

    def prepare_data(self) -> None:
        self._read()

    def make_splits(self) -> dict[str, datasets.Dataset]:
        path = str(self.path)
        splits = self.carve(self._read())
        columns = {"source": self.source_column, "target": self.target_column}
        if self.target_path is not None:
            columns = {side: side for side in columns}
        sentences = {
            name: {side: texts(split, column, f"data.{side}_column", path) for side, column in columns.items()}
            for name, split in splits.items()
        }
        for side in columns:
            self.words[side] = frequent_words(sentences["train"][side], self.vocabulary_size - UNKNOWN - 1)
        ids = {side: {word: UNKNOWN + 1 + i for i, word in enumerate(words)} for side, words in self.words.items()}
        return {
            name: datasets.Dataset.from_dict(
                {
                    side: [[ids[side].get(word, UNKNOWN) for word in text.split()] for text in both[side]]
                    for side in columns
                }
            )
            for name, both in sentences.items()
        }

    def pack(self, split: str, dataset: datasets.Dataset, spec: DataSpec) -> PackedSentencePairs:
        return PackedSentencePairs(dataset, spec.max_length, pad_to_longest=self.pad_to_longest)

    def _read(self) -> dict[str, datasets.Dataset]:
        if self.target_path is None:
            return load_source(str(self.path), self.name)
        source = sentences_of(str(self.path), "data.path")
        target = sentences_of(self.target_path, "data.target_path")
        if len(source) != len(target):
            raise ValueError(
                f"data.target_path={self.target_path!r} must have as many lines as data.path={self.path!r}, "
                f"{len(source)}, got {len(target)}."
            )
        return {self.train_split: datasets.Dataset.from_dict({"source": source, "target": target})}


def sentences_of(path: str, key: str) -> list[str]:
    """The lines of a text file."""
    file = Path(os.path.expanduser(path))
    if not file.is_file():
        raise ValueError(f"{key} must be a text file where data.target_path is given, got {path!r}.")
    return read_text(file, key).splitlines()


def texts(dataset: datasets.Dataset, column: str, key: str, path: str) -> list[str]:
    """A column of sentences."""
    require_column(dataset, column, key, path)
    values = list(dataset[column])
    wrong = next((value for value in values if not isinstance(value, str)), None)
    if any(value is None for value in values) or wrong is not None:
        raise ValueError(f"{key}={column!r} of data.path={path!r} must hold text in every row, got {wrong!r}.")
    return values


def frequent_words(sentences: Iterable[str], count: int) -> list[str]:
    """The `count` most frequent words, the most frequent first and words as frequent by the alphabet."""
    occurrences = Counter(word for sentence in sentences for word in sentence.split())
    return sorted(occurrences, key=lambda word: (-occurrences[word], word))[:count]
