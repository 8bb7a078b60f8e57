"""Data of one's own: which token follows the last marker?"""

from __future__ import annotations

from dataclasses import dataclass

import datasets
import numpy as np

from approx_attn.data import DataSpec, SequenceDataModule

MARKER = 1


@dataclass(kw_only=True, eq=False, repr=False)
class LastMarkerData(SequenceDataModule):
    """Random tokens with a few markers among them; the label is the token after the last marker.

    Args:
        length: tokens of a sequence.
        num_markers: markers in it.
        num_classes: different tokens besides padding and marker.
        train_size, val_size, test_size: sequences.
        data_seed: of the generator.

    Other options: see `SequenceDataModule`.
    """

    length: int = 24
    num_markers: int = 3
    num_classes: int = 8
    train_size: int = 4000
    val_size: int = 400
    test_size: int = 400
    data_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if 2 * self.num_markers >= self.length:
            raise ValueError(f"data.num_markers must be below data.length / 2, got {self.num_markers}.")

    def make_spec(self) -> DataSpec:
        return DataSpec(
            kind="classification",
            vocab_size=2 + self.num_classes,  # 0 is padding
            num_classes=self.num_classes,
            max_length=self.length,
            causal=False,
            describe=f"the token after the last of {self.num_markers} markers",
        )

    def make_splits(self) -> dict[str, datasets.Dataset]:
        sizes = {"train": self.train_size, "val": self.val_size, "test": self.test_size}
        rng = np.random.default_rng(self.data_seed)
        return {split: self._sequences(size, rng) for split, size in sizes.items()}

    def _sequences(self, size: int, rng: np.random.Generator) -> datasets.Dataset:
        tokens = rng.integers(2, 2 + self.num_classes, (size, self.length))
        places = np.stack([rng.permutation(self.length - 1)[: self.num_markers] for _ in range(size)])
        np.put_along_axis(tokens, places, MARKER, axis=1)
        after = np.arange(size), places.max(axis=1) + 1
        return datasets.Dataset.from_dict({"tokens": tokens, "label": tokens[after] - 2})
