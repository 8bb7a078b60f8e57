"""Pairs of sentences: what source, decoder input, labels and gold alignment of a batch are."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import torch
from torch import Tensor

from approx_attn.data.packing import PAD, FlatLists, PackedSequences

BEGIN, END = 1, 2
"""Token ids, in both languages, of what the decoder starts from and of the end of a sentence; 0 is padding."""
FIRST_WORD = 3
"""The lowest token id of a word."""


class PackedSentencePairs(PackedSequences):
    """One split of sentence pairs, with the gold alignment where it is known.

    Batches hold, for n and m tokens of source and target:

        tokens     (b, n) int64   the source, END behind it
        keep       (b, n) bool    True for its real tokens
        tokens_b   (b, m) int64   the decoder's input: BEGIN, then the target
        keep_b     (b, m) bool
        labels     (b, m) int64   what each position of the decoder predicts: the target, END behind it; else IGNORE
        alignment  (b, m, n) bool True where the label at i is a translation of the source token at j; no row of END or
                                  of padding holds any. Only where the data know it.

    Args:
        dataset: columns `source` and `target`, lists of token ids of words; and `alignment`, where known, a flat list
            of pairs: target position, source position, target position, ….
        max_length: of source and target, END included; longer sentences are cut.
        pad_to_longest: pad a batch to its longest sentence instead of to `max_length`.
    """

    def __init__(self, dataset: datasets.Dataset, max_length: int, *, pad_to_longest: bool = False) -> None:
        columns = {name: dataset[name] for name in ("source", "target")}
        laid_out = datasets.Dataset.from_dict(
            {
                "tokens": [[*words[: max_length - 1], END] for words in columns["source"]],
                "tokens_b": [[BEGIN, *words[: max_length - 1]] for words in columns["target"]],
                "labels": [[*words[: max_length - 1], END] for words in columns["target"]],
            }
        )
        super().__init__(laid_out, max_length, pad_to_longest=pad_to_longest)
        self.alignment: FlatLists | None = None
        if "alignment" in dataset.column_names:
            self.alignment = FlatLists.from_arrow(dataset.with_format("arrow")[:].column("alignment"))

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The padded batch of these pairs."""
        batch = super().__getitems__(indices)
        if self.alignment is not None:
            pairs, there = self.alignment.padded(torch.as_tensor(indices), None, PAD)  # (b, 2·p)
            batch["alignment"] = alignment_matrix(pairs, there, batch["labels"].shape[1], batch["tokens"].shape[1])
        return batch


def alignment_matrix(pairs: Tensor, there: Tensor, target_length: int, source_length: int) -> Tensor:
    """(b, m, n) bool from (b, 2·p) target and source positions in turn, of which `there` says which are real."""
    target, source = pairs[:, 0::2], pairs[:, 1::2]  # (b, p)
    real = there[:, 1::2] & (target < target_length - 1) & (source < source_length - 1)  # words that were cut are END
    row = torch.arange(len(pairs))[:, None].expand_as(target)
    matrix = torch.zeros(len(pairs), target_length, source_length, dtype=torch.bool)
    matrix[row[real], target[real], source[real]] = True
    return matrix
