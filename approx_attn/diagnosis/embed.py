"""The verb `approx-attn embed`."""

from __future__ import annotations

import csv
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from rich.table import Table

from approx_attn.command import run_plain, settings
from approx_attn.data.sources import is_file, load_source, require_column, require_split
from approx_attn.diagnosis.calibrate import chosen_mechanisms, refinement_steps
from approx_attn.diagnosis.embeddings import Batch, EmbeddingPreservation, preserve_embeddings
from approx_attn.diagnosis.inputs import load_encoder
from approx_attn.errors import ConfigError, require_count
from approx_attn.output import print_table, require_file


def main(arguments: Sequence[str]) -> int:
    """`approx-attn embed`: cosine between embeddings of an encoder and of its conversions."""
    return run_plain("embed", lambda: embed(settings("embed", arguments)), arguments)


def embed(options: Mapping[str, Any]) -> list[EmbeddingPreservation]:
    """Measure what `configs/embed.yaml` asks for, print the table and write it.

    Raises:
        ConfigError: a model, a set of texts or a mechanism that cannot be used.
    """
    mechanisms, steps = chosen_mechanisms(options), refinement_steps(options)
    output = require_file("output", options["output"])
    for key in ("length", "sequences", "test_sequences", "batch_size"):
        _checked(key, options[key])
    model, tokenizer = load_encoder(str(options["model"]))
    taken = read_texts(tokenizer, "calibration", str(options["calibration"]), options["sequences"], options)
    texts = {
        Path(str(name)).name: read_texts(tokenizer, "data", str(name), options["test_sequences"], options)
        for name in measured_sets(options)
    }
    results = preserve_embeddings(model, taken, texts, mechanisms, refine=steps, progress=options["progress_bar"])
    print_table(as_table(results, str(options["model"])))
    print(write_csv(results, output))
    return results


def read_texts(tokenizer: Any, key: str, path: str, count: int, options: Mapping[str, Any]) -> list[Batch]:
    """Texts of a data set, drawn at random but always the same, as batches padded to the longest of each.

    `key` is what the command line calls the data: `calibration` or `data`.
    Texts that fill the whole length are preferred; where there are not enough of them, such as in a set of
    sentences, all texts are taken.
    """
    split_key = "calibration_split" if key == "calibration" else "split"
    try:
        splits = load_source(path)
        split = options[split_key]
        if is_file(path):  # whole, unless it both calibrates and is measured
            is_both = path == str(options["calibration"]) and path in map(str, measured_sets(options))
            splits = parts_of(splits, {options["calibration_split"], options["split"]} if is_both else {split})
        dataset = require_split(splits, split, split_key, path)
        require_column(dataset, options["text_column"], "text_column", path)
    except ValueError as error:
        raise ConfigError(str(error).replace("data.path=", f"{key}=")) from error
    order = np.random.default_rng(0).permutation(len(dataset))[: 8 * count]
    drawn = dataset.select(order.tolist())[options["text_column"]]
    encoded = tokenizer(list(drawn), truncation=True, max_length=options["length"])["input_ids"]
    full = [ids for ids in encoded if len(ids) == options["length"]]
    chosen = (full if len(full) >= count else encoded)[:count]
    if len(chosen) < count:
        raise ConfigError(
            f"{key}: {path} has {len(dataset)} texts in its split {split}, fewer than the {count} wanted."
        )
    size = options["batch_size"]
    groups = [chosen[i : i + size] for i in range(0, count, size)]
    return [dict(tokenizer.pad({"input_ids": group}, return_tensors="pt")) for group in groups]


def measured_sets(options: Mapping[str, Any]) -> list[Any]:
    """`data`, which may be one set of texts or a list of them."""
    return options["data"] if isinstance(options["data"], list) else [options["data"]]


def parts_of(splits: Mapping[str, Dataset], names: Collection[str]) -> dict[str, Dataset]:
    """A file without splits in parts of the same size, drawn at random but always the same; one part is the whole."""
    (whole,) = splits.values()
    order = np.random.default_rng(1).permutation(len(whole))
    parts = np.array_split(order, len(names))
    return {name: whole.select(np.sort(part)) for name, part in zip(sorted(names), parts, strict=True)}


def as_table(results: Sequence[EmbeddingPreservation], model: str) -> Table:
    """One row per mechanism, one column per set of texts."""
    table = Table(title=f"Mean cosine to the unchanged embeddings: {Path(model).name}", title_justify="left")
    table.caption = "Mean-pooled last hidden states; nothing fine-tuned."
    sets = list(dict.fromkeys(result.data for result in results))
    for header in ("mechanism", "exact pairs", "score cost", *sets):
        table.add_column(header, justify="left" if header == "mechanism" else "right")
    for label in dict.fromkeys(result.label for result in results):
        row = {result.data: result for result in results if result.label == label}
        first = row[sets[0]]
        figures = (f"{row[name].cosine:.4f}" for name in sets)
        table.add_row(label, f"{first.exact_share:.1%}", f"{first.score_ratio:.2f}", *figures)
    return table


def write_csv(results: Sequence[EmbeddingPreservation], path: Path) -> Path:
    """The same numbers as a file, one line per mechanism and set of texts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(EmbeddingPreservation)])
        writer.writeheader()
        writer.writerows(map(asdict, results))
    return path


def _checked(key: str, value: Any) -> None:
    try:
        require_count(key, value)
    except ValueError as error:
        raise ConfigError(str(error)) from error
