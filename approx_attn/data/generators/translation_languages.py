"""Meanings, and languages that say them: dictionary, word order, two-word concepts.

A sentence is one or more clauses; a clause is a subject, a verb, an object and at times an adverb; subject and object
are a noun with up to two adjectives; a clause after the first has a conjunction. Which concepts occur says nothing
about which others do.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import numpy as np

from approx_attn.data.translation import FIRST_WORD

COMMA, FULL_STOP = FIRST_WORD, FIRST_WORD + 1
"""Token ids, the same in all languages."""

CONCEPTS = {"noun": 40, "verb": 16, "adjective": 16, "adverb": 8, "conjunction": 4}
TWO_WORDS = {"noun": 10, "verb": 4}
"""Concepts of each class, and how many of them a language says with two words."""
NUM_CONCEPTS = sum(CONCEPTS.values())
FIRST_OF = dict(zip(CONCEPTS, accumulate((0, *CONCEPTS.values())), strict=False))
"""The lowest concept of each class."""
VOCABULARY_SIZE = FULL_STOP + 1 + NUM_CONCEPTS + sum(TWO_WORDS.values())

MAX_ADJECTIVES = 2
CLAUSE_WORDS = 2 * (MAX_ADJECTIVES + 2) + 2 + 1
"""Most words of a clause without conjunction and mark: two nouns and a verb of two words each, and an adverb."""

VERB_PLACES = ("middle", "last", "first")


@dataclass(frozen=True)
class Clause:
    """Concepts of a clause; subject and object are a noun and its adjectives."""

    subject: tuple[int, ...]
    verb: int
    object: tuple[int, ...]
    adverb: int | None
    conjunction: int | None


Said = list[tuple[int, int]]
"""Words of a sentence in their order, each with the place in the meaning that it says (see `Language.say`)."""


@dataclass(frozen=True)
class Language:
    """A language.

    Attributes:
        words: for every concept one token id, or two.
        verb_place: one of `VERB_PLACES`.
        adjectives_first: adjectives stand before their noun.
        adverb_first: adverbs open their clause instead of ending it.
    """

    words: tuple[tuple[int, ...], ...]
    verb_place: str
    adjectives_first: bool
    adverb_first: bool

    def say(self, meaning: list[Clause]) -> Said:
        """The words of a sentence; places count the concepts and marks of the meaning, the same in all languages."""
        said: Said = []
        place = 0
        for clause in meaning:
            places = _places(clause, place)
            if clause.conjunction is not None:
                said += [(COMMA, place), *self._words(clause.conjunction, place + 1)]
            said += self._clause(clause, places)
            place = max(places.values()) + 1
        return [*said, (FULL_STOP, place)]

    def _clause(self, clause: Clause, places: dict[str, int]) -> Said:
        subject = self._noun(clause.subject, places["subject"])
        object_ = self._noun(clause.object, places["object"])
        verb, *particle = self._words(clause.verb, places["verb"])
        orders = {"middle": [subject, [verb], object_], "last": [subject, object_, [verb]]}
        parts = orders.get(self.verb_place, [[verb], subject, object_])
        adverb = [] if clause.adverb is None else self._words(clause.adverb, places["adverb"])
        parts = [adverb, *parts] if self.adverb_first else [*parts, adverb]
        return [word for part in [*parts, particle] for word in part]

    def _noun(self, phrase: tuple[int, ...], place: int) -> Said:
        noun, *adjectives = phrase
        said = self._words(noun, place)
        described = [word for i, each in enumerate(adjectives) for word in self._words(each, place + 1 + i)]
        return [*described, *said] if self.adjectives_first else [*said, *described]

    def _words(self, concept: int, place: int) -> Said:
        return [(word, place) for word in self.words[concept]]


def _places(clause: Clause, first: int) -> dict[str, int]:
    """Where the parts of a clause stand in the meaning, behind a comma and a conjunction if it has them."""
    sizes = {
        "subject": len(clause.subject),
        "verb": 1,
        "object": len(clause.object),
        "adverb": 1,
        "end": 0,
    }
    start = first if clause.conjunction is None else first + 2
    return dict(zip(sizes, accumulate((start, *sizes.values())), strict=False))


@cache
def language(number: int) -> Language:
    """The language of a number: its dictionary at random, its word order by remainders (see `TranslationData`)."""
    rng = np.random.default_rng([number, 2104])
    ids = FULL_STOP + 1 + rng.permutation(VOCABULARY_SIZE - FULL_STOP - 1)
    words = [(int(word),) for word in ids[:NUM_CONCEPTS]]
    further = iter(ids[NUM_CONCEPTS:].tolist())
    for kind, count in TWO_WORDS.items():
        for offset in rng.choice(CONCEPTS[kind], count, replace=False):
            words[FIRST_OF[kind] + offset] += (next(further),)  # type: ignore[assignment]
    return Language(tuple(words), VERB_PLACES[number % 3], number % 2 == 0, number % 2 == 1)


def draw_meaning(rng: np.random.Generator, max_clauses: int) -> list[Clause]:
    """A sentence of one to `max_clauses` clauses."""

    def concept(kind: str) -> int:
        return int(FIRST_OF[kind] + rng.integers(CONCEPTS[kind]))

    def phrase() -> tuple[int, ...]:
        adjectives = FIRST_OF["adjective"] + rng.choice(CONCEPTS["adjective"], rng.integers(MAX_ADJECTIVES + 1), False)
        return (concept("noun"), *adjectives.tolist())

    return [
        Clause(
            subject=phrase(),
            verb=concept("verb"),
            object=phrase(),
            adverb=concept("adverb") if rng.random() < 0.5 else None,
            conjunction=concept("conjunction") if index else None,
        )
        for index in range(int(rng.integers(1, max_clauses + 1)))
    ]


def aligned_positions(source: Said, target: Said) -> list[int]:
    """Pairs of positions that say the same, as a flat list: target, source, target, source, …."""
    positions: dict[int, list[int]] = {}
    for position, (_, place) in enumerate(source):
        positions.setdefault(place, []).append(position)
    return [number for i, (_, place) in enumerate(target) for j in positions[place] for number in (i, j)]
