"""Reading a hub id, a local folder or a local file through the `datasets` library, with errors that name the key."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from approx_attn.data.base import SPLITS, SequenceDataModule, require_count_or_none, require_share
from approx_attn.data.cache import quiet_datasets
from approx_attn.errors import warn

READERS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".txt": "text",
    ".arrow": "arrow",
}
"""File ending -> reader of the `datasets` library."""
TEXT_FILES = (".csv", ".tsv", ".json", ".jsonl", ".txt")


@dataclass(kw_only=True, eq=False, repr=False)
class SourceData(SequenceDataModule):
    """Base of modules that read a hub id, a local folder or a local file.

    Args:
        path: the hub id, folder or file (parquet, csv, tsv, json, arrow, txt).
        name: configuration of a hub data set that has several.
        train_split, val_split, test_split: names of the source's splits. With `val_split` None, `val_share` of the
            training split is set aside for validation; with `test_split` None, `test_share` of it for the test.
        val_share, test_share: see `val_split`; `test_share` None means as much as `val_share`.
    """

    path: str | None = None
    name: str | None = None
    train_split: str = "train"
    val_split: str | None = None
    test_split: str | None = "test"
    val_share: float = 0.1
    test_share: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.path = None if self.path is None else str(self.path)
        val_share = require_share("data.val_share", self.val_share)
        test_share = val_share if self.test_share is None else require_share("data.test_share", self.test_share)
        if val_share + test_share >= 1.0:
            raise ValueError(f"data.val_share + data.test_share must be less than 1, got {val_share} + {test_share}.")
        self.shares = {"val": val_share, "test": test_share}
        self.source_splits = {"train": self.train_split, "val": self.val_split, "test": self.test_split}
        self._require_apart()

    def _require_apart(self) -> None:
        """Refuse to judge a model on what it was trained on; warn where the test is of what chose its checkpoint."""
        for key, split in (("data.test_split", self.test_split), ("data.val_split", self.val_split)):
            if split == self.train_split:
                raise ValueError(
                    f"{key} must be another split than data.train_split={split!r}, else a model is judged on what it "
                    "was trained on; null sets a share of that split aside."
                )
        if self.test_split is not None and self.test_split == self.val_split:
            warn(
                f"data.test_split={self.test_split!r} is data.val_split too, so the test is of what chose the "
                "checkpoint."
            )


@dataclass(kw_only=True, eq=False, repr=False)
class CarvedSourceData(SourceData):
    """Base of modules that draw the items of their splits from a source that must be given.

    Args:
        path, name, train_split, val_split, test_split, val_share, test_share: see `SourceData`; `path` is required.
        train_size, val_size, test_size: items drawn at random from each split; None for all.
        data_seed: seed of what is drawn and set aside. Apart from `seed`, so that runs with several seeds share a test
            set.
    """

    train_size: int | None = None
    val_size: int | None = None
    test_size: int | None = None
    data_seed: int = 0

    has_static_spec: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.path:
            raise ValueError("data.path must be a local folder or file, or a hub id, got nothing.")
        self.sizes = {
            name: require_count_or_none(f"data.{name}_size", getattr(self, f"{name}_size")) for name in SPLITS
        }
        self.require_counts(data_seed=0)

    def carve(self, source: dict[str, datasets.Dataset]) -> dict[str, datasets.Dataset]:
        """The splits "train", "val" and "test"; what is set aside does not depend on the size of the training split.

        Args:
            source: the splits at `path`.
        """
        path, rng = str(self.path), np.random.default_rng(self.data_seed)
        wanted = dict(self.source_splits)
        train = require_split(source, self.train_split, "data.train_split", path)
        if wanted["test"] not in source and is_file(path):
            wanted["test"] = None
        aside = {name: max(1, round(share * len(train))) for name, share in self.shares.items() if wanted[name] is None}
        splits = {
            name: require_split(source, split, f"data.{name}_split", path)
            for name, split in wanted.items()
            if split is not None
        }
        order = rng.permutation(len(train)) if aside else np.arange(len(train))
        for name, size in aside.items():
            splits[name], order = train.select(np.sort(order[:size])), order[size:]
        splits["train"] = train.select(np.sort(order)) if aside else train
        return {name: subsample(splits[name], self.sizes[name], f"data.{name}_size", rng) for name in SPLITS}


def load_source(path: str, name: str | None = None) -> dict[str, datasets.Dataset]:
    """The splits under a hub id or a local folder or file.

    Args:
        path: a folder with parquet, csv, tsv, json(l), txt or arrow files whose names tell the split, a folder
            written by `save_to_disk`, a single such file (which is the split "train"), or a hub id.
        name: configuration of a hub data set that has several, such as "sst2" of "glue".

    Raises:
        ValueError: nothing there that can be read; the message names `data.path` and says why.
    """
    local = Path(os.path.expanduser(path))
    if not local.exists():
        return load_from_hub(path, name)
    try:
        with quiet_datasets():
            if local.is_file():
                return load_files({"train": [str(local)]}, local.suffix)
            if (local / "dataset_dict.json").exists():
                return dict(datasets.load_from_disk(str(local)))
            if (local / "state.json").exists():
                return {"train": datasets.load_from_disk(str(local))}
            return dict(datasets.load_dataset(str(local), name))
    except Exception as error:
        found = ", ".join(sorted(entry.name for entry in local.iterdir())[:8]) if local.is_dir() else local.name
        for file in sorted(local.iterdir()) if local.is_dir() else [local]:
            if file.suffix in TEXT_FILES and file.is_file():
                read_text(file, "data.path")
        hint = "; a column is text in one file and not in another" if "Failed to parse" in one_line(error) else ""
        raise ValueError(
            f"data.path={path!r} holds no data set that can be read ({one_line(error)}{hint}); "
            f"expected files ending in {', '.join(READERS)}, found: {found or 'nothing'}."
        ) from error


def load_files(files: dict[str, list[str]], suffix: str) -> dict[str, datasets.Dataset]:
    """Splits from files of one kind, chosen by their ending."""
    if suffix not in READERS:
        raise ValueError(f"a file ending in {suffix!r}")
    options = {"delimiter": "\t"} if suffix == ".tsv" else {}
    return dict(datasets.load_dataset(READERS[suffix], data_files=files, **options))


def load_from_hub(path: str, name: str | None) -> dict[str, datasets.Dataset]:
    """A data set of the Hugging Face hub, from the network or from the local cache."""
    if path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise ValueError(f"data.path={path!r} does not exist; it must be a local folder or file, or a hub id.")
    try:
        return dict(datasets.load_dataset(path, name))
    except Exception as error:
        raise ValueError(
            f"data.path={path!r} is no local folder or file, and could not be read as a hub id ({one_line(error)})."
        ) from error


def read_text(path: str | Path, key: str) -> str:
    """The text of a file.

    Raises:
        ValueError: it is not UTF-8; the message names the key, the file and the line.
    """
    content = Path(path).read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{key}: line {line} of {path} is not UTF-8 text ({error.reason}).") from error


def one_line(error: BaseException) -> str:
    """The first line of the message of what an error came from, without a full stop."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


