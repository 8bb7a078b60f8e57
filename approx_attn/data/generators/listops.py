"""ListOps: the value of a nested expression, as in the Long Range Arena."""

from __future__ import annotations

import hashlib
import itertools
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from datasets.table import InMemoryTable

from approx_attn.data.base import DataSpec, require_count_or_none
from approx_attn.data.cache import GeneratedData
from approx_attn.data.generators.listops_trees import VOCAB_SIZE, random_expressions
from approx_attn.data.shards import generate_shards

SHARD_SIZE = 2_000


@dataclass(kw_only=True, eq=False, repr=False)
class ListOpsData(GeneratedData):
    """Expressions such as `[MAX 2 [SM 7 8 ] 4 ]`; the class is the value, 0 to 9. Generated, no duplicates.

    The definition stands in `listops_trees`. The default is a short setting for small machines; the full
    setting of the Long Range Arena is max_depth 10, max_args 10, min_length 500, max_length 2000 and
    train/val/test sizes 96000/2000/2000. The expressions of all splits differ from each other.

    Args:
        max_depth: depth of the deepest digits (the outermost operator has depth 1).
        max_args: most arguments of an operator.
        min_length, max_length: min_length < tokens < max_length; brackets with their operator and closing
            brackets count. Sequences are padded to max_length.
        num_proc: processes that generate; all cores if None. Does not change the data.

    Other options: see `GeneratedData` and `SequenceDataModule`.
    """

    eval_batch_size: int = 128
    pad_to_longest: bool = False
    max_depth: int = 4
    max_args: int = 10
    min_length: int = 20
    max_length: int = 200
    num_proc: int | None = None

    cache_name = "listops"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_counts(max_depth=2, max_args=2, min_length=1)
        self.require_counts(max_length=self.min_length + 2)
        require_count_or_none("data.num_proc", self.num_proc)

    def decides(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("max_depth", "max_args", "min_length", "max_length")}

    def make_spec(self) -> DataSpec:
        return DataSpec(
            kind="classification",
            vocab_size=VOCAB_SIZE,
            num_classes=10,
            max_length=self.max_length,
            causal=False,
            describe=f"nested list operations of depth up to {self.max_depth}, "
            f"{self.min_length} < tokens < {self.max_length}",
        )

    def generate(self, work: Path) -> dict[str, datasets.Dataset]:
        return self.cut(self._different_expressions(sum(self.sizes.values()), work))

    def _different_expressions(self, count: int, work: Path) -> datasets.Dataset:
        """`count` expressions, the first of each kind in the order of the shards."""
        make = partial(make_shard, options=self.decides())
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
                    f"expressions that {self.decides()} yields: {len(seen)} in {shards * SHARD_SIZE} draws."
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
