"""Fit bases on a live model: one pass over data, streaming statistics, closed forms at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from approx_attn.attention.base import AttentionMechanism
from approx_attn.attention.exact import ExactAttention
from approx_attn.attention.mask import AttentionMask
from approx_attn.conversion.calibration.basis_file import STATISTICS, Calibration, LayerShape, as_float32, has_basis
from approx_attn.conversion.calibration.moments import ContentMoments, PositionMoments, position_statistics
from approx_attn.conversion.calibration.position_fit import fit_position_basis
from approx_attn.conversion.capture import capture_attention_inputs
from approx_attn.errors import require_count


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    path: str | Path | None = None,
    statistics: Sequence[str] | None = None,
    max_rank: int = 64,
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
        statistics: which of `content`, `absolute`, `relative`, `absolute_raw`, `relative_raw` to fit; None takes what
            the mechanisms in the model need, or `content` and `absolute` where there are none.
        max_rank: columns kept of position bases. Content bases are kept whole.
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
    for name in wanted:
        if name not in STATISTICS:
            raise ValueError(f"statistics must be among {', '.join(STATISTICS)}, got {name!r}.")
    collector = StatisticsCollector(wanted, None if rows is None else require_count("rows", rows), seed)
    collector.observers = {name: m for name, m in model.named_modules() if hasattr(m, "observe") and hasattr(m, "fit")}
    was_training = model.training
    model.eval()
    sequences = 0
    try:
        with torch.no_grad(), capture_attention_inputs(model, collector), _exact_attention(model, exact):
            for batch in with_progress(batches, progress, "calibrating"):
                sequences += run_model(model, batch)
    finally:
        model.train(was_training)
    if sequences == 0:
        raise ValueError("calibration got no batches.")
    calibration = collector.fit([name for name, _ in model.named_modules()], require_count("max_rank", max_rank))
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
    """The statistics that the mechanisms in a model start from; `content` and `absolute` if it has none."""
    needed = set()
    for mechanism in model.modules():
        if isinstance(mechanism, AttentionMechanism) and has_basis(mechanism):
            content = hasattr(mechanism, "load_content_basis")
            needed.add("content" if content else str(getattr(mechanism, "alignment", "absolute")))
    return [name for name in STATISTICS if name in needed] or ["content", "absolute"]


class StatisticsCollector:
    """Callback of a capture: keeps the statistics of every layer."""

    def __init__(self, statistics: Sequence[str], rows: int | None, seed: int) -> None:
        self.statistics, self.rows, self.seed = list(statistics), rows, seed
        self.shapes: dict[str, LayerShape] = {}
        self.content: dict[str, ContentMoments] = {}
        self.position: dict[str, dict[str, PositionMoments]] = {}
        self.observers: dict[str, Any] = {}  # mechanisms that take statistics of their own

    def __call__(
        self, layer: str, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float
    ) -> None:
        length = max(key.shape[-2], self.shapes[layer].length if layer in self.shapes else 0)
        self.shapes[layer] = LayerShape(layer, query.shape[1], key.shape[1], query.shape[-1], length, mask.causal)
        if "content" in self.statistics:
            self.content.setdefault(layer, ContentMoments()).update(query, key, mask)
        moments = self.position.setdefault(layer, {})
        for statistic in self.statistics:
            if statistic != "content":
                alignment, _, raw = statistic.partition("_")
                if statistic not in moments:
                    moments[statistic] = PositionMoments(alignment, centred=not raw, rows=self.rows, seed=self.seed)
                moments[statistic].update(query, key, mask, scale)
        for name, mechanism in self.observers.items():
            if f"{name}.".startswith(f"{layer}."):
                mechanism.observe(query, key, mask, scale=scale)

    def fit(self, module_names: Sequence[str], max_rank: int) -> Calibration:
        """Everything fitted, layers in the order of the modules."""
        order = {name: i for i, name in enumerate(module_names)}
        names = sorted(self.shapes, key=lambda name: order.get(name, len(order)))
        tensors: dict[str, Tensor] = {}
        for i, name in enumerate(names):
            for pool in ("head", "layer"):
                if name in self.content:
                    content = self.content[name].fit(pool)
                    tensors |= as_float32({f"{i}.content.{pool}.{k}": v for k, v in vars(content).items()})
                for statistic, moments in self.position[name].items():
                    position = moments.fit(pool, max_rank)
                    tensors |= as_float32({f"{i}.{statistic}.{pool}.{k}": v for k, v in vars(position).items()})
        tensors |= as_float32(self._fit_model(names, max_rank))
        rows = [self._rows(name) for name in names]
        return Calibration(tensors, [self.shapes[name] for name in names], self.statistics, rows=rows)

    def _rows(self, name: str) -> int:
        seen = [int(self.content[name].queries)] if name in self.content else []
        return max(seen + [moments.seen_rows for moments in self.position[name].values()])

    def _fit_model(self, names: list[str], max_rank: int) -> dict[str, Tensor]:
        """One basis for all layers, of every statistic that has the same shape in all of them."""
        tensors: dict[str, Tensor] = {}
        if len({self.shapes[name].head_dim for name in names}) == 1 and self.content:
            pooled = ContentMoments()
            for name in names:
                pooled.add(self.content[name])
            tensors |= {f"model.content.{k}": v for k, v in vars(pooled.fit("layer")).items()}
        for statistic in self.statistics:
            moments = [self.position[name][statistic] for name in names if statistic != "content"]
            if moments and len({part.total.shape[-1] for part in moments}) == 1:
                sums = [sum(parts) for parts in zip(*(part.pooled_sums() for part in moments), strict=True)]
                mean, covariance = position_statistics(*sums)
                fit = fit_position_basis(mean, covariance, centred=moments[0].centred, max_rank=max_rank)
                tensors |= {f"model.{statistic}.{k}": v for k, v in vars(fit).items()}
        return tensors


@contextmanager
def _exact_attention(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Let the mechanisms of this package in a model compute exact attention meanwhile."""
    mechanisms = [m for m in model.modules() if isinstance(m, AttentionMechanism)] if enabled else []
    for mechanism in mechanisms:
        attend: Callable[..., Any] = partial(ExactAttention.attend, mechanism)  # type: ignore[arg-type]
        mechanism.attend = attend  # type: ignore[method-assign]
    try:
        yield
    finally:
        for mechanism in mechanisms:
            del mechanism.attend


def run_model(model: nn.Module, batch: Any) -> int:
    """Run the model on one batch, on the model's device; returns the number of sequences."""
    refuse_texts(batch)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

    def moved(part: Any) -> Any:
        return part.to(device) if isinstance(part, Tensor) else part

    if isinstance(batch, Tensor):
        inputs: list[Any] = [batch]
        model(moved(batch))
    elif isinstance(batch, Mapping):
        inputs = list(batch.values())
        model(**{key: moved(part) for key, part in batch.items()})
    else:
        inputs = list(batch)
        model(*(moved(part) for part in inputs))
    return next((int(part.shape[0]) for part in inputs if isinstance(part, Tensor)), 1)


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