def require_split(splits: dict[str, datasets.Dataset], split: str, key: str, path: str) -> datasets.Dataset:
    """The split of this name."""
    if split not in splits:
        remedy = f" ({key}=null sets a share of one aside)" if key in ("data.val_split", "data.test_split") else ""
        raise ValueError(
            f"{key}={split!r} is not a split of data.path={path!r}, which has: {', '.join(splits)}{remedy}."
        )
    return splits[split]


def require_column(dataset: datasets.Dataset, column: str, key: str, path: str) -> None:
    """Raise unless the split has the column."""
    if column not in dataset.column_names:
        raise ValueError(
            f"{key}={column!r} is not a column of data.path={path!r}, which has: {', '.join(dataset.column_names)}."
        )


def is_file(path: str) -> bool:
    """Whether a source is a single file, which has the split "train" alone."""
    return Path(os.path.expanduser(path)).is_file()


def subsample(dataset: datasets.Dataset, size: int | None, key: str, rng: np.random.Generator) -> datasets.Dataset:
    """`size` items at random, in their order; all of them if `size` is None."""
    order = rng.permutation(len(dataset))
    if size is None:
        return dataset
    if size > len(dataset):
        raise ValueError(f"{key} must be at most the {len(dataset)} items that there are, got {size}.")
    return dataset.select(np.sort(order[:size]))


def require_texts(splits: dict[str, datasets.Dataset], column: str, path: str) -> None:
    """Refuse a column without text, and warn of empty texts and of tests that were trained on.

    Raises:
        ValueError: a split has no text at all, or what it has is no text.
    """
    where = f"data.text_column={column!r} of data.path={path!r}"
    texts = {name: split.with_format("arrow")[:].column(column) for name, split in splits.items()}
    for name, values in texts.items():
        kind = values.type
        if not any(check(kind) for check in (pa.types.is_null, *TEXT_TYPES, *BINARY_TYPES)):
            raise ValueError(f"{where} must hold text, it holds {kind}.")
        empty = values.null_count
        if any(check(kind) for check in TEXT_TYPES):
            empty += pc.sum(pc.equal(pc.utf8_trim_whitespace(values), "")).as_py() or 0
        if empty == len(values):
            raise ValueError(f"{where} must hold text, all {empty} rows of the {name} split are empty.")
        if empty:
            warn(f"{where} is empty in {empty} of {len(values)} rows of the {name} split.")
    if {"train", "test"} <= texts.keys() and texts["train"].type == texts["test"].type:
        known = pc.sum(pc.is_in(texts["test"], texts["train"])).as_py()
        if 2 * known > len(texts["test"]):
            warn(f"{where}: {known} of {len(texts['test'])} texts of the test split are in the training split too.")


TEXT_TYPES = (pa.types.is_string, pa.types.is_large_string)
BINARY_TYPES = (pa.types.is_binary, pa.types.is_large_binary)
