"""Generated translation: planted dictionaries, word orders and alignments; sentence pairs in batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset

from approx_attn.data import IGNORE
from approx_attn.data.generators.translation import TranslationData
from approx_attn.data.generators.translation_languages import (
    COMMA,
    FIRST_OF,
    FULL_STOP,
    VOCABULARY_SIZE,
    Clause,
    aligned_positions,
    language,
)
from approx_attn.data.translation import BEGIN, END, PackedSentencePairs

NOUN, VERB, ADJECTIVE, ADVERB, CONJUNCTION = FIRST_OF.values()


def small(folder: Path, **options: int) -> TranslationData:
    sizes = {"train_size": 40, "val_size": 10, "test_size": 10}
    return TranslationData(cache_dir=str(folder), batch_size=8, **{**sizes, **options})


def one_word(number: int, first: int) -> int:
    """A concept of a class that a language says with one word."""
    return next(c for c in range(first, first + 40) if len(language(number).words[c]) == 1)


def two_words(number: int, first: int) -> int:
    return next(c for c in range(first, first + 40) if len(language(number).words[c]) == 2)


def said(number: int, meaning: list[Clause]) -> list[int]:
    return [word for word, _ in language(number).say(meaning)]


def test_a_language_has_a_word_of_its_own_for_everything() -> None:
    for number in (0, 1):
        words = [word for concept in language(number).words for word in concept]
        assert sorted(words) == list(range(FULL_STOP + 1, VOCABULARY_SIZE))
    assert language(0).words != language(1).words


def test_word_orders_are_those_of_the_number() -> None:
    s, v, o, a = ({n: language(n).words[one_word(n, first)] for n in range(3)} for first in (NOUN, VERB, NOUN, ADVERB))
    adjective = {n: language(n).words[ADJECTIVE] for n in range(3)}
    sentence = {
        n: said(n, [Clause((one_word(n, NOUN), ADJECTIVE), one_word(n, VERB), (one_word(n, NOUN),), ADVERB, None)])
        for n in range(3)
    }
    assert sentence[0] == [*adjective[0], *s[0], *v[0], *o[0], *a[0], FULL_STOP]
    assert sentence[1] == [*a[1], *s[1], *adjective[1], *o[1], *v[1], FULL_STOP]
    assert sentence[2] == [*v[2], *adjective[2], *s[2], *o[2], *a[2], FULL_STOP]


def test_two_words_of_a_verb_stand_apart_and_of_a_noun_together() -> None:
    noun, verb = two_words(0, NOUN), two_words(0, VERB)
    words = language(0).words
    stem, particle = words[verb]
    assert said(0, [Clause((noun,), verb, (noun,), ADVERB, None)]) == [
        *words[noun], stem, *words[noun], *words[ADVERB], particle, FULL_STOP
    ]  # fmt: skip


def test_alignment_is_that_of_the_concepts() -> None:
    subject, verb = two_words(0, NOUN), two_words(1, VERB)
    meaning = [
        Clause((subject,), one_word(0, VERB), (one_word(0, NOUN),), None, None),
        Clause((one_word(0, NOUN),), verb, (subject,), None, CONJUNCTION),
    ]
    source, target = language(0).say(meaning), language(1).say(meaning)
    pairs = aligned_positions(source, target)
    concepts = [
        {word: ("concept", i) for i, of in enumerate(language(n).words) for word in of}
        | {COMMA: ("comma",), FULL_STOP: ("stop",)}
        for n in (0, 1)
    ]
    there = list(zip(pairs[0::2], pairs[1::2], strict=True))
    for i, (word, _) in enumerate(target):
        aligned = [j for at, j in there if at == i]
        assert aligned, "no word is left without a source"
        assert {concepts[0][source[j][0]] for j in aligned} == {concepts[1][word]}
        assert len(aligned) == sum(1 for _, place in source if place == target[i][1])
    clauses = [word for word, _ in source].index(COMMA), [word for word, _ in target].index(COMMA)
    assert all((j < clauses[0]) == (i < clauses[1]) for i, j in there), "a concept of another clause is another one"


def test_a_batch_is_what_training_reads(tmp_path: Path) -> None:
    data = small(tmp_path)
    batch = next(iter(data.train_dataloader()))
    assert data.spec.max_length == 26
    assert batch["tokens"].shape == batch["tokens_b"].shape == batch["labels"].shape == (8, 26)
    assert batch["alignment"].shape == (8, 26, 26)
    assert (batch["tokens_b"][:, 0] == BEGIN).all()
    real = batch["labels"] != IGNORE
    assert torch.equal(real, batch["keep_b"])
    assert torch.equal(batch["labels"][:, :-1][real[:, 1:]], batch["tokens_b"][:, 1:][real[:, 1:]])
    for keep, sentence in ((batch["keep"], batch["tokens"]), (real, batch["labels"])):
        assert (sentence[torch.arange(8), keep.sum(1) - 1] == END).all()
    words = (batch["labels"] >= COMMA)[:, :, None] & (batch["tokens"] >= COMMA)[:, None]
    assert torch.equal(batch["alignment"].any(2), batch["labels"] >= COMMA)
    assert not batch["alignment"][~words].any()


def test_a_language_is_exchanged_while_the_other_stays(tmp_path: Path) -> None:
    first, other = (next(iter(small(tmp_path, source_language=n).val_dataloader())) for n in (0, 2))
    assert torch.equal(first["labels"], other["labels"])
    assert not torch.equal(first["tokens"], other["tokens"])


def test_long_sentences_are_cut_with_their_alignment() -> None:
    pairs = {"source": [[5, 6, 7]], "target": [[8, 9, 10]], "alignment": [[0, 2, 1, 1, 2, 0]]}
    batch = PackedSentencePairs(Dataset.from_dict(pairs), 3).__getitems__([0])
    assert batch["tokens"].tolist() == [[5, 6, END]]
    assert batch["labels"].tolist() == [[8, 9, END]]
    assert batch["alignment"].nonzero().tolist() == [[0, 1, 1]]


def test_impossible_languages_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.target_language must be another number .* got 3"):
        TranslationData(source_language=3, target_language=3)
    with pytest.raises(ValueError, match=r"data\.source_language must be"):
        TranslationData(source_language=-1)
