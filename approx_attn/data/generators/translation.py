"""Translation between generated languages, whose dictionaries, word orders and alignments are known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from approx_attn.data.base import DataSpec
from approx_attn.data.cache import GeneratedData
from approx_attn.data.generators.translation_languages import (
    CLAUSE_WORDS,
    VOCABULARY_SIZE,
    Language,
    aligned_positions,
    draw_meaning,
    language,
)
from approx_attn.data.translation import PackedSentencePairs


@dataclass(kw_only=True, eq=False, repr=False)
class TranslationData(GeneratedData):
    """A sentence in one generated language and its translation into another, with gold alignment.

    A meaning (clauses of concepts, see `translation_languages`) is drawn and said in both languages. A language has
    its own word for every concept, says 14 of 84 concepts with two words, and has its own word order:

        substitution       the dictionary, hidden in a permutation of the words
        local reordering   adjectives before or after their noun
        long reordering    the verb first, in the middle or last in its clause; the second word of a two-word verb
                           ends the clause, wherever the verb stands; the adverb opens the clause or ends it
        one-to-many        two-word nouns (side by side) and verbs (apart); many-to-one the other way round

    A target word is aligned to all source words of its concept, a comma and the full stop to themselves. Meanings
    depend on `data_seed` and the split alone, so all pairs of languages say the same, and either language can be
    exchanged while the other stays. Batches: see `approx_attn.data.translation.PackedSentencePairs`.

    Args:
        source_language, target_language: numbers of two different languages. A number decides the dictionary at
            random; the remainder by 3 the place of the verb (middle, last, first), that by 2 the place of
            adjectives (before, after their noun) and adverbs (end, beginning of the clause).
        max_clauses: a sentence has one clause to so many, equally often.

    Other options: see `GeneratedData` and `SequenceDataModule`.
    """

    batch_size: int = 64
    eval_batch_size: int = 250
    source_language: int = 0
    target_language: int = 1
    max_clauses: int = 2
    val_size: int = 500
    test_size: int = 1_000

    cache_name = "translation"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_counts(source_language=0, target_language=0, max_clauses=1)
        if self.source_language == self.target_language:
            raise ValueError(
                f"data.target_language must be another number than data.source_language={self.source_language}, "
                f"got {self.target_language}."
            )

    def decides(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("source_language", "target_language", "max_clauses")}

    def make_spec(self) -> DataSpec:
        return DataSpec(
            kind="translation",
            vocab_size=VOCABULARY_SIZE,
            num_classes=VOCABULARY_SIZE,
            max_length=self.max_clauses * (CLAUSE_WORDS + 2),  # with comma and conjunction, or full stop and END
            causal=False,
            describe=f"translation from language {self.source_language} into {self.target_language}",
        )

    def languages(self) -> tuple[Language, Language]:
        """Source and target, with their dictionaries."""
        return language(self.source_language), language(self.target_language)

    def generate(self, work: Path) -> dict[str, datasets.Dataset]:
        streams = np.random.SeedSequence(self.data_seed).spawn(len(self.sizes))
        return {
            name: self._pairs(np.random.default_rng(stream), size)
            for (name, size), stream in zip(self.sizes.items(), streams, strict=True)
        }

    def _pairs(self, rng: np.random.Generator, size: int) -> datasets.Dataset:
        source_language, target_language = self.languages()
        columns: dict[str, list[list[int]]] = {"source": [], "target": [], "alignment": []}
        for _ in range(size):
            meaning = draw_meaning(rng, self.max_clauses)
            source, target = source_language.say(meaning), target_language.say(meaning)
            columns["source"].append([word for word, _ in source])
            columns["target"].append([word for word, _ in target])
            columns["alignment"].append(aligned_positions(source, target))
        return datasets.Dataset.from_dict(columns)

    def pack(self, split: str, dataset: datasets.Dataset, spec: DataSpec) -> PackedSentencePairs:
        return PackedSentencePairs(dataset, spec.max_length, pad_to_longest=self.pad_to_longest)
