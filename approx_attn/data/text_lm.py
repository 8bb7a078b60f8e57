"""Language modelling over the bytes of any text, causal or masked."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import Tensor

from approx_attn.data.base import (
    DataSpec,
    SequenceDataModule,
    require_count,
    require_count_or_none,
    require_one_of,
    require_share,
)
from approx_attn.data.packing import BYTE_OFFSET, BYTE_VOCAB_SIZE, IGNORE, PackedSequences
from approx_attn.data.sources import load_source, require_apart, require_column, require_split, require_texts

MASK_TOKEN = BYTE_VOCAB_SIZE


class TextLMData(SequenceDataModule):
    """Blocks of `max_length` bytes. Causal: predict the next byte. Masked: predict the hidden bytes.

    Byte v is token v + 1; 0 is padding and, for the masked form, 257 is the mask. In the masked form
    `mask_share` of the positions is chosen; of these 80% show the mask, 10% a random byte and 10% the byte itself
    (Devlin et al., BERT, NAACL 2019). The choice is a function of (data_seed, epoch, item, position) in training
    and of (data_seed, item, position) in validation and test.

    Args:
        path: a text file, a folder with text files or with a data set, or a hub id; if None, the source text of the
            Python standard library, which every machine has (it differs between Python versions).
        name: configuration of a hub data set that has several.
        text_column: column that holds the text.
        train_split, val_split, test_split: names of the source's splits. Where `val_split` or `test_split` is None,
            a share of the training text is set aside.
        val_share, test_share: shares of the training text, taken from its end.
        max_bytes: bytes of training text used, from the beginning; None for all.
        objective: "causal" or "masked".
        mask_share: share of the positions predicted in the masked form.
        max_length: bytes in a block.
        data_seed: seed of the masks.
        batch_size, eval_batch_size, num_workers, seed: see `SequenceDataModule`.

    YAML:
        _target_: approx_attn.data.text_lm.TextLMData
        batch_size: 32
        eval_batch_size: 64
        num_workers: 0
        seed: 0
        path: null
        name: null
        text_column: text
        train_split: train
        val_split: null
        test_split: null
        val_share: 0.05
        test_share: 0.05
        max_bytes: null
        objective: causal
        mask_share: 0.15
        max_length: 256
        data_seed: 0
    """

    def __init__(
        self,
        *,
        path: str | None = None,
        name: str | None = None,
        text_column: str = "text",
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = None,
        val_share: float = 0.05,
        test_share: float = 0.05,
        max_bytes: int | None = None,
        objective: str = "causal",
        mask_share: float = 0.15,
        max_length: int = 256,
        data_seed: int = 0,
        batch_size: int = 32,
        eval_batch_size: int | None = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, num_workers=num_workers, seed=seed)
        self.path = None if path is None else str(path)
        self.name, self.text_column = name, text_column
        self.train_split, self.val_split, self.test_split = train_split, val_split, test_split
        require_apart(train_split, val_split, test_split)
        self.val_share = require_share("data.val_share", val_share)
        self.test_share = require_share("data.test_share", test_share)
        if self.val_share + self.test_share >= 1.0:
            raise ValueError(f"data.val_share + data.test_share must be less than 1, got {val_share} + {test_share}.")
        self.max_bytes = require_count_or_none("data.max_bytes", max_bytes)
        self.objective = require_one_of("data.objective", objective, ("causal", "masked"))
        self.mask_share = require_share("data.mask_share", mask_share)
        self.max_length = require_count("data.max_length", max_length, least=2)
        self.data_seed = require_count("data.data_seed", data_seed, least=0)

    def make_spec(self) -> DataSpec:
        causal = self.objective == "causal"
        vocab_size = BYTE_VOCAB_SIZE if causal else MASK_TOKEN + 1
        text = self.path or "the Python standard library"
        return DataSpec(
            kind="token_prediction",
            vocab_size=vocab_size,
            num_classes=vocab_size,
            max_length=self.max_length,
            causal=causal,
            describe=f"{self.objective} language modelling of {text}, {self.max_length} bytes",
        )

    def make_splits(self) -> dict[str, datasets.Dataset]:
        texts = self._read()
        text = texts["train"][: self.max_bytes]
        held_out = {
            name: round(share * len(text))
            for name, share in (("test", self.test_share), ("val", self.val_share))
            if name not in texts
        }
        for name, size in held_out.items():
            text, texts[name] = text[: len(text) - size], text[len(text) - size :]
        texts["train"] = text
        return {name: self._blocks(texts[name], name) for name in ("train", "val", "test")}

    def _read(self) -> dict[str, bytes]:
        """The bytes of the training text and of those other splits that the source has."""
        if self.path is None:
            return {"train": standard_library_source()}
        local = Path(self.path).expanduser()
        if local.is_file() and local.suffix not in (".parquet", ".csv", ".tsv", ".json", ".jsonl", ".arrow"):
            return {"train": local.read_bytes()}
        source = load_source(self.path, self.name)
        wanted = {"train": self.train_split, "val": self.val_split, "test": self.test_split}
        texts = {}
        for name, split in wanted.items():
            if split is not None:
                dataset = require_split(source, split, f"data.{name}_split", self.path)
                require_column(dataset, self.text_column, "data.text_column", self.path)
                require_texts({name: dataset}, self.text_column, self.path)
                texts[name] = "\n".join(text or "" for text in dataset[self.text_column][:]).encode()
        return texts

    unit = "bytes"

    def tokens(self, text: bytes) -> np.ndarray:
        """The token ids of a text, in its order."""
        return np.frombuffer(text, np.uint8).astype(np.int16) + BYTE_OFFSET

    def _blocks(self, text: bytes, split: str) -> datasets.Dataset:
        """Blocks without overlap; in the causal form each with the bytes that follow."""
        n = self.max_length
        tokens = self.tokens(text)
        if len(tokens) < n + 1:
            raise ValueError(
                f"data.max_length={n} is too long for the {split} text, which has {len(tokens)} {self.unit} "
                f"(data.path={self.path or 'null'!r})."
            )
        blocks = (len(tokens) - 1) // n
        columns = {"tokens": tokens[: blocks * n].reshape(blocks, n)}
        if self.objective == "causal":
            columns["labels"] = tokens[1 : blocks * n + 1].reshape(blocks, n)
        return datasets.Dataset.from_dict(columns)

    def pack(self, split: str, dataset: datasets.Dataset, spec: DataSpec) -> PackedSequences:
        if self.objective == "causal":
            return PackedSequences(dataset, spec.max_length)
        stream = ("train", "val", "test").index(split)
        return MaskedSequences(dataset, spec.max_length, self.mask_share, (self.data_seed, stream), redraw=stream == 0)


class MaskedSequences(PackedSequences):
    """Sequences of bytes with some of them hidden; the labels are the hidden ones.

    Args:
        dataset, max_length: see `PackedSequences`.
        mask_share: share of the positions predicted.
        seed: whole numbers that the draws depend on, beside item and position.
        redraw: hide others in every epoch.
    """

    def __init__(
        self, dataset: datasets.Dataset, max_length: int, mask_share: float, seed: tuple[int, ...], redraw: bool
    ) -> None:
        super().__init__(dataset, max_length)
        self.mask_share, self.seed, self.redraw = mask_share, seed, redraw

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        batch = super().__getitems__(indices)
        tokens, keep = batch["tokens"], batch["keep"]
        epoch = self.epoch if self.redraw else 0
        places = torch.as_tensor(indices)[:, None] * tokens.shape[1] + torch.arange(tokens.shape[1])  # (b, n)
        chosen, fate, other = (uniform((*self.seed, epoch, stream), places) for stream in range(3))

        predicted = (chosen < self.mask_share) & keep
        shown = torch.where(fate < 0.8, MASK_TOKEN, tokens)
        shown = torch.where(fate >= 0.9, BYTE_OFFSET + (other * 256).long(), shown)
        batch["tokens"] = torch.where(predicted, shown, tokens)
        batch["labels"] = torch.where(predicted, tokens, IGNORE)
        return batch


def uniform(seed: tuple[int, ...], places: Tensor) -> Tensor:
    """A number in [0, 1) for every place, a function of (seed, place) alone; float64, in the shape of `places`.

    The output function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) on seed + place steps.
    """
    start = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    with np.errstate(over="ignore"):
        z = start + (places.numpy().astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return torch.from_numpy((z >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def standard_library_source() -> bytes:
    """The source text of the top-level modules of the Python standard library, sorted by name (some 5 MB)."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    if not files:
        raise ValueError("data.path must name a text here: this Python has no standard library source text to read.")
    return b"\n".join(file.read_bytes() for file in files)
