"""Sources with a column of inputs and a column of classes: their splits, and the numbers of their classes."""

from __future__ import annotations

from dataclasses import dataclass

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.table import InMemoryTable

from approx_attn.data.base import DataSpec
from approx_attn.data.packing import PAD
from approx_attn.data.sources import CarvedSourceData, load_source, require_column
from approx_attn.errors import warn


@dataclass(kw_only=True, eq=False, repr=False)
class LabelledData(CarvedSourceData):
    """Base of modules that classify what one column of a source holds.

    Args:
        path, name, train_split, val_split, test_split, val_share, test_share, train_size, val_size, test_size,
            data_seed: see `CarvedSourceData`; of a single file, which has no splits, `test_share` is set aside whatever
            `test_split` says.
        label_column: column with the classes, 0 … C − 1 or text.

    Subclasses implement `make_spec`, `find_inputs` and `read_inputs`.
    """

    label_column: str = "label"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.class_names: tuple[str, ...] = ()

    # -- for subclasses ----------------------------------------------------------------------------

    def find_inputs(self, splits: dict[str, datasets.Dataset]) -> str:
        """The column that holds the inputs; a ValueError where a split lacks it or it holds something else."""
        raise NotImplementedError

    def read_inputs(self, splits: dict[str, datasets.Dataset], column: str) -> dict[str, datasets.Dataset]:
        """Splits with this column alone, as `pack` reads them but for their labels."""
        raise NotImplementedError

    # -- the same for all --------------------------------------------------------------------------

    def prepare_data(self) -> None:
        load_source(str(self.path), self.name)

    def make_splits(self) -> dict[str, datasets.Dataset]:
        path = str(self.path)
        source = load_source(path, self.name)
        splits = self.carve(source)
        column = self.find_inputs(splits)
        for split in splits.values():
            require_column(split, self.label_column, "data.label_column", path)
        labels, self.class_names = class_labels(source[self.train_split], splits, self.label_column, path)
        inputs = self.read_inputs({name: split.select_columns([column]) for name, split in splits.items()}, column)
        return {name: with_labels(split, labels[name]) for name, split in inputs.items()}

    def class_spec(self, vocab_size: int, max_length: int, describe: str, pad_id: int = PAD) -> DataSpec:
        """The spec of a classification into the classes that were found."""
        return DataSpec(
            kind="classification",
            vocab_size=vocab_size,
            num_classes=len(self.class_names),
            class_names=self.class_names,
            max_length=max_length,
            causal=False,
            pad_id=pad_id,
            describe=describe,
        )


def class_labels(
    train: datasets.Dataset, splits: dict[str, datasets.Dataset], column: str, path: str
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Labels of each split as classes 0 … C − 1, and the names of the C classes.

    Whole numbers are taken as they are; other labels, such as text, are numbered in sorted order.

    Args:
        train: the whole training split of the source, which decides what classes there are.
        splits: the splits wanted.

    Raises:
        ValueError: labels that are missing, below 0, unknown in training, all the same or all different.
    """
    where = f"data.label_column={column!r} of data.path={path!r}"
    for name, split in {"train": train, **splits}.items():
        require_labels(split, column, f"{where} must hold one class per row", name)
    known = np.unique(column_values(train, column))
    require_learnable(known, len(train), where)
    numbered = np.issubdtype(known.dtype, np.integer)
    feature = train.features[column]
    names = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else tuple(map(str, known))
    if numbered:
        if known[0] < 0:
            raise ValueError(f"{where} must hold classes as whole numbers from 0 or as text, it has {known[0]}.")
        if not isinstance(feature, datasets.ClassLabel):
            if known[-1] >= 10 * len(known):
                warn(
                    f"{where} goes up to {known[-1]} with {len(known)} classes, so most outputs have nothing to learn."
                )
            names = tuple(map(str, range(int(known[-1]) + 1)))
        known = np.arange(len(names))
    classes = {}
    for name, split in splits.items():
        values = column_values(split, column)
        unknown = np.setdiff1d(values, known)
        if len(unknown):
            raise ValueError(
                f"{where} has the label {unknown[0].item()!r} in the {name} split, but the training split has "
                f"{', '.join(names[:8])}{', …' if len(names) > 8 else ''}."
            )
        classes[name] = values if numbered else np.searchsorted(known, values)
    return classes, names


def require_labels(dataset: datasets.Dataset, column: str, rule: str, split: str) -> None:
    """Raise unless every row has one label."""
    values = dataset.with_format("arrow")[:].column(column)
    if pa.types.is_nested(values.type):
        raise ValueError(f"{rule}, it holds {values.type}.")
    missing = pc.sum(values.is_null(nan_is_null=True)).as_py()
    if missing:
        raise ValueError(f"{rule}, it has none in {missing} of {len(dataset)} rows of the {split} split.")


def require_learnable(classes: np.ndarray, rows: int, where: str) -> None:
    """Refuse labels that no classifier learns from, and warn of those that hardly one does."""
    if len(classes) == 1:
        raise ValueError(f"{where} must hold two or more classes, the training split has only {classes[0].item()!r}.")
    if len(classes) == rows > 2:
        raise ValueError(
            f"{where} must hold classes that rows have in common, but all {rows} rows of the training split differ."
        )
    if 2 * len(classes) > rows > 2:
        warn(f"{where} has {len(classes)} classes in {rows} rows of the training split: fewer than two rows each.")


def column_values(dataset: datasets.Dataset, column: str) -> np.ndarray:
    """A column as one array."""
    return np.asarray(dataset.with_format("numpy")[column][:])


def with_labels(dataset: datasets.Dataset, labels: np.ndarray) -> datasets.Dataset:
    """The data set with the classes as its column `label`."""
    table = dataset.with_format("arrow")[:].append_column("label", pa.array(labels.astype(np.int64)))
    features = datasets.Features({**dataset.features, "label": datasets.Value("int64")})  # say how images are decoded
    return datasets.Dataset(InMemoryTable(table), info=datasets.DatasetInfo(features=features))
