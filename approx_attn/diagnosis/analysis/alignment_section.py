"""Section of the report on alignment error, and the sentence pairs that it is measured on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from approx_attn.config.instantiate import build
from approx_attn.data.base import SequenceDataModule
from approx_attn.data.packing import IGNORE
from approx_attn.data.translation import END
from approx_attn.diagnosis.analysis.alignment import MEASURES, SETTINGS, AlignmentErrors, GoldAlignment
from approx_attn.diagnosis.analysis.book import Book
from approx_attn.diagnosis.inputs import load_checkpoint
from approx_attn.errors import ConfigError
from approx_attn.run.train import make_splits

Pairs = tuple[Mapping[str, Tensor], GoldAlignment]


def sentence_pairs(model: str, pairs: int) -> Iterator[Pairs]:
    """Inputs and gold alignments of at least so many pairs of the test split of a checkpoint's data, if it has them.

    Raises:
        ConfigError: a checkpoint whose data know no alignment; before the first batch is asked for.
    """
    task = load_checkpoint(model)
    data = build(task.config["data"], "data", SequenceDataModule)
    make_splits(data)
    loader = data.test_dataloader()
    if "alignment" not in next(iter(loader)):
        raise ConfigError(f"parts=[alignment] needs a checkpoint of data with gold alignments, got {model!r}.")
    return map(_pair, islice(loader, -(-pairs // data.eval_batch_size)))


def _pair(batch: Mapping[str, Tensor]) -> Pairs:
    inputs = {key: batch[key] for key in ("tokens", "keep", "tokens_b", "keep_b")}
    words = (batch["labels"] != IGNORE) & (batch["labels"] != END), batch["keep"] & (batch["tokens"] != END)
    return inputs, GoldAlignment(batch["alignment"], batch["alignment"], *words)  # all links of the data are sure


def refuse_alignment(model: str) -> None:
    """Raise `ConfigError` where the model can be no checkpoint of a translation run."""
    if Path(model).suffix != ".ckpt":
        raise ConfigError(
            f"parts=[alignment] measures on gold alignments of a checkpoint's own data, so model must be a checkpoint "
            f"(.ckpt), got {model!r}."
        )


def add_alignment(book: Book, errors: AlignmentErrors) -> None:
    """Which source word does a target word attend to, by weights and by norms?"""
    section = book.section("Alignment error of cross-attention")
    section.text(
        "A target word is linked to the source word with the largest weight α, or with the largest norm ‖αf(x)‖ of "
        "what is added (Kobayashi et al., EMNLP 2020), in every head; in a layer by the mean weight of its heads, or "
        "by ‖Σ_h αf(x)‖. Output: at the position that predicts the word; input: at the one that reads it. Alignment "
        f"error rate against the gold links of {errors.sentences} sentence pairs, from 0 (all found, no other) to 1; "
        f"one link per word can reach {errors.least:.3f}."
    )
    layers, heads = [], []
    for index, (name, counts) in enumerate(errors.layers.items()):
        for setting in SETTINGS:
            rates = {measure: counts.error_rate(setting, measure).tolist() for measure in MEASURES}
            best = {f"best_head_{measure}": min(rates[measure][:-1]) for measure in MEASURES}
            mean = {f"mean_head_{measure}": sum(rates[measure][:-1]) / len(rates[measure][:-1]) for measure in MEASURES}
            whole: dict[str, Any] = {f"layer_{measure}": rates[measure][-1] for measure in MEASURES}
            layers.append({"layer": index, "module": name, "setting": setting, **whole, **best, **mean})
            for head, pair in enumerate(zip(*(rates[measure][:-1] for measure in MEASURES), strict=True)):
                heads.append(
                    {"layer": index, "setting": setting, "head": head, **dict(zip(MEASURES, pair, strict=True))}
                )
    section.table("alignment", layers, "Alignment error rate of whole layers and, mean and lowest, of their heads.")
    section.table("alignment_heads", heads, "Alignment error rate of every head.")
