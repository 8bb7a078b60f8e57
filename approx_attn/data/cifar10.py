"""Grey CIFAR-10, or any set of square images, as sequences of pixel tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image

from approx_attn.data.base import DataSpec, SequenceDataModule, require_count
from approx_attn.data.cache import quiet_datasets
from approx_attn.data.packing import BYTE_VOCAB_SIZE, PackedSequences
from approx_attn.data.sources import carve, checked_splitting, class_labels, load_source, require_column, with_labels

KNOWN_COLUMNS = ("pixels", "image", "img")


class Cifar10Data(SequenceDataModule):
    """Square images turned grey and read row by row, one token per pixel (its grey value + 1).

    The Image task of the Long Range Arena, if the images are those of CIFAR-10 (Krizhevsky, 2009).

    Args:
        path: hub id, local folder or file; required.
        name: configuration of a hub data set that has several.
        pixel_column: column with images, or with raw grey bytes row by row; if None, the first of pixels, image and
            img that there is.
        label_column: column with the classes.
        resolution: side in pixels; smaller than that of the images, it must divide it, and blocks are averaged.
        train_split, val_split, test_split, val_share, test_share, train_size, val_size, test_size, data_seed: see
            `TextClassificationData`.
        batch_size, eval_batch_size, num_workers, seed: see `SequenceDataModule`.

    YAML:
        _target_: approx_attn.data.cifar10.Cifar10Data
        batch_size: 64
        eval_batch_size: 128
        num_workers: 0
        seed: 0
        path: ???
        name: null
        pixel_column: null
        label_column: label
        resolution: 32
        train_split: train
        val_split: null
        test_split: test
        val_share: 0.1
        test_share: null
        train_size: null
        val_size: null
        test_size: null
        data_seed: 0
    """

    has_static_spec = False
    input_kind = "image"

    def __init__(
        self,
        *,
        path: str | None = None,
        name: str | None = None,
        pixel_column: str | None = None,
        label_column: str = "label",
        resolution: int = 32,
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = "test",
        val_share: float = 0.1,
        test_share: float | None = None,
        train_size: int | None = None,
        val_size: int | None = None,
        test_size: int | None = None,
        data_seed: int = 0,
        batch_size: int = 64,
        eval_batch_size: int | None = 128,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, num_workers=num_workers, seed=seed)
        if not path:
            raise ValueError("data.path must be a local folder or file, or a hub id, got nothing.")
        self.path, self.name = str(path), name
        self.pixel_column, self.label_column = pixel_column, label_column
        self.resolution = require_count("data.resolution", resolution)
        self.splitting = checked_splitting(
            train_split, val_split, test_split, val_share, test_share, (train_size, val_size, test_size), data_seed
        )
        self._class_names: tuple[str, ...] = ()

    def prepare_data(self) -> None:
        load_source(self.path, self.name)

    def make_splits(self) -> dict[str, datasets.Dataset]:
        source = load_source(self.path, self.name)
        splits = carve(source, self.path, **self.splitting)
        column = self._find_pixels(splits["train"])
        for split in splits.values():
            require_column(split, column, "data.pixel_column", self.path)
            require_column(split, self.label_column, "data.label_column", self.path)
        labels, self._class_names = class_labels(
            source[self.splitting["train_split"]], splits, self.label_column, self.path
        )
        return {
            name: with_labels(
                datasets.Dataset.from_dict({"tokens": self._read(split.select_columns([column]), column)}),
                labels[name],
            )
            for name, split in splits.items()
        }

    def _find_pixels(self, split: datasets.Dataset) -> str:
        if self.pixel_column is not None:
            return self.pixel_column
        for column in KNOWN_COLUMNS:
            if column in split.column_names:
                return column
        raise ValueError(
            f"data.pixel_column must name the column with the images of data.path={self.path!r}, "
            f"which has: {', '.join(split.column_names)}."
        )

    def _read(self, split: datasets.Dataset, column: str) -> list[bytes]:
        """The pixels of every image at the resolution wanted."""
        if isinstance(split.features[column], datasets.Image):
            with quiet_datasets():
                grey = [np.asarray(row[column].convert("L")) for row in split]
        else:
            grey = [as_square(pixels, column, self.path) for pixels in raw_bytes(split, column, self.path)]
        return [shrink(image, self.resolution).tobytes() for image in grey]

    def pack_inputs(self, inputs: Sequence[str], spec: DataSpec) -> PackedSequences:
        pixels = [shrink(read_grey(path), self.resolution).tobytes() for path in inputs]
        return self.pack("test", datasets.Dataset.from_dict({"tokens": pixels}), spec)

    def make_spec(self) -> DataSpec:
        return DataSpec(
            kind="classification",
            vocab_size=BYTE_VOCAB_SIZE,
            num_classes=len(self._class_names),
            class_names=self._class_names,
            max_length=self.resolution**2,
            causal=False,
            describe=f"grey images of {self.path}, {self.resolution} × {self.resolution} pixels",
        )


def read_grey(path: str, side: int | None = None) -> np.ndarray:
    """(height, width) uint8 of an image file, scaled to a square of `side` pixels if that is given."""
    with Image.open(path) as image:
        grey = image.convert("L")
    return np.asarray(grey if side is None else grey.resize((side, side), Image.Resampling.BOX))


def raw_bytes(split: datasets.Dataset, column: str, path: str) -> list[bytes]:
    """The items of a binary column."""
    table = split.with_format("arrow")[:]
    kind = table.column(column).type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise ValueError(
            f"data.pixel_column={column!r} of data.path={path!r} must hold images or bytes, it holds {kind}."
        )
    return table.column(column).to_pylist()


def as_square(pixels: bytes, column: str, path: str) -> np.ndarray:
    """(side, side) uint8 from the bytes of a grey image, row by row."""
    side = math.isqrt(len(pixels))
    if side * side != len(pixels):
        raise ValueError(
            f"data.pixel_column={column!r} of data.path={path!r} must hold square grey images, one byte per pixel; "
            f"an item has {len(pixels)} bytes."
        )
    return np.frombuffer(pixels, np.uint8).reshape(side, side)


def shrink(image: np.ndarray, side: int) -> np.ndarray:
    """(side, side) uint8: means of blocks of a (k · side, k · side) image, rounded."""
    height, width = image.shape
    if height != width or height % side:
        raise ValueError(f"data.resolution must divide the side of square images, got {side} for {height} × {width}.")
    k = height // side
    if k == 1:
        return image
    return np.rint(image.reshape(side, k, side, k).mean(axis=(1, 3))).astype(np.uint8)
