"""Document retrieval with two towers: does one paper cite the other?"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from approx_attn.data.base import SPLITS, DataSpec, SequenceDataModule, require_count_or_none
from approx_attn.data.cache import cached_splits, quiet_datasets
from approx_attn.data.packing import BYTE_VOCAB_SIZE
from approx_attn.data.sources import one_line, subsample

AAN_FILES = {"train": "new_aan_pairs.train.tsv", "val": "new_aan_pairs.eval.tsv", "test": "new_aan_pairs.test.tsv"}
AAN_COLUMNS = ["label", "id_a", "id_b", "text_a", "text_b"]
SAMPLE_SIZES = {"train": 2_000, "val": 500, "test": 500}
SAMPLE_TOPICS = 8
SAMPLE_LETTERS = 5  # that the words of a topic are spelt with


@dataclass(kw_only=True, eq=False, repr=False)
class RetrievalData(SequenceDataModule):
    """Pairs of documents by bytes and whether they belong together; 2 classes.

    With a path, the pairs of the ACL Anthology Network as the Long Range Arena lays them out (Radev et al. 2013;
    Tay et al. 2021): tab-separated files without a header and with the columns label, id, id, text, text. Without a
    path, a small generated sample, for trying things out: a document is a row of words of one of eight topics,
    spelt with the letters of the topic, among words of no topic, and documents of one topic belong together.

    Args:
        path: folder with new_aan_pairs.{train,eval,test}.tsv; None for the generated sample.
        max_length: bytes of a document; longer ones are cut.
        train_size, val_size, test_size: pairs drawn at random from each split, None for all; of the generated
            sample, pairs made (2000/500/500 if None).
        data_seed: seed of these draws and of the sample.
        cache_dir: where the generated sample is kept; the `datasets` library's cache if None.

    Other options: see `SequenceDataModule`.
    """

    eval_batch_size: int = 64
    pad_to_longest: bool = False
    path: str | None = None
    max_length: int = 4000
    train_size: int | None = None
    val_size: int | None = None
    test_size: int | None = None
    data_seed: int = 0
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_counts(max_length=16, data_seed=0)
        self.sizes = {
            name: require_count_or_none(f"data.{name}_size", getattr(self, f"{name}_size")) for name in SPLITS
        }

    def make_spec(self) -> DataSpec:
        source = "generated documents" if self.path is None else f"documents of {self.path}"
        return DataSpec(
            kind="classification",
            vocab_size=BYTE_VOCAB_SIZE,
            num_classes=2,
            max_length=self.max_length,
            causal=False,
            two_towers=True,
            describe=f"pairs of {source}, up to {self.max_length} bytes each",
        )

    def prepare_data(self) -> None:
        self.make_splits()

    def make_splits(self) -> dict[str, datasets.Dataset]:
        if self.path is None:
            sizes = {name: size or SAMPLE_SIZES[name] for name, size in self.sizes.items()}
            recipe: dict[str, Any] = {**sizes, "length": self.max_length, "data_seed": self.data_seed, "version": 2}
            return cached_splits("retrieval", recipe, lambda work: self._generate(sizes), self.cache_dir)
        rng = np.random.default_rng(self.data_seed)
        return {
            name: subsample(pairs, self.sizes[name], f"data.{name}_size", rng)
            for name, pairs in load_aan(self.path).items()
        }

    def _generate(self, sizes: dict[str, int]) -> dict[str, datasets.Dataset]:
        topics = make_topics(np.random.default_rng([self.data_seed, 0]))
        return {
            name: make_pairs(np.random.default_rng([self.data_seed, stream]), size, topics, self.max_length)
            for stream, (name, size) in enumerate(sizes.items(), start=1)
        }


def load_aan(path: str) -> dict[str, datasets.Dataset]:
    """The three splits under a folder, with columns `tokens`, `tokens_b` (texts) and `label`."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"data.path={path!r} is no folder; it must hold {', '.join(AAN_FILES.values())}.")
    missing = [file for file in AAN_FILES.values() if not (folder / file).exists()]
    if missing:
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise ValueError(f"data.path={path!r} lacks {', '.join(missing)}; found: {found}.")
    files = {name: str(folder / file) for name, file in AAN_FILES.items()}
    try:
        with quiet_datasets():
            splits = datasets.load_dataset(
                "csv",
                data_files=files,
                delimiter="\t",
                column_names=AAN_COLUMNS,
                quoting=csv.QUOTE_NONE,
                features=datasets.Features(
                    {name: datasets.Value("float32" if name == "label" else "string") for name in AAN_COLUMNS}
                ),
            )
    except Exception as error:
        raise ValueError(
            f"data.path={path!r} holds files that cannot be read as tab-separated label, id, id, text, text "
            f"({one_line(error)})."
        ) from error
    whole = datasets.Value("int64")
    return {
        name: split.select_columns(["label", "text_a", "text_b"])
        .rename_columns({"text_a": "tokens", "text_b": "tokens_b"})
        .cast_column("label", whole)
        for name, split in splits.items()
    }


# -- the generated sample --------------------------------------------------------------------------


def make_topics(rng: np.random.Generator) -> list[np.ndarray]:
    """Forty words for each topic, spelt with the few letters of the topic, and, last, the words of no topic.

    Letters tell topics apart, so that a small model learns the sample from its few pairs.
    """
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    alphabets = [rng.choice(letters, size=SAMPLE_LETTERS, replace=False) for _ in range(SAMPLE_TOPICS)]
    topics = [different_words(rng, alphabet, 40) for alphabet in alphabets]
    return [*topics, different_words(rng, letters, 400)]


def different_words(rng: np.random.Generator, letters: np.ndarray, count: int) -> np.ndarray:
    """`count` random words of 3 to 8 letters."""
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(rng.choice(letters, size=rng.integers(3, 9)))] = None
    return np.array(list(words))


def make_pairs(rng: np.random.Generator, count: int, topics: list[np.ndarray], length: int) -> datasets.Dataset:
    """Pairs of documents; half of them, at random, of the same topic."""
    labels = rng.integers(2, size=count)
    first = rng.integers(SAMPLE_TOPICS, size=count)
    second = np.where(labels == 1, first, (first + rng.integers(1, SAMPLE_TOPICS, size=count)) % SAMPLE_TOPICS)
    return datasets.Dataset.from_dict(
        {
            "tokens": [make_document(rng, topic, topics, length) for topic in first],
            "tokens_b": [make_document(rng, topic, topics, length) for topic in second],
            "label": labels,
        }
    )


def make_document(rng: np.random.Generator, topic: int, topics: list[np.ndarray], length: int) -> str:
    """Between half of `length` and `length` bytes of words, a third of them of the topic."""
    wanted = int(rng.integers(length // 2, length + 1))
    about = rng.random(wanted) < 1 / 3
    words = np.where(about, rng.choice(topics[topic], size=wanted), rng.choice(topics[-1], size=wanted))
    return " ".join(words[: wanted // 4 + 1])[:wanted]
