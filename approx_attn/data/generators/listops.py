"""ListOps: the value of a nested expression, as in the Long Range Arena."""

from __future__ import annotations

import hashlib
import itertools
import math
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets.table import InMemoryTable

from approx_attn.data.base import DataSpec, SequenceDataModule, require_count, require_count_or_none
from approx_attn.data.cache import cached_splits
from approx_attn.data.generators.listops_trees import VOCAB_SIZE, random_expressions
from approx_attn.data.shards import generate_shards

SHARD_SIZE = 2_000


class ListOpsData(SequenceDataModule):
    """Expressions such as `[MAX 2 [SM 7 8 ] 4 ]`; the class is the value, 0 to 9. Generated, no duplicates.

    The definition stands in `listops_trees`. The default is a short setting for small machines; the full
    setting of the Long Range Arena is max_depth 10, max_args 10, min_length 500, max_length 2000 and
    train/val/test sizes 96000/2000/2000.

    Args:
        max_depth: depth of the deepest digits (the outermost operator has depth 1).
        max_args: most arguments of an operator.
        min_length, max_length: min_length < tokens < max_length; brackets with their operator and closing
            brackets count. Sequences are padded to max_length.
        train_size, val_size, test_size: expressions per split, different from each other over all splits.
        data_seed: seed of the generator.
        num_proc: processes that generate; all cores if None. Does not change the data.
        cache_dir: where the generated data is kept; the `datasets` library's cache if None. An interrupted
            generation goes on where it stopped.
        batch_size, eval_batch_size, num_workers, seed, pad_to_longest: see `SequenceDataModule`.

    YAML:
        _target_: approx_attn.data.generators.listops.ListOpsData
        batch_size: 32
        eval_batch_size: 128
        num_workers: 0
        seed: 0
        pad_to_longest: false
        max_depth: 4
        max_args: 10
        min_length: 20
        max_length: 200
        train_size: 20000
        val_size: 2000
        test_size: 2000
        data_seed: 0
        num_proc: null
        cache_dir: null
    """

    def __init__(
        self,
        *,
        batch_size: int = 32,
        eval_batch_size: int | None = 128,
        num_workers: int = 0,
        seed: int = 0,
        pad_to_longest: bool = False,
        max_depth: int = 4,
        max_args: int = 10,
        min_length: int = 20,
        max_length: int = 200,
        train_size: int = 20_000,
        val_size: int = 2_000,
        test_size: int = 2_000,
        data_seed: int = 0,
        num_proc: int | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            pad_to_longest=pad_to_longest,
        )
        self.options = {
            "max_depth": require_count("data.max_depth", max_depth, least=2),
            "max_args": require_count("data.max_args", max_args, least=2),
            "min_length": require_count("data.min_length", min_length),
            "max_length": require_count("data.max_length", max_length, least=min_length + 2),
        }
        self.sizes = {
            "train": require_count("data.train_size", train_size),
            "val": require_count("data.val_size", val_size),
            "test": require_count("data.test_size", test_size),
        }
        self.data_seed = require_count("data.data_seed", data_seed, least=0)
        self.num_proc = require_count_or_none("data.num_proc", num_proc)
        self.cache_dir = cache_dir

    def make_spec(self) -> DataSpec:
        low, high = self.options["min_length"], self.options["max_length"]
        return DataSpec(
            kind="classification",
            vocab_size=VOCAB_SIZE,
            num_classes=10,
            max_length=high,
            causal=False,
            describe=f"nested list operations of depth up to {self.options['max_depth']}, {low} < tokens < {high}",
        )

    def prepare_data(self) -> None:
        self.make_splits()

    def make_splits(self) -> dict[str, datasets.Dataset]:
        recipe: dict[str, Any] = {**self.options, **self.sizes, "data_seed": self.data_seed, "version": 1}
        return cached_splits("listops", recipe, self._generate, self.cache_dir)

    def _generate(self, work: Path) -> dict[str, datasets.Dataset]:
        everything = self._different_expressions(sum(self.sizes.values()), work)
        splits, start = {}, 0
        for name, size in self.sizes.items():
            splits[name] = everything.select(range(start, start + size))
            start += size
        return splits

    def _different_expressions(self, count: int, work: Path) -> datasets.Dataset:
        """`count` expressions, the first of each kind in the order of the shards."""
        make = partial(make_shard, options=self.options)
        parts: list[datasets.Dataset] = []
        seen: set[bytes] = set()
        shards = 0
        while len(seen) < count:
            more = max(1, math.ceil((count - len(seen)) / SHARD_SIZE))
            drawn = generate_shards(
                make,
                range(shards, shards + more),
                seed=self.data_seed,
                folder=work,
                num_proc=self.num_proc,
                describe="generating listops",
            )
            shards += more
            new = first_of_each(drawn, seen)
            if 100 * len(new) < len(drawn):
                raise ValueError(
                    f"data.train_size + data.val_size + data.test_size = {count} is more than the different "
                    f"expressions that {self.options} yields: {len(seen)} in {shards * SHARD_SIZE} draws."
                )
            parts.append(drawn.select(new))
        return datasets.concatenate_datasets(parts).select(range(count))


def make_shard(rng: np.random.Generator, options: dict[str, int]) -> datasets.Dataset:
    """`SHARD_SIZE` random expressions with columns `tokens` and `label`."""
    drawn = random_expressions(rng, SHARD_SIZE, **options)
    offsets = np.concatenate(([0], np.cumsum(drawn.lengths))).astype(np.int32)
    tokens = pa.ListArray.from_arrays(pa.array(offsets), pa.array(drawn.tokens))
    table = pa.table({"tokens": tokens, "label": pa.array(drawn.values)})
    return datasets.Dataset(InMemoryTable(table))


def first_of_each(drawn: datasets.Dataset, seen: set[bytes]) -> list[int]:
    """Rows whose tokens are not in `seen` and not in an earlier row; adds their digests to `seen`."""
    new = []
    for start in range(0, len(drawn), SHARD_SIZE):
        column = drawn.with_format("arrow")[start : start + SHARD_SIZE].column("tokens").combine_chunks()
        values, offsets = column.values.to_numpy(), column.offsets.to_numpy()
        for row, (low, high) in enumerate(itertools.pairwise(offsets), start):
            digest = hashlib.blake2b(values[low:high].tobytes(), digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                new.append(row)
    return new
