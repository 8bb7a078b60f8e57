"""Multi-query associative recall: a task whose scores are decided by content alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from approx_attn.data.base import DataSpec, require_flag, require_positive_number
from approx_attn.data.cache import GeneratedData
from approx_attn.data.packing import IGNORE


@dataclass(kw_only=True, eq=False, repr=False)
class MQARData(GeneratedData):
    """Sequences of key-value pairs followed by queries; at a query the model must name the key's value.

    Keys are 1 … V/2 − 1 and values V/2 … V − 1, distinct within a sequence. After the pairs, each key comes
    once more, in a slot drawn by a power law (p ∝ i^(a−1)) without replacement; its label is its value, and
    labels elsewhere are ignored. All other positions hold random tokens. With two pairs (V = 16):

        tokens   3 12 | 5 9 | 3  7 | 14 2 | 5  11 …
        labels   .  . | . . | 12 . | .  . | 9  .  …

    Each split has its own stream of `data_seed`.

    Source: Arora et al., Zoology: Measuring and Improving Recall in Efficient Language Models (ICLR 2024).

    Args:
        vocab_size: V, even.
        length: tokens in a sequence; even, at least 4 · num_pairs.
        num_pairs: key-value pairs, each queried once.
        power: a; the smaller it is, the closer queries stand to the pairs.
        random_filler: random tokens between the queries; if False, token 0.

    Other options: see `GeneratedData` and `SequenceDataModule`.
    """

    batch_size: int = 64
    eval_batch_size: int = 250
    vocab_size: int = 64
    length: int = 64
    num_pairs: int = 8
    power: float = 0.01
    random_filler: bool = True
    val_size: int = 1_000

    cache_name = "mqar"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_counts(num_pairs=1, length=1, vocab_size=1)
        pairs = self.num_pairs
        if self.length % 2 or self.length < 4 * pairs:
            raise ValueError(
                f"data.length must be even and at least 4 · data.num_pairs = {4 * pairs}, got {self.length!r}."
            )
        if self.vocab_size % 2 or self.vocab_size // 2 - 1 < pairs:
            raise ValueError(
                f"data.vocab_size must be even and at least {2 * pairs + 2} for data.num_pairs={pairs} "
                f"different keys, got {self.vocab_size!r}."
            )
        self.power = require_positive_number("data.power", self.power)
        require_flag("data.random_filler", self.random_filler)

    def decides(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("vocab_size", "length", "num_pairs", "power", "random_filler")}

    def make_spec(self) -> DataSpec:
        return DataSpec(
            kind="token_prediction",
            vocab_size=self.vocab_size,
            num_classes=self.vocab_size,
            max_length=self.length,
            causal=True,
            describe=f"recall of {self.num_pairs} key-value pairs in {self.length} tokens",
        )

    def generate(self, work: Path) -> dict[str, datasets.Dataset]:
        streams = np.random.SeedSequence(self.data_seed).spawn(len(self.sizes))
        splits = {}
        for (name, size), stream in zip(self.sizes.items(), streams, strict=True):
            tokens, labels = associative_recall(np.random.default_rng(stream), size, **self.decides())
            splits[name] = datasets.Dataset.from_dict({"tokens": tokens, "labels": labels})
        return splits


def associative_recall(
    rng: np.random.Generator,
    num_sequences: int,
    *,
    vocab_size: int,
    length: int,
    num_pairs: int,
    power: float,
    random_filler: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and labels, both (num_sequences, length) int32; see `MQARData` for what they mean."""
    half = vocab_size // 2
    keys = 1 + distinct(rng, num_sequences, num_pairs, np.zeros(half - 1))  # (N, pairs)
    values = half + distinct(rng, num_sequences, num_pairs, np.zeros(vocab_size - half))  # (N, pairs)

    slots = (length - 2 * num_pairs) // 2  # a query and the position after it
    log_law = (power - 1.0) * np.log(np.arange(1, slots + 1))
    queries = 2 * num_pairs + 2 * distinct(rng, num_sequences, num_pairs, log_law)  # positions, (N, pairs)

    shape = (num_sequences, length)
    tokens = rng.integers(vocab_size, size=shape, dtype=np.int32) if random_filler else np.zeros(shape, np.int32)
    tokens[:, 0 : 2 * num_pairs : 2] = keys
    tokens[:, 1 : 2 * num_pairs : 2] = values
    np.put_along_axis(tokens, queries, keys.astype(np.int32), axis=1)
    labels = np.full(shape, IGNORE, np.int32)
    np.put_along_axis(labels, queries, values.astype(np.int32), axis=1)
    return tokens, labels


def distinct(rng: np.random.Generator, rows: int, count: int, log_weights: np.ndarray) -> np.ndarray:
    """(rows, count) different indices per row, drawn one after another with probability ∝ exp(log_weights).

    The largest of log-weights plus Gumbel noise, in falling order, have exactly that distribution.
    """
    chosen = np.empty((rows, count), np.int64)
    chunk = max(1, 2**22 // len(log_weights))  # bounds the noise held at once to 32 MB
    for start in range(0, rows, chunk):
        stop = min(start + chunk, rows)
        race = rng.gumbel(size=(stop - start, len(log_weights))) + log_weights
        top = np.argpartition(-race, count - 1, axis=1)[:, :count]
        order = np.argsort(-np.take_along_axis(race, top, axis=1), axis=1)
        chosen[start:stop] = np.take_along_axis(top, order, axis=1)
    return chosen
