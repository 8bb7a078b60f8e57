"""Grey CIFAR-10, or any set of square images, as sequences of pixel tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image

from approx_attn.data.base import DataSpec
from approx_attn.data.cache import quiet_datasets
from approx_attn.data.labelled import LabelledData
from approx_attn.data.packing import BYTE_VOCAB_SIZE, PackedSequences
from approx_attn.data.sources import require_column

KNOWN_COLUMNS = ("pixels", "image", "img")


@dataclass(kw_only=True, eq=False, repr=False)
class LabelledImages(LabelledData):
    """Base of modules that classify images.

    Args:
        pixel_column: column with images, or with the bytes of square grey images row by row; if None, the first of
            pixels, image and img that there is.
        resolution: side in pixels.
    """

    pixel_column: str | None = None
    resolution: int = 32

    input_kind = "image"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_counts(resolution=1)

    def find_inputs(self, splits: dict[str, datasets.Dataset]) -> str:
        there = splits["train"].column_names
        column = self.pixel_column or next((known for known in KNOWN_COLUMNS if known in there), None)
        if column is None:
            raise ValueError(
                f"data.pixel_column must name the column with the images of data.path={self.path!r}, "
                f"which has: {', '.join(there)}."
            )
        for split in splits.values():
            require_column(split, column, "data.pixel_column", str(self.path))
        return column


@dataclass(kw_only=True, eq=False, repr=False)
class Cifar10Data(LabelledImages):
    """Square images turned grey and read row by row, one token per pixel (its grey value + 1).

    The Image task of the Long Range Arena, if the images are those of CIFAR-10 (Krizhevsky, 2009).

    Args:
        resolution: side in pixels; smaller than that of the images, it must divide it, and blocks are averaged.

    Other options: see `LabelledImages`, `LabelledData` and `SequenceDataModule`.
    """

    batch_size: int = 64
    eval_batch_size: int = 128

    def read_inputs(self, splits: dict[str, datasets.Dataset], column: str) -> dict[str, datasets.Dataset]:
        """The pixels of every image at the resolution wanted."""
        return {
            name: datasets.Dataset.from_dict({"tokens": [self._shrunk(image) for image in self._grey(split, column)]})
            for name, split in splits.items()
        }

    def _grey(self, split: datasets.Dataset, column: str) -> list[np.ndarray]:
        if isinstance(split.features[column], datasets.Image):
            with quiet_datasets():
                return [np.asarray(row[column].convert("L")) for row in split]
        path = str(self.path)
        return [as_square(pixels, column, path) for pixels in raw_bytes(split, column, path)]

    def _shrunk(self, image: np.ndarray) -> bytes:
        return shrink(image, self.resolution).tobytes()

    def pack_inputs(self, inputs: Sequence[str], spec: DataSpec) -> PackedSequences:
        pixels = [self._shrunk(read_grey(path)) for path in inputs]
        return self.pack("test", datasets.Dataset.from_dict({"tokens": pixels}), spec)

    def make_spec(self) -> DataSpec:
        side = self.resolution
        return self.class_spec(BYTE_VOCAB_SIZE, side**2, f"grey images of {self.path}, {side} × {side} pixels")


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
