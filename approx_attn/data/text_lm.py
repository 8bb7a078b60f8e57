"""Language modelling over the bytes of any text, causal or masked."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import datasets
import numpy as np
import torch
from torch import Tensor

from approx_attn.data.base import SPLITS, DataSpec, require_count_or_none, require_share
from approx_attn.data.packing import BYTE_OFFSET, BYTE_VOCAB_SIZE, IGNORE, PackedSequences
from approx_attn.data.sources import SourceData, load_source, require_column, require_split, require_texts
from approx_attn.errors import require_one_of

MASK_TOKEN = BYTE_VOCAB_SIZE


@dataclass(kw_only=True, eq=False, repr=False)
class TextBlocks(SourceData):
    """Base of language modelling over blocks of a text, next to each other and without overlap.

    Args:
        path: a text file, a folder with text files or with a data set, or a hub id; if None, the source text of the
            Python standard library, which every machine has (it differs between Python versions).
        text_column: column that holds the text.
        val_share, test_share: shares of the training text, taken from its end, for the splits that have no name.
        max_bytes: bytes of training text used, from the beginning; None for all.
        max_length: tokens in a block.

    Other options: see `SourceData` and `SequenceDataModule`. Subclasses implement `make_spec` and `tokens`.
    """

    test_split: str | None = None
    val_share: float = 0.05
    test_share: float | None = 0.05
    text_column: str = "text"
    max_bytes: int | None = None
    max_length: int = 256

    unit: ClassVar[str] = "tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count_or_none("data.max_bytes", self.max_bytes)
        self.require_counts(max_length=2)

    def tokens(self, text: bytes) -> np.ndarray:
        """The token ids of a text, in its order."""
        raise NotImplementedError

    @property
    def is_causal(self) -> bool:
        """Whether every position predicts the next token; else the data hides tokens when a batch asks for them."""
        return True

    def lm_spec(self, vocab_size: int, unit: str) -> DataSpec:
        """The spec of blocks of tokens out of so many."""
        text, form = self.path or "the Python standard library", "causal" if self.is_causal else "masked"
        return DataSpec(
            kind="token_prediction",
            vocab_size=vocab_size,
            num_classes=vocab_size,
            max_length=self.max_length,
            causal=self.is_causal,
            describe=f"{form} language modelling of {text}, {self.max_length} {unit}",
        )

    def make_splits(self) -> dict[str, datasets.Dataset]:
        texts = self._read()
        text = texts["train"][: self.max_bytes]
        held_out = {name: round(self.shares[name] * len(text)) for name in ("test", "val") if name not in texts}
        for name, size in held_out.items():
            text, texts[name] = text[: len(text) - size], text[len(text) - size :]
        texts["train"] = text
        return {name: self._blocks(texts[name], name) for name in SPLITS}

    def _read(self) -> dict[str, bytes]:
        """The bytes of the training text and of those other splits that the source has."""
        if self.path is None:
            return {"train": standard_library_source()}
        local = Path(self.path).expanduser()
        if local.is_file() and local.suffix not in (".parquet", ".csv", ".tsv", ".json", ".jsonl", ".arrow"):
            return {"train": local.read_bytes()}
        source = load_source(self.path, self.name)
        texts = {}
        for name, split in self.source_splits.items():
            if split is not None:
                dataset = require_split(source, split, f"data.{name}_split", self.path)
                require_column(dataset, self.text_column, "data.text_column", self.path)
                require_texts({name: dataset}, self.text_column, self.path)
                texts[name] = "\n".join(text or "" for text in dataset[self.text_column][:]).encode()
        return texts

    def _blocks(self, text: bytes, split: str) -> datasets.Dataset:
        """Blocks without overlap; in the causal form each with the tokens that follow."""
        n = self.max_length
        tokens = self.tokens(text)
        if len(tokens) < n + 1:
            raise ValueError(
                f"data.max_length={n} is too long for the {split} text, which has {len(tokens)} {self.unit} "
                f"(data.path={self.path or 'null'!r})."
            )
        blocks = (len(tokens) - 1) // n
        columns = {"tokens": tokens[: blocks * n].reshape(blocks, n)}
        if self.is_causal:
            columns["labels"] = tokens[1 : blocks * n + 1].reshape(blocks, n)
        return datasets.Dataset.from_dict(columns)


@dataclass(kw_only=True, eq=False, repr=False)
class TextLMData(TextBlocks):
    """Blocks of `max_length` bytes. Causal: predict the next byte. Masked: predict the hidden bytes.

    Byte v is token v + 1; 0 is padding and, for the masked form, 257 is the mask. In the masked form
    `mask_share` of the positions is chosen; of these 80% show the mask, 10% a random byte and 10% the byte itself
    (Devlin et al., BERT, NAACL 2019). The choice is a function of (data_seed, epoch, item, position) in training
    and of (data_seed, item, position) in validation and test.

    Args:
        objective: "causal" or "masked".
        mask_share: share of the positions predicted in the masked form.
        data_seed: seed of the masks.

    Other options: see `TextBlocks`, `SourceData` and `SequenceDataModule`.
    """

    eval_batch_size: int = 64
    objective: str = "causal"
    mask_share: float = 0.15
    data_seed: int = 0

    unit = "bytes"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of("data.objective", self.objective, ("causal", "masked"))
        require_share("data.mask_share", self.mask_share)
        self.require_counts(data_seed=0)

    @property
    def is_causal(self) -> bool:
        return self.objective == "causal"

    def make_spec(self) -> DataSpec:
        return self.lm_spec(BYTE_VOCAB_SIZE if self.is_causal else MASK_TOKEN + 1, self.unit)

    def tokens(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8).astype(np.int16) + BYTE_OFFSET

    def pack(self, split: str, dataset: datasets.Dataset, spec: DataSpec) -> PackedSequences:
        if self.is_causal:
            return PackedSequences(dataset, spec.max_length)
        stream = SPLITS.index(split)
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
