"""Images as arrays of pixels, for models that cut them into patches themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from approx_attn.data.base import DataSpec
from approx_attn.data.cache import quiet_datasets
from approx_attn.data.cifar10 import LabelledImages, as_square


@dataclass(kw_only=True, eq=False, repr=False)
class ImageClassificationData(LabelledImages):
    """Any set of labelled images; batches hold `pixels` (b, channels, resolution, resolution) float32 and `labels`.

    Args:
        resolution: side in pixels that images are scaled to; what the model declares.
        channels: 3 for colour, 1 for grey.
        mean, std: pixels from 0 to 1 become (pixel − mean) / std.

    Other options: see `LabelledImages`, `LabelledData` and `SequenceDataModule`.
    """

    eval_batch_size: int = 64
    resolution: int = 224
    channels: int = 3
    mean: float = 0.5
    std: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels not in (1, 3):
            raise ValueError(f"data.channels must be 1 or 3, got {self.channels!r}.")
        for key, value, least in (("mean", self.mean, 0.0), ("std", self.std, 1e-6)):
            if isinstance(value, bool) or not isinstance(value, int | float) or value < least:
                raise ValueError(f"data.{key} must be a number of at least {least:g}, got {value!r}.")

    def read_inputs(self, splits: dict[str, datasets.Dataset], column: str) -> dict[str, datasets.Dataset]:
        return {name: split.rename_columns({column: "pixels"}) for name, split in splits.items()}

    def make_spec(self) -> DataSpec:
        side = self.resolution
        return self.class_spec(1, side**2, f"images of {self.path}, {side} × {side} pixels")

    def pack_inputs(self, inputs: Sequence[str], spec: DataSpec) -> Images:
        images = datasets.Dataset.from_dict({"pixels": list(inputs)}).cast_column("pixels", datasets.Image())
        return self.pack("test", images, spec)

    def pack(self, split: str, dataset: datasets.Dataset, spec: DataSpec) -> Images:
        return Images(dataset, self)


class Images(Dataset):
    """One split; images are decoded when a batch asks for them.

    Args:
        dataset: columns `pixels`, images or the bytes of square grey ones, and `label`, if they are labelled.
        options: of the data module.
    """

    def __init__(self, dataset: datasets.Dataset, options: ImageClassificationData) -> None:
        self.dataset, self.path = dataset, options.path
        self.side, self.channels = options.resolution, options.channels
        self.mean, self.std = float(options.mean), float(options.std)

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
        batch = {"pixels": (torch.from_numpy(pixels).float() / 255 - self.mean) / self.std}
        return {**batch, "labels": torch.tensor(rows["label"])} if "label" in rows else batch

    def _read(self, image: Any) -> np.ndarray:
        """(channels, side, side) uint8."""
        if isinstance(image, bytes):
            image = Image.fromarray(as_square(image, "pixels", str(self.path)))
        if not isinstance(image, Image.Image):
            kind = type(image).__name__
            raise ValueError(
                f"data.pixel_column of data.path={self.path!r} must hold images or bytes, it holds {kind}."
            )
        side = (self.side, self.side)
        image = image.convert("RGB" if self.channels == 3 else "L").resize(side, Image.Resampling.BICUBIC)
        return np.asarray(image).reshape(*side, self.channels).transpose(2, 0, 1)
