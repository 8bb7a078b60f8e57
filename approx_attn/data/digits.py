"""scikit-learn's bundled 8×8 digits as sequences of 64 pixel tokens: real data without a download."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from approx_attn.data.base import DataSpec, SequenceDataModule
from approx_attn.data.cifar10 import read_grey
from approx_attn.data.packing import PackedSequences


@dataclass(kw_only=True, eq=False, repr=False)
class DigitsData(SequenceDataModule):
    """1,797 handwritten digits, read row by row; a token is the grey value of a pixel, 0 to 16; 10 classes.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI repository (1998), as
    bundled with scikit-learn.

    Args:
        val_size, test_size: images set aside, stratified by class; the rest (1,077 by default) is trained on.
        data_seed: seed of the split. Apart from `seed`, so that runs with several seeds share a test set.

    Other options: see `SequenceDataModule`.
    """

    batch_size: int = 64
    eval_batch_size: int = 360
    val_size: int = 360
    test_size: int = 360
    data_seed: int = 0

    input_kind = "image"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_counts(val_size=10, test_size=10, data_seed=0)
        if self.val_size + self.test_size > 1787:
            raise ValueError(
                "data.val_size + data.test_size must be at most 1787 of 1797 digits, "
                f"got {self.val_size} + {self.test_size}."
            )

    def pack_inputs(self, inputs: Sequence[str], spec: DataSpec) -> PackedSequences:
        """Images of light ink on dark ground, scaled to 8×8 pixels."""
        pixels = [np.rint(read_grey(path, side=8) / 255 * 16).astype(np.uint8).ravel() for path in inputs]
        return self.pack("test", datasets.Dataset.from_dict({"tokens": pixels}), spec)

    def make_spec(self) -> DataSpec:
        return DataSpec(
            kind="classification",
            vocab_size=17,
            num_classes=10,
            max_length=64,
            causal=False,
            describe="8×8 handwritten digits, 64 pixel tokens of 17 grey values",
        )

    def make_splits(self) -> dict[str, datasets.Dataset]:
        images, labels = load_digits(return_X_y=True)  # (1797, 64), (1797,)
        rest, test = split_stratified(np.arange(len(labels)), labels, self.test_size, self.data_seed)
        train, val = split_stratified(rest, labels, self.val_size, self.data_seed)
        rows = {"train": train, "val": val, "test": test}
        return {
            name: datasets.Dataset.from_dict({"tokens": images[chosen].astype(np.uint8), "label": labels[chosen]})
            for name, chosen in rows.items()
        }


def split_stratified(rows: np.ndarray, labels: np.ndarray, held_out: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(rest, held out) of `rows`, each sorted, with the classes in equal shares."""
    rest, chosen = train_test_split(rows, test_size=held_out, stratify=labels[rows], random_state=seed)
    return np.sort(rest), np.sort(chosen)
