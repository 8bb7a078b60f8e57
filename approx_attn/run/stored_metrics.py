"""The predictions that a run keeps, and metrics from them that were not asked for when it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from approx_attn.metrics import METRICS, Tally, figures
from approx_attn.run.record import open_atomically

PREDICTIONS_FILE = "test_predictions.npz"


def save_predictions(folder: Path, predictions: Mapping[str, torch.Tensor] | None) -> None:
    """Keep what a test predicted, if it did, as arrays of the same names, one entry per scored item.

    Args:
        folder: of the run.
        predictions: `prediction`, `probability` and `label`, as `SequenceTask.predictions` has them.
    """
    if predictions is None:
        return
    arrays: dict[str, Any] = {
        key: value.numpy().astype(np.float32 if value.is_floating_point() else np.int32)
        for key, value in predictions.items()
    }
    with open_atomically(folder / PREDICTIONS_FILE) as file:
        np.savez_compressed(file, **arrays)


def with_metrics(result: dict[str, Any], folder: str | Path, names: Sequence[str]) -> dict[str, Any]:
    """A record of a finished run with these test metrics, as far as its predictions tell them.

    Args:
        result: what `result.json` holds.
        folder: of the run.
    """
    path, absent = Path(folder) / PREDICTIONS_FILE, lacking(result, names)
    if not absent or not path.is_file():
        return result
    with np.load(path, allow_pickle=False) as arrays:
        kept = {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays.files}
    wanted = [name for name in absent if "probability" in kept or not METRICS[name].needs_probability]
    labels, predicted = kept["label"].long(), kept["prediction"].long()
    tally = Tally(result["spec"]["num_classes"])
    tally.update(predicted, labels, kept.get("probability", torch.zeros(len(labels))))
    found = figures(wanted, tally.compute(), result["spec"].get("class_names", ()))
    return {**result, "metrics": {**result["metrics"], **{f"test/{name}": value for name, value in found.items()}}}


def how_to_get(name: str, folder: str | Path) -> str:
    """A sentence about a metric that a run's record does not have and its predictions do not tell."""
    return (
        "the run was made without it, and its predictions do not tell it; "
        f"approx-attn evaluate checkpoint={folder}/checkpoints/best.ckpt metrics=[{name}] does."
    )


def lacking(result: dict[str, Any], names: Sequence[str]) -> list[str]:
    """Those of the metrics that a record of a finished run does not have."""
    known = {key.split("/")[1] for key in result["metrics"] if key.startswith("test/")}
    return [name for name in names if name not in known]
