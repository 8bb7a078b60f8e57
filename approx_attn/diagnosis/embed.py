"""How far the embeddings of texts move when an encoder's attention is replaced, and the verb `approx-attn embed`.

Nothing is fine-tuned. Unlike `reconstruct`, which measures every layer on its own, the whole model runs with the
mechanism here, so that errors of one layer go on through the next. The embedding of a text is the mean of its last
hidden states.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F

from approx_attn.command import as_list, require_counts, run_plain, settings
from approx_attn.conversion.calibration.fitting import calibrate, with_progress
from approx_attn.data.sources import is_file, load_source, require_column, require_split
from approx_attn.diagnosis.calibrate import chosen_mechanisms, read_budgets, refinement_steps
from approx_attn.diagnosis.inputs import load_encoder
from approx_attn.diagnosis.variants import Attention, basis_variants, converted_copy, costs
from approx_attn.errors import ConfigError
from approx_attn.output import print_table, require_file, to_csv, to_table
from approx_attn.run.record import write_text_atomically

Batch = dict[str, Tensor]


@dataclass
class EmbeddingPreservation:
    """One mechanism on one set of texts.

    Attributes:
        label: what the table calls the mechanism.
        data: what it calls the texts.
        cosine: mean over texts of the cosine between the embedding of the original and of the converted model.
        error: ‖Ê − E‖ / ‖E‖, E the embeddings of all texts by the original model.
        lowest: the least of these cosines.
        exact_share: share of the pairs whose exact score enters the result, at the longest text.
        score_ratio: multiply-adds of scores and selection relative to exact attention's scores, likewise.
    """

    label: str
    data: str
    cosine: float
    error: float
    lowest: float
    exact_share: float
    score_ratio: float


def preserve_embeddings(
    model: nn.Module,
    calibration: Sequence[Batch],
    texts: Mapping[str, Sequence[Batch]],
    mechanisms: Mapping[str, Attention],
    *,
    refine: int = 0,
    progress: bool = True,
) -> list[EmbeddingPreservation]:
    """Cosine between the embeddings of an encoder and of the same encoder with another attention.

    Args:
        model: an encoder of transformers, not converted; stays as it is.
        calibration: batches of inputs that bases are fitted on: `input_ids` and `attention_mask`, both (b, n).
        texts: by name, batches to measure on.
        mechanisms: by label, `{"name": ..., **options}`, or budgets of all layers.
        refine: steps of gradient; more than 0 adds mechanisms with a random and with a refined content basis.
        progress: show progress bars.

    Returns:
        One result per mechanism and set of texts, in their order.

    Raises:
        ValueError: an unknown mechanism or option, or a model that cannot be converted.
    """
    original = {name: embeddings(model, batches, progress) for name, batches in texts.items()}
    longest = {name: max(batch["input_ids"].shape[1] for batch in batches) for name, batches in texts.items()}
    length = max(*longest.values(), *(batch["input_ids"].shape[1] for batch in calibration))
    fitted = calibrate(model, calibration, statistics=["content", "absolute"], progress=progress)
    mechanisms, bases = basis_variants(model, calibration, mechanisms, fitted, refine, progress)
    results = []
    for label, spec in mechanisms.items():
        converted = converted_copy(model, spec, bases.get(label, fitted), length)
        for name, batches in texts.items():
            moved = embeddings(converted, batches, progress)
            cosines = F.cosine_similarity(moved, original[name], dim=-1)
            own, exact = costs(converted, longest[name])
            results.append(
                EmbeddingPreservation(
                    label=label,
                    data=name,
                    cosine=float(cosines.mean()),
                    error=float((moved - original[name]).norm() / original[name].norm()),
                    lowest=float(cosines.min()),
                    exact_share=own.exact_share,
                    score_ratio=own.score_multiply_adds / exact.score_multiply_adds,
                )
            )
    return results


def embeddings(model: nn.Module, batches: Iterable[Batch], progress: bool = False) -> Tensor:
    """(texts, dim) float64: the mean of the last hidden states over the real tokens of every text."""
    device = next(model.parameters()).device
    pooled = []
    with torch.no_grad():
        for batch in with_progress(batches, progress, "embedding"):
            inputs = {key: part.to(device) for key, part in batch.items()}
            hidden = model(**inputs).last_hidden_state.double()  # (b, n, dim)
            keep = inputs["attention_mask"][..., None].double()  # (b, n, 1)
            pooled.append((hidden * keep).sum(dim=1) / keep.sum(dim=1))
    return torch.cat(pooled).cpu()


# -- the verb ------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """`approx-attn embed`: cosine between embeddings of an encoder and of its conversions."""
    return run_plain("embed", lambda: embed(settings("embed", arguments)), arguments)


def embed(options: Mapping[str, Any]) -> list[EmbeddingPreservation]:
    """Measure what `configs/embed.yaml` asks for, print the table and write it.

    Raises:
        ConfigError: a model, a set of texts or a mechanism that cannot be used.
    """
    budgets, steps = read_budgets(options), refinement_steps(options)
    mechanisms = chosen_mechanisms(options) | budgets
    output = require_file("output", options["output"])
    require_counts({key: options[key] for key in ("length", "sequences", "test_sequences", "batch_size")})
    model, tokenizer = load_encoder(str(options["model"]))
    taken = read_texts(tokenizer, "calibration", str(options["calibration"]), options["sequences"], options)
    texts = {
        Path(str(name)).name: read_texts(tokenizer, "data", str(name), options["test_sequences"], options)
        for name in as_list(options["data"])
    }
    results = preserve_embeddings(model, taken, texts, mechanisms, refine=steps, progress=options["progress_bar"])
    title = f"Mean cosine to the unchanged embeddings: {Path(str(options['model'])).name}"
    caption = "Mean-pooled last hidden states; nothing fine-tuned. Error: ‖Ê − E‖ / ‖E‖ over all texts."
    print_table(to_table(cells(results), title=title, caption=caption))
    write_text_atomically(output, to_csv(list(map(asdict, results))))
    print(output)
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
            is_both = path == str(options["calibration"]) and path in map(str, as_list(options["data"]))
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


def parts_of(splits: Mapping[str, Dataset], names: Collection[str]) -> dict[str, Dataset]:
    """A file without splits in parts of the same size, drawn at random but always the same; one part is the whole."""
    (whole,) = splits.values()
    order = np.random.default_rng(1).permutation(len(whole))
    parts = np.array_split(order, len(names))
    return {name: whole.select(np.sort(part)) for name, part in zip(sorted(names), parts, strict=True)}


def cells(results: Sequence[EmbeddingPreservation]) -> list[dict[str, str]]:
    """One row per mechanism, one column per set of texts."""
    rows: dict[str, dict[str, str]] = {}
    for result in results:
        cost = {"exact pairs": f"{result.exact_share:.1%}", "score cost": f"{result.score_ratio:.2f}"}
        row = rows.setdefault(result.label, {"mechanism": result.label, **cost})
        row[result.data] = f"{result.cosine:.4f}"
        row[f"error {result.data}"] = f"{result.error:.4f}"
    return list(rows.values())
