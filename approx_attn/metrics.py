"""What models are judged by: every metric is declared once, with its direction and how it reads.

`loss` and `accuracy` are always there. The others come from `Tally`, sums over the scored items that processes add
up, and so can be computed from stored predictions as well. A declaration in `METRICS`, or `register_metric` in a
package of one's own, is all that a metric needs: runs, callbacks, tables, plots and listings take it from there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric as TorchMetric

from approx_attn.errors import ConfigError, suggestion

CONFIDENCE_BINS = 15  # of equal width, as in Guo et al., On Calibration of Modern Neural Networks, ICML 2017


class Counts(NamedTuple):
    """Sums over items, for C classes and the bins of confidence.

    Attributes:
        correct, predicted, labelled: (C,) items of each class that were predicted rightly, predicted, and there.
        confidence, hits: (bins,) sum of the probabilities of the predicted class, and how often it was right.
    """

    correct: Tensor
    predicted: Tensor
    labelled: Tensor
    confidence: Tensor
    hits: Tensor


@dataclass(frozen=True)
class Metric:
    """A figure of an evaluation.

    Attributes:
        name: as in records (`test/<name>`) and on the command line.
        percent: whether it reads as a percentage.
        higher_is_better: its direction.
        label: as people read it; the name if empty.
        compute: from counts to a number, or to one number per class (NaN for a class without items); None where a
            mean over batches is all that is needed.
        per_class: `compute` gives one number per class.
        needs_probability: the predicted class alone does not tell it.
        is_share_of_items: it is the share of the items that were predicted rightly, so predictions tell its spread.
        task: the only kind of data whose task computes it, in its own way; empty where every task has it.
    """

    name: str
    percent: bool
    higher_is_better: bool
    label: str = ""
    compute: Callable[[Counts], Tensor] | None = None
    per_class: bool = False
    needs_probability: bool = False
    is_share_of_items: bool = False
    task: str = ""

    @property
    def key(self) -> str:
        """Its name among the figures of a record."""
        return f"test/{self.name}"

    @property
    def header(self) -> str:
        text = self.label or self.name
        return f"{text} %" if self.percent else text

    @property
    def factor(self) -> float:
        return 100.0 if self.percent else 1.0

    def show(self, value: float) -> str:
        return f"{self.factor * value:.{2 if self.percent else 4}f}"

    def show_difference(self, value: float) -> str:
        return f"{self.factor * value:+.{2 if self.percent else 4}f}"


def _f1(counts: Counts) -> Tensor:
    """Macro F1, over the classes that occur among labels or predictions."""
    occurring = counts.predicted + counts.labelled
    return (2 * counts.correct / occurring)[occurring > 0].mean()


def _recalls(counts: Counts) -> Tensor:
    return counts.correct / counts.labelled


def _balanced_accuracy(counts: Counts) -> Tensor:
    """Mean over the classes that occur among labels."""
    return _recalls(counts)[counts.labelled > 0].mean()


def _calibration_error(counts: Counts) -> Tensor:
    """Expected calibration error: mean distance of accuracy from confidence, by bins of confidence."""
    return (counts.hits - counts.confidence).abs().sum() / counts.labelled.sum()


METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", percent=True, higher_is_better=True, is_share_of_items=True),
        Metric("loss", percent=False, higher_is_better=False),
        Metric("f1", percent=True, higher_is_better=True, label="macro F1", compute=_f1),
        Metric(
            "balanced_accuracy",
            percent=True,
            higher_is_better=True,
            label="balanced accuracy",
            compute=_balanced_accuracy,
        ),
        Metric(
            "per_class_accuracy",
            percent=True,
            higher_is_better=True,
            label="accuracy of class",
            compute=_recalls,
            per_class=True,
        ),
        Metric(
            "calibration_error",
            percent=True,
            higher_is_better=False,
            label="calibration error",
            compute=_calibration_error,
            needs_probability=True,
        ),
        Metric("exact_match", percent=True, higher_is_better=True, label="exact match", task="translation"),
        Metric("bleu", percent=True, higher_is_better=True, label="BLEU", task="translation"),
    )
}
DEFAULT = ("accuracy",)
MEANS = tuple(name for name, metric in METRICS.items() if metric.compute is None and not metric.task)
"""The metrics that are means over items, which every step computes."""


def register_metric(metric: Metric) -> Metric:
    """Make a metric of one's own available as `metrics=[<name>]`.

    Raises:
        ConfigError: its name is taken or is not one word, or nothing computes it.
    """
    if metric.name in METRICS:
        raise ConfigError(f"metrics: the name {metric.name!r} is taken.")
    if not metric.name.isidentifier() or metric.compute is None:
        raise ConfigError(f"metrics: {metric.name!r} must be one word and have a function `compute`.")
    METRICS[metric.name] = metric
    return metric


def metric_of(name: str) -> Metric:
    """The metric of a figure such as `f1`, `val/loss` or `test/per_class_accuracy/<class>`.

    Raises:
        ConfigError: no metric has this name.
    """
    plain = re.sub(r"^(train|val|test|best_val)/", "", name)
    base, _, of_class = plain.partition("/")
    if base not in METRICS or (of_class and not METRICS[base].per_class):
        raise ConfigError(f"metrics: {plain!r} is no metric{suggestion(plain, METRICS)}")
    metric = METRICS[base]
    return replace(metric, name=plain, label=f"{metric.label} {of_class}") if of_class else metric


def metric_direction(name: str) -> Literal["min", "max"]:
    """Which way a figure such as `val/f1` gets better, in the words of Lightning's callbacks.

    Raises:
        ConfigError: no metric has this name.
    """
    return "max" if metric_of(name).higher_is_better else "min"


def metric_names(value: Any) -> tuple[str, ...]:
    """The value of `metrics` in a configuration, checked; None means the default.

    Raises:
        ConfigError: an unknown name, or no list of names.
    """
    if value is None:
        return DEFAULT
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, Sequence) or not names:
        raise ConfigError(f"metrics must be a list of {', '.join(METRICS)}, got {value!r}.")
    for name in names:
        if name not in METRICS:
            raise ConfigError(f"metrics: {name!r} is unknown{suggestion(str(name), METRICS)}")
    return tuple(dict.fromkeys(names))


class Tally(TorchMetric):
    """Sums over the scored items of an evaluation, of all processes, that metrics are computed from.

    Args:
        num_classes: C.
    """

    full_state_update = False
    correct: Tensor
    predicted: Tensor
    labelled: Tensor
    confidence: Tensor
    hits: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        for field in Counts._fields:
            size = CONFIDENCE_BINS if field in ("confidence", "hits") else num_classes
            kind = torch.float32 if field == "confidence" else torch.int64  # float32 would stop counting at 2^24
            self.add_state(field, torch.zeros(size, dtype=kind), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, labels: Tensor, probability: Tensor) -> None:
        """Add items.

        Args:
            predicted, labels: (items,) int64, the predicted and the true class.
            probability: (items,) of the predicted class.
        """
        classes, right = len(self.correct), predicted == labels
        self.correct += torch.bincount(labels[right], minlength=classes)
        self.predicted += torch.bincount(predicted, minlength=classes)
        self.labelled += torch.bincount(labels, minlength=classes)
        # A NaN among the probabilities is counted in the first bin, whose sum becomes NaN.
        bins = (probability.nan_to_num() * CONFIDENCE_BINS).long().clamp(0, CONFIDENCE_BINS - 1)  # (items,)
        self.hits += torch.bincount(bins[right], minlength=CONFIDENCE_BINS)
        chosen = bins[:, None] == torch.arange(CONFIDENCE_BINS, device=bins.device)  # (items, bins)
        self.confidence += torch.where(chosen, probability[:, None], 0.0).sum(0)

    def compute(self) -> Counts:
        return Counts(*(getattr(self, field) for field in Counts._fields))


def figures(names: Collection[str], counts: Counts, class_names: Sequence[str] = ()) -> dict[str, float]:
    """Numbers by name, of those metrics that are computed from counts.

    Metrics per class give `<metric>/<class>` for every class that has items.
    """
    found: dict[str, float] = {}
    counts = Counts(*(part.cpu().double() for part in counts))
    for name in names:
        metric = METRICS[name]
        if metric.compute is None:
            continue
        values = metric.compute(counts)
        if metric.per_class:
            for index, value in enumerate(values.tolist()):
                if counts.labelled[index] > 0:
                    found[f"{name}/{_figure_name(index, class_names)}"] = value
        else:
            found[name] = float(values)
    return found


def _figure_name(index: int, class_names: Sequence[str]) -> str:
    """A class as loggers take it: its name, or its number where the name has other characters."""
    name = class_names[index] if index < len(class_names) else ""
    return name if re.fullmatch(r"[\w .:-]+", name) else str(index)
