"""Models and batches to calibrate and measure on: a Hugging Face model with a text file, or one of our checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from approx_attn.command import require_counts
from approx_attn.config.instantiate import build, sentence
from approx_attn.data.sources import read_text
from approx_attn.errors import ConfigError

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Source:
    """A model with batches of its inputs: `first` to calibrate on, `second`, from another part, to measure on.

    `tokenizer` is the hub id or folder of the one that made the tokens, where a checkpoint's data name it; `classes`
    holds, by batch of `first`, the class of every input (b,), nothing where inputs have none.
    """

    model: nn.Module
    first: list[Batch]
    second: list[Batch]
    tokenizer: str | None = None
    classes: list[Tensor] = field(default_factory=list)


def load_source(
    model: str, data: str | None, *, length: int, sequences: int, test_sequences: int = 0, batch_size: int = 8
) -> Source:
    """A model by name and batches of data for it.

    Args:
        model: hub id or folder of a Hugging Face model, or a checkpoint file (`.ckpt`) of this package.
        data: a text file; its first half calibrates, its second half measures. None with a checkpoint, whose own
            training and test split are taken.
        length: tokens per sequence with a text file, special tokens included.
        sequences: how many calibrate.
        test_sequences: how many are measured.
        batch_size: sequences per batch.

    Raises:
        ConfigError: a model or file that is not there, or a text too short.
    """
    require_counts({"length": length, "sequences": sequences, "batch_size": batch_size})
    if Path(model).suffix == ".ckpt":
        if data is not None:
            raise ConfigError(f"data={data} goes with a Hugging Face model; a checkpoint brings its own data.")
        return _checkpoint(model, sequences, test_sequences)
    if data is None or not Path(data).is_file():
        raise ConfigError(f"data={data} is not a file; give a text file.")
    try:
        text = read_text(data, "data")
    except (OSError, ValueError) as error:
        raise ConfigError(sentence(error, "data")) from error
    network, tokenizer = load_encoder(model)
    half = len(text) // 2
    parts = []
    for part, wanted in ((text[:half], sequences), (text[half:], test_sequences)):
        encoded = tokenizer(part, truncation=True, max_length=length, return_overflowing_tokens=True)
        windows = [ids for ids in encoded["input_ids"] if len(ids) == length][:wanted]
        if len(windows) < wanted:
            raise ConfigError(f"data={data} gives {len(windows)} of {wanted} sequences of {length} tokens per half.")
        parts.append([_batch(windows[i : i + batch_size]) for i in range(0, wanted, batch_size)])
    return Source(network, parts[0], parts[1])


def _batch(windows: list[list[int]]) -> Batch:
    tokens = torch.tensor(windows)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def load_encoder(model: str, auto_class: str = "AutoModel") -> tuple[nn.Module, Any]:
    """A Hugging Face model, in evaluation mode, and its tokenizer.

    Args:
        model: hub id or folder.
        auto_class: of transformers, which says what head the model has; `AutoModel` gives none.

    Raises:
        ConfigError: transformers is missing, or there is no such model or no fast tokenizer.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigError("model: Hugging Face models need transformers; install approx-attn[hf].") from error
    if not Path(model).exists() and (model.startswith(("/", ".", "~")) or model.count("/") > 1):
        raise ConfigError(f"model={model} does not exist; it must be a hub id, a folder or a .ckpt file of a model.")
    try:
        # The slow paths of old weights run code from the file; safetensors cannot.
        with _without_bars():
            network = getattr(transformers, auto_class).from_pretrained(model, use_safetensors=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model={model} cannot be loaded: {' '.join(str(error).split())}") from error
    if not tokenizer.is_fast:
        raise ConfigError(f"model={model} has no fast tokenizer, which cutting a text into windows needs.")
    # Texts are cut into windows of the length asked for, so the tokenizer need not warn about long ones.
    tokenizer.model_max_length = int(1e9)
    return network.eval(), tokenizer


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without the library's bar over the tensors of a file, which says nothing and is not a verb's own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_checkpoint(path: str) -> Any:
    """The task in a checkpoint of this package, as `approx_attn.run.evaluate.load_task` reads it."""
    from approx_attn.run.evaluate import load_task

    try:
        return load_task(path)
    except ConfigError as error:  # which calls `checkpoint` what is `model` here
        raise ConfigError(re.sub("^checkpoint=", "model=", str(error))) from error


def _checkpoint(path: str, sequences: int, test_sequences: int) -> Source:
    from approx_attn.data.base import SequenceDataModule

    task = load_checkpoint(path)
    module = build(task.config["data"], "data", SequenceDataModule)
    module.prepare_data()
    module.setup()
    splits: list[list[Batch]] = []
    classes: list[Tensor] = []
    for loader, wanted in ((module.train_dataloader, sequences), (module.test_dataloader, test_sequences)):
        batches: list[Batch] = []
        for batch in loader() if wanted else ():
            if not splits and _has_classes(batch):
                classes.append(batch["labels"])
            batches.append({key: part for key, part in batch.items() if key.startswith(("tokens", "keep", "coord"))})
            if sum(len(part["tokens"]) for part in batches) >= wanted:
                break
        splits.append(batches)
    return Source(task.model, splits[0], splits[1], task.config["data"].get("tokenizer"), classes)


def _has_classes(batch: Batch) -> bool:
    labels = batch.get("labels")
    return labels is not None and labels.dim() == 1 and not labels.is_floating_point()
