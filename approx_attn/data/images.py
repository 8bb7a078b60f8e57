"""Images as arrays of pixels, for models that cut them into patches themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from approx_attn.data.base import DataSpec, SequenceDataModule, require_count
from approx_attn.data.cache import quiet_datasets
from approx_attn.data.cifar10 import KNOWN_COLUMNS, as_square
from approx_attn.data.sources import carve, checked_splitting, class_labels, load_source, require_column, with_labels


class ImageClassificationData(SequenceDataModule):
    """Any set of labelled images; batches hold `pixels` (b, channels, resolution, resolution) float32 and `labels`.

    Args:
        path: hub id, local folder or file; required.
        name: configuration of a hub data set that has several.
        pixel_column: column with images, or with the bytes of square grey images row by row; if None, the first of
            pixels, image and img that there is.
        label_column: column with the classes.
        resolution: side in pixels that images are scaled to; what the model declares.
        channels: 3 for colour, 1 for grey.
        mean, std: pixels from 0 to 1 become (pixel − mean) / std.
        train_split, val_split, test_split, val_share, test_share, train_size, val_size, test_size, data_seed: see
            `TextClassificationData`.
        batch_size, eval_batch_size, num_workers, seed: see `SequenceDataModule`.
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
        resolution: int = 224,
        channels: int = 3,
        mean: float = 0.5,
        std: float = 0.5,
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = "test",
        val_share: float = 0.1,
        test_share: float | None = None,
        train_size: int | None = None,
        val_size: int | None = None,
        test_size: int | None = None,
        data_seed: int = 0,
        batch_size: int = 32,
        eval_batch_size: int | None = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, num_workers=num_workers, seed=seed)
        if not path:
            raise ValueError("data.path must be a local folder or file, or a hub id, got nothing.")
        if channels not in (1, 3):
            raise ValueError(f"data.channels must be 1 or 3, got {channels!r}.")
        for key, value, least in (("mean", mean, 0.0), ("std", std, 1e-6)):
            if isinstance(value, bool) or not isinstance(value, int | float) or value < least:
                raise ValueError(f"data.{key} must be a number of at least {least:g}, got {value!r}.")
        self.path, self.name = str(path), name
        self.pixel_column, self.label_column = pixel_column, label_column
        self.resolution = require_count("data.resolution", resolution)
        self.channels, self.mean, self.std = channels, float(mean), float(std)
        self.splitting = checked_splitting(
            train_split, val_split, test_split, val_share, test_share, (train_size, val_size, test_size), data_seed
        )
        self._class_names: tuple[str, ...] = ()

    def prepare_data(self) -> None:
        load_source(self.path, self.name)

    def make_splits(self) -> dict[str, datasets.Dataset]:
        source = load_source(self.path, self.name)
        splits = carve(source, self.path, **self.splitting)
        column = self.pixel_column or next((c for c in KNOWN_COLUMNS if c in splits["train"].column_names), "image")
        for split in splits.values():
            require_column(split, column, "data.pixel_column", self.path)
            require_column(split, self.label_column, "data.label_column", self.path)
        labels, self._class_names = class_labels(
            source[self.splitting["train_split"]], splits, self.label_column, self.path
        )
        # `with_labels` goes by the table, which holds images undecoded; the feature says how to decode them.
        feature = splits["train"].features[column]
        return {
            name: with_labels(split.select_columns([column]), labels[name])
            .cast_column(column, feature)
            .rename_column(column, "pixels")
            for name, split in splits.items()
        }

    def make_spec(self) -> DataSpec:
        return DataSpec(
            kind="classification",
            vocab_size=1,
            num_classes=len(self._class_names),
            class_names=self._class_names,
            max_length=self.resolution**2,
            causal=False,
            describe=f"images of {self.path}, {self.resolution} × {self.resolution} pixels",
        )

    def pack_inputs(self, inputs: Sequence[str], spec: DataSpec) -> Images:
        images = datasets.Dataset.from_dict({"pixels": list(inputs)}).cast_column("pixels", datasets.Image())
        return self.pack("test", images, spec)

    def pack(self, split: str, dataset: datasets.Dataset, spec: DataSpec) -> Any:
        return Images(dataset, self.resolution, self.channels, self.mean, self.std, self.path)


class Images(Dataset):
    """One split; images are decoded when a batch asks for them.

    Args:
        dataset: columns `pixels`, images or the bytes of square grey ones, and `label`, if they are labelled.
        resolution, channels, mean, std: see `ImageClassificationData`.
        path: where the images come from, for messages.
    """

    def __init__(
        self, dataset: datasets.Dataset, resolution: int, channels: int, mean: float, std: float, path: str
    ) -> None:
        self.dataset, self.path = dataset, path
        self.resolution, self.channels, self.mean, self.std = resolution, channels, mean, std

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One item, without a batch dimension."""
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The batch of these items."""
        with quiet_datasets():
            rows = self.dataset[list(indices)]
        pixels = np.stack([self._read(image) for image in rows["pixels"]])  # (b, channels, h, w) uint8
        scaled = (torch.from_numpy(pixels).float() / 255 - self.mean) / self.std
        batch = {"pixels": scaled}
        return {**batch, "labels": torch.tensor(rows["label"])} if "label" in rows else batch

    def _read(self, image: Any) -> np.ndarray:
        """(channels, resolution, resolution) uint8."""
        if isinstance(image, bytes):
            image = Image.fromarray(as_square(image, "pixels", self.path))
        if not isinstance(image, Image.Image):
            kind = type(image).__name__
            raise ValueError(
                f"data.pixel_column of data.path={self.path!r} must hold images or bytes, it holds {kind}."
            )
        side = self.resolution
        image = image.convert("RGB" if self.channels == 3 else "L").resize((side, side), Image.Resampling.BICUBIC)
        return np.asarray(image).reshape(side, side, self.channels).transpose(2, 0, 1)
