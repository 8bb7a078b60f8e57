"""Classes that a trained classifier gives new texts or images.

    predictions = predict("runs/text_classification/exact/…-seed1/checkpoints/best.ckpt", "reviews.txt")

`load_model` gives the model itself, for uses of one's own.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from approx_attn.config.instantiate import build
from approx_attn.data.base import DataSpec, SequenceDataModule, require_count_or_none
from approx_attn.data.sources import READERS, load_source, read_text, require_column
from approx_attn.errors import ConfigError
from approx_attn.run.evaluate import load_task
from approx_attn.run.trainer import quiet

COLUMN_SEPARATORS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class Prediction:
    """What a model says of one input.

    Attributes:
        input: the text, or the path of the image.
        prediction: name of the class, or its number where classes have no names.
        probability: of that class, by the model.
    """

    input: str
    prediction: str
    probability: float


def load_model(checkpoint: str | Path) -> nn.Module:
    """The model in a checkpoint that training wrote, in evaluation mode on the CPU.

    Args:
        checkpoint: such as `runs/digits/exact/…-seed1/checkpoints/best.ckpt`. Nothing else of the run is needed.

    Returns:
        A module that takes token ids (b, n) int64 and `keep` (b, n) bool, or the other inputs of its data
        (`tokens_b` and `keep_b`, or `pixels` (b, c, h, w)), and gives logits: (b, classes), or (b, n, vocabulary).

    Raises:
        ConfigError: no such file, or not a checkpoint of this project.
    """
    return load_task(checkpoint).model


def predict(
    checkpoint: str | Path,
    data: str | Path | Sequence[str | Path],
    *,
    text_column: str | None = None,
    batch_size: int | None = None,
) -> list[Prediction]:
    """Predictions of a classifier for a file of texts, or for images, in their order.

    Args:
        checkpoint: a file that training wrote, of a model that classifies texts or images.
        data: for texts a file: .txt with one text per line, or csv, tsv, json(l), parquet or arrow with a column of
            texts. For images a folder (searched with its subfolders, by name), a file, or a list of files.
        text_column: the column of texts; None for that of training.
        batch_size: inputs at a time; None for that of the evaluation of the run.

    Raises:
        ConfigError: a model of another kind, or an input that cannot be read; the message names the file and the line.
    """
    with quiet():
        task = load_task(checkpoint)
        stored = {key: value for key, value in task.config["data"].items() if key != "cache_dir"}
        module: SequenceDataModule = build(stored, "data", SequenceDataModule)
        if task.kind != "classification" or module.input_kind is None:
            raise ConfigError(
                f"checkpoint={str(checkpoint)!r} is of a model trained on {task.config['name']} "
                f"({type(module).__name__}); predict takes models that classify texts or images."
            )
        column = text_column or module.text_column
        inputs = read_texts(data, column) if module.input_kind == "text" else find_images(data)
        packed = _pack(module, inputs, DataSpec(**task.spec))
        size = require_count_or_none("batch_size", batch_size) or module.eval_batch_size
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        task.to(device)
        names = task.spec.get("class_names") or ()
        predictions: list[Prediction] = []
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(task.config["seed"])  # some mechanisms draw
            for start in range(0, len(inputs), size):
                rows = list(range(start, min(start + size, len(inputs))))
                batch = {key: part.to(device) for key, part in packed.__getitems__(rows).items()}
                probabilities = task(batch).float().softmax(-1)  # (b, classes)
                for row, best in zip(rows, probabilities.max(-1).indices.tolist(), strict=True):
                    name = names[best] if names else str(best)
                    predictions.append(Prediction(inputs[row][1], name, float(probabilities[row - start, best])))
    return predictions


def _pack(module: SequenceDataModule, inputs: Sequence[tuple[str, str]], spec: DataSpec) -> Any:
    """The inputs in batches; one that cannot be used is named by the place that it comes from."""
    try:
        return module.pack_inputs([item for _, item in inputs], spec)
    except ValueError as error:
        for place, item in inputs:
            try:
                module.pack_inputs([item], spec)
            except ValueError as of_item:
                raise ConfigError(f"{place}: {of_item}") from of_item
        raise ConfigError(str(error)) from error


# -- inputs --------------------------------------------------------------------------------------------


def read_texts(data: Any, column: str) -> list[tuple[str, str]]:
    """Texts of a file, each with its place for messages.

    Raises:
        ConfigError: a file that is not there or not text, a missing column, a line that cannot be read or is empty.
    """
    path = Path(os.path.expanduser(str(data)))
    if not path.is_file():
        accepted = ", ".join(READERS)
        raise ConfigError(f"data={str(data)!r} is not a file; this model takes a file of texts ({accepted}).")
    try:
        if path.suffix in COLUMN_SEPARATORS:
            texts = _read_table(path, column)
        elif path.suffix in READERS and path.suffix != ".txt":
            (rows,) = load_source(str(path)).values()
            require_column(rows, column, "text_column", str(path))
            texts = [(f"data: row {number} of {path}", text) for number, text in enumerate(rows[column][:], start=1)]
        else:
            lines = read_text(path, "data").splitlines()
            texts = [(f"data: line {number} of {path}", line) for number, line in enumerate(lines, start=1)]
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for place, text in texts:
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"{place} must hold a text, it holds {text!r}.")
    if not texts:
        raise ConfigError(f"data={str(data)!r} holds no text.")
    return texts


def _read_table(path: Path, column: str) -> list[tuple[str, str]]:
    """The texts of a csv or tsv file, each with its line."""
    reader = csv.DictReader(io.StringIO(read_text(path, "data"), newline=""), delimiter=COLUMN_SEPARATORS[path.suffix])
    header = reader.fieldnames or []
    if column not in header:
        raise ValueError(f"text_column={column!r} is not a column of {path}, which has: {', '.join(header) or 'none'}.")
    texts = []
    line = reader.line_num
    try:
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"data: line {line + 1} of {path} must have {len(header)} fields, as the first has.")
            texts.append((f"data: line {line + 1} of {path}", row[column]))
            line = reader.line_num
    except csv.Error as error:
        raise ValueError(f"data: line {line + 1} of {path} cannot be read ({error}).") from error
    return texts


def find_images(data: Any) -> list[tuple[str, str]]:
    """Paths of images, each with its place for messages.

    Raises:
        ConfigError: nothing there, or a file that is no image.
    """
    paths: list[Path] = []
    for item in [data] if isinstance(data, str | Path) else data:
        path = Path(os.path.expanduser(str(item)))
        if path.is_dir():
            known = Image.registered_extensions()
            paths += sorted(file for file in path.rglob("*") if file.suffix.lower() in known and file.is_file())
        elif path.is_file():
            paths.append(path)
        else:
            raise ConfigError(f"data={str(item)!r} is no file or folder; this model takes images.")
    for path in paths:
        try:
            with Image.open(path) as image:
                image.load()
        except Exception as error:  # decoders fail in many ways
            raise ConfigError(f"data: {path} cannot be read as an image ({' '.join(str(error).split())}).") from error
    if not paths:
        raise ConfigError(f"data={str(data)!r} holds no image.")
    return [(f"data: {path}", str(path)) for path in paths]
