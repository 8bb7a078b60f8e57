"""Fit bases on a live model: one pass over data, streaming statistics, closed forms at the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from approx_attn.attention.base import AttentionMechanism
from approx_attn.attention.calibrated import BasisMechanism, ObservingMechanism
from approx_attn.attention.eigen.basis_file import Calibration, LayerShape, as_float32
from approx_attn.attention.exact import computing_exactly
from approx_attn.attention.mask import AttentionMask
from approx_attn.conversion.calibration.moments import KINDS, STATISTICS, Moments
from approx_attn.conversion.capture import capture_attention_inputs
from approx_attn.errors import require_count


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    path: str | Path | None = None,
    statistics: Sequence[str] | None = None,
    max_rank: int | None = 64,
    rows: int | None = 64,
    exact: bool = True,
    source: Mapping[str, str] | None = None,
    progress: bool = True,
    seed: int = 0,
) -> Calibration:
    """Fit bases to what a model's attention layers see on data, and set them where the model has mechanisms.

    Runs the model once over the batches without gradient. Memory holds one batch and the statistics, which do
    not grow with the number of batches. Mechanisms of this package inside the model that start from a basis get
    theirs; a model without any, such as an unconverted Hugging Face model, gives a file to start from.

    Args:
        model: holds layers that `approx_attn.conversion.capture_attention_inputs` sees.
        batches: inputs of the model: mappings (keyword arguments), tuples or lists (arguments), or tensors.
        path: file to write, if given.
        statistics: which of `content`, `absolute`, `relative`, `absolute_raw`, `relative_raw`, `matrix` to fit; None
            takes what the mechanisms in the model need, or `content` and `absolute` where there are none.
        max_rank: columns kept of position bases; None keeps as many as the mechanisms in the model use. Content
            bases are kept whole. The memory of `matrix` grows with it: see `MatrixMoments`.
        rows: queries per batch whose rows of scores enter position bases, drawn at random; all if None.
        exact: mechanisms of this package compute exact attention during the pass, so that later layers see what
            they would in the exact model. False fits them to the model as it is.
        source: `model` and `data`, names for the header of the file.
        progress: show a progress bar.
        seed: of the draw of rows.

    Returns:
        The fitted bases.

    Raises:
        ValueError: unknown statistics, no batches, no attention layers, or mechanisms that the bases do not fit.
    """
    wanted = needed_statistics(model) if statistics is None else list(dict.fromkeys(statistics))
    if not wanted:
        raise ValueError(f"statistics must list at least one of {', '.join(STATISTICS)}, got none.")
    for kind in wanted:
        if kind not in STATISTICS:
            raise ValueError(f"statistics must be among {', '.join(STATISTICS)}, got {kind!r}.")
    max_rank = largest_rank(model) if max_rank is None else require_count("max_rank", max_rank)
    collector = StatisticsCollector(wanted, None if rows is None else require_count("rows", rows), seed, max_rank)
    collector.observers = {name: m for name, m in model.named_modules() if isinstance(m, ObservingMechanism)}
    mechanisms = [m for m in model.modules() if isinstance(m, AttentionMechanism)] if exact else []
    was_training = model.training
    model.eval()
    sequences = 0
    try:
        with torch.no_grad(), capture_attention_inputs(model, collector), computing_exactly(mechanisms):
            for batch in with_progress(batches, progress, "calibrating"):
                sequences += run_model(model, batch)
    finally:
        model.train(was_training)
    if sequences == 0:
        raise ValueError("calibration got no batches.")
    calibration = collector.fit([name for name, _ in model.named_modules()], max_rank)
    calibration.sequences = sequences
    calibration.model = (source or {}).get("model", type(model).__name__)
    calibration.data = (source or {}).get("data", "")
    if path is not None:
        calibration.save(path)
    calibration.load_into_model(model)
    for observer in collector.observers.values():
        observer.fit()
    return calibration


def needed_statistics(model: nn.Module) -> list[str]:
    """The kinds of bases that the mechanisms in a model start from; `content` and `absolute` if it has none."""
    needed = {mechanism.basis_kind for mechanism in model.modules() if isinstance(mechanism, BasisMechanism)}
    return [kind for kind in STATISTICS if kind in needed] or ["content", "absolute"]


def largest_rank(model: nn.Module) -> int:
    """The most columns that a mechanism in a model wants a basis fitted with; 1 if none wants any."""
    return max([1, *(m.fitted_columns for m in model.modules() if isinstance(m, BasisMechanism))])


class StatisticsCollector:
    """Callback of a capture: keeps the statistics of every layer."""

    def __init__(self, statistics: Sequence[str], rows: int | None, seed: int, max_rank: int) -> None:
        self.statistics, self.rows, self.seed, self.max_rank = list(statistics), rows, seed, max_rank
        self.shapes: dict[str, LayerShape] = {}
        self.moments: dict[str, dict[str, Moments]] = {}  # by layer and kind
        self.observers: dict[str, ObservingMechanism] = {}

    def __call__(
        self, layer: str, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float
    ) -> None:
        length = max(key.shape[-2], self.shapes[layer].length if layer in self.shapes else 0)
        self.shapes[layer] = LayerShape(layer, query.shape[1], key.shape[1], query.shape[-1], length, mask.causal)
        moments = self.moments.setdefault(layer, {})
        for kind in self.statistics:
            if kind not in moments:
                moments[kind] = KINDS[kind](self.rows, self.seed, self.max_rank)
            moments[kind].update(query, key, mask, scale)
        for name, mechanism in self.observers.items():
            if f"{name}.".startswith(f"{layer}."):
                mechanism.observe(query, key, mask, scale=scale)

    def fit(self, module_names: Sequence[str], max_rank: int) -> Calibration:
        """Everything fitted, layers in the order of the modules."""
        order = {name: i for i, name in enumerate(module_names)}
        names = sorted(self.shapes, key=lambda name: order.get(name, len(order)))
        tensors: dict[str, Tensor] = {}
        for i, name in enumerate(names):
            for scope in ("head", "layer"):
                for kind, moments in self.moments[name].items():
                    tensors |= as_float32(f"{i}.{kind}.{scope}.", moments.fit(scope, max_rank))
        for kind in self.statistics:
            layers = [self.moments[name][kind] for name in names]
            fit = type(layers[0]).fit_model(layers, max_rank)
            tensors |= {} if fit is None else as_float32(f"model.{kind}.", fit)
        rows = [max((moments.seen_rows for moments in self.moments[name].values()), default=0) for name in names]
        return Calibration(tensors, [self.shapes[name] for name in names], self.statistics, rows=rows)


def run_model(model: nn.Module, batch: Any) -> int:
    """Run the model on one batch, on the model's device; returns the number of sequences."""
    model_output(model, batch)
    parts = [batch] if isinstance(batch, Tensor) else list(batch.values() if isinstance(batch, Mapping) else batch)
    return next((int(part.shape[0]) for part in parts if isinstance(part, Tensor)), 1)


def model_output(model: nn.Module, batch: Any) -> Any:
    """What the model gives for one batch (a mapping, tuple, list or tensor), on the model's device."""
    refuse_texts(batch)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

    def moved(part: Any) -> Any:
        return part.to(device) if isinstance(part, Tensor) else part

    if isinstance(batch, Mapping):
        return model(**{key: moved(part) for key, part in batch.items()})
    return model(*map(moved, [batch] if isinstance(batch, Tensor) else batch))


def refuse_texts(batch: Any) -> None:
    """Raise where texts, or the keys of a single batch, stand for batches of a model's inputs."""
    if isinstance(batch, str) or (isinstance(batch, Sequence) and any(isinstance(part, str) for part in batch)):
        raise ValueError(
            "calibration must be a list of batches, and example one batch, of the model's inputs (mappings, tuples or "
            f"tensors), got {batch!r:.60}; tokenize texts first."
        )


def with_progress(batches: Iterable[Any], enabled: bool, description: str) -> Iterator[Any]:
    """The batches, with a bar that shows time left where their number is known."""
    total = len(batches) if isinstance(batches, Sized) else None
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), transient=True, disable=not enabled) as bar:
        yield from bar.track(batches, total=total, description=description)
