"""The contract that every data module keeps.

A data module yields batches of token sequences as dictionaries of tensors:

    tokens  (b, n) int64   token ids, the padding id where padded
    keep    (b, n) bool    True for real tokens
    labels  (b,) int64     the class, for `kind="classification"` (`IGNORE` for items that are not scored); or
            (b, n) int64   what the logits at each position predict, `IGNORE` where nothing is, for
                           `kind="token_prediction"` (shifted here, so a model never shifts)
    tokens_b, keep_b       the second sequence, where `spec.two_towers`; for `kind="translation"` the decoder's input,
                           which the labels are laid out along (see `approx_attn.data.translation`)

A subclass states its `DataSpec` and its three splits as `datasets.Dataset`; the base makes the loaders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import datasets
import pytorch_lightning as pl
import torch
from torch import Tensor

from approx_attn.data.packing import PAD, PackedSequences
from approx_attn.data.sampling import EpochSampler, ResumableLoader
from approx_attn.errors import require_count

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class DataSpec:
    """What a model must know about the data.

    Attributes:
        kind: one label per sequence, one per token, or a target sentence per source sentence.
        vocab_size: token ids are 0 … vocab_size − 1; of the source, in translation.
        num_classes: outputs of the model: classes, or the vocabulary for token prediction; that of the target, in
            translation.
        max_length: longest sequence; batches have this length unless `pad_to_longest`.
        causal: the model must not look ahead.
        two_towers: a batch holds two sequences per label (`tokens_b`, `keep_b`).
        pad_id: token id of padding.
        class_names: what the classes are called, in their order; empty where they are only numbered.
        num_items: sizes of the training, validation and test split, None before `setup`.
        describe: one line for people.
    """

    kind: Literal["classification", "token_prediction", "translation"]
    vocab_size: int
    num_classes: int
    max_length: int
    causal: bool
    two_towers: bool = False
    pad_id: int = PAD
    class_names: tuple[str, ...] = ()
    num_items: tuple[int, int, int] | None = None
    describe: str = ""


@dataclass(kw_only=True, eq=False, repr=False)
class SequenceDataModule(pl.LightningDataModule):
    """Base of all data modules.

    A data module is a dataclass whose fields are its options, `data.<field>`; it checks them in `__post_init__`.

    Args:
        batch_size: sequences per training batch (and process).
        eval_batch_size: sequences per validation and test batch; `batch_size` if None.
        num_workers: processes that make batches. 0 is fastest here: a batch is one gather.
        seed: seed of the training order, which is a function of (seed, epoch) alone.

    Subclasses implement `make_spec` and `make_splits`.
    """

    batch_size: int = 32
    eval_batch_size: int = None  # type: ignore[assignment]  # None until `__post_init__`
    num_workers: int = 0
    seed: int = 0

    pad_to_longest = False
    """Pad a batch to its longest member instead of to `max_length`; an option of modules whose lengths vary. It is
    cheaper, but a mechanism whose budget is a share of the length then sees a length that depends on the batch."""

    def __post_init__(self) -> None:
        super().__init__()
        if self.eval_batch_size is None:
            self.eval_batch_size = self.batch_size
        self.require_counts(batch_size=1, eval_batch_size=1, num_workers=0, seed=0)
        require_flag("data.pad_to_longest", self.pad_to_longest)
        self._splits: dict[str, PackedSequences] = {}

    def require_counts(self, **least: int) -> None:
        """Raise unless each of these options is a whole number of at least so much."""
        for option, minimum in least.items():
            require_count(f"data.{option}", getattr(self, option), minimum)

    # -- for subclasses ----------------------------------------------------------------------------

    def make_spec(self) -> DataSpec:
        """The spec, without `num_items`. Called after `make_splits` unless everything in it is an option."""
        raise NotImplementedError

    def make_splits(self) -> dict[str, datasets.Dataset]:
        """The splits "train", "val" and "test", with the columns that `PackedSequences` reads."""
        raise NotImplementedError

    def pack(self, split: str, dataset: datasets.Dataset, spec: DataSpec) -> Any:
        """Lay out one split for batching; a hook for modules that cut or mask in their own way."""
        return PackedSequences(dataset, spec.max_length, pad_to_longest=self.pad_to_longest, pad_id=spec.pad_id)

    has_static_spec: ClassVar[bool] = True
    """False in modules whose spec is known only once the data has been read."""

    input_kind: ClassVar[Literal["text", "image"] | None] = None
    """What new inputs of a trained model are; None where data is generated or comes in another form."""

    text_column = "text"
    """The column of texts in a file of new inputs; an option of modules that read texts from columns."""

    def pack_inputs(self, inputs: Sequence[str], spec: DataSpec) -> Any:
        """Lay out new inputs for batching, without labels; for modules with an `input_kind`.

        Args:
            inputs: texts, or paths of images.
            spec: that of the trained model.
        """
        raise NotImplementedError

    # -- the same for all --------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Make and pack the splits, once, whatever the stage."""
        if not self._splits:
            made = self.make_splits()
            for name in SPLITS:
                if len(made[name]) == 0:
                    raise ValueError(f"data: the {name} split is empty; the data or the sizes asked for are too small.")
            spec = self.make_spec()
            self._splits = {name: self.pack(name, made[name], spec) for name in SPLITS}

    @property
    def spec(self) -> DataSpec:
        """What the model must know. Sets the data up where the spec depends on it and that was not done yet."""
        if not self._splits and not self.has_static_spec:
            self.setup()
        spec = self.make_spec()
        if not self._splits:
            return spec
        train, val, test = (len(self._splits[name]) for name in SPLITS)
        return replace(spec, num_items=(train, val, test))

    def train_dataloader(self) -> ResumableLoader:
        return self._loader("train", self.batch_size, shuffle=True)

    def val_dataloader(self) -> ResumableLoader:
        return self._loader("val", self.eval_batch_size, shuffle=False)

    def test_dataloader(self) -> ResumableLoader:
        return self._loader("test", self.eval_batch_size, shuffle=False)

    def joint_train_batches(self) -> ResumableLoader:
        """Training batches as one process alone sees them: the same in all processes of a distributed run."""
        return self._loader("train", self.batch_size, shuffle=True, joint=True)

    def _loader(self, split: str, batch_size: int, shuffle: bool, joint: bool = False) -> ResumableLoader:
        self.setup()
        dataset = self._splits[split]
        whole_batches = shuffle and len(dataset) >= batch_size  # a ragged last batch would be a step of other size
        sampler = EpochSampler(len(dataset), shuffle=shuffle, seed=self.seed, drop_last=whole_batches, joint=joint)
        return ResumableLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            drop_last=whole_batches,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            collate_fn=already_a_batch,
        )


def already_a_batch(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Collate function of datasets whose `__getitems__` returns whole batches."""
    return batch


# -- checks on options: each names the key, what it got and what it accepts ----------------------------


def require_count_or_none(key: str, value: Any, least: int = 1) -> int | None:
    """`value` as an int of at least `least`, or None for all there is."""
    return None if value is None else require_count(key, value, least)


def require_flag(key: str, value: Any) -> bool:
    """`value` if it is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, got {value!r}.")
    return value


def require_positive_number(key: str, value: Any) -> float:
    """`value` as a float greater than 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0.0:
        raise ValueError(f"{key} must be a number greater than 0, got {value!r}.")
    return float(value)


def require_share(key: str, value: Any) -> float:
    """`value` as a float strictly between 0 and 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < 1.0:
        raise ValueError(f"{key} must be a share between 0 and 1, got {value!r}.")
    return float(value)
