"""Statistics of comparisons: runs of two mechanisms are paired by seed, and intervals come before verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Mean and spread of one figure over seeds. `std` is the sample standard deviation, NaN for one seed."""

    mean: float
    std: float
    count: int


def summarise(values: Sequence[float]) -> Summary:
    """Mean and sample standard deviation (n - 1) of at least one value."""
    if not values:
        raise ValueError("values must hold at least one number, got none.")
    array = np.asarray(values, dtype=np.float64)
    return Summary(float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else math.nan, len(array))


def mean_interval(summary: Summary) -> float:
    """Half the width of Student's t interval of a mean at `CONFIDENCE`; NaN for one value."""
    if summary.count < 2:
        return math.nan
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, summary.count - 1)) * summary.std / math.sqrt(summary.count)


@dataclass(frozen=True)
class PairedDifference:
    """Difference of a mechanism from the reference over the seeds that both have.

    Attributes:
        mean: mean of (mechanism - reference).
        low, high: bounds of its t interval at `CONFIDENCE`; NaN where there is no spread to make one from.
        p_value: two-sided paired t-test; NaN likewise, and 1 where all differences are zero.
        count: number of seeds that both have.
        spread: standard deviation of the differences that the interval is made from; NaN for one seed.
        spread_of_items: that is the spread of the test items, because the seeds show none.
    """

    mean: float
    low: float
    high: float
    p_value: float
    count: int
    spread: float = math.nan
    spread_of_items: bool = False

    @property
    def distinguishable(self) -> bool:
        """True when the interval leaves zero out."""
        return self.low > 0.0 or self.high < 0.0

    @property
    def has_interval(self) -> bool:
        """False for one seed, and where all differences are the same and nothing else says how sure that is."""
        return not math.isnan(self.low)


def paired_difference(
    values: Sequence[float], reference: Sequence[float], item_spread: float = 0.0
) -> PairedDifference:
    """Student's t interval of the paired differences.

    Args:
        values, reference: one figure per seed, in the same order of seeds.
        item_spread: standard deviation that the test items alone give such a difference (`item_spread`).

    A few seeds give few degrees of freedom and wide intervals; that is the truth about a few seeds. The
    bootstrap is no way around it: with three pairs it resamples three numbers and its intervals are too short.

    Accuracies on a few hundred items are steps, so two or three differences are easily the same by chance. Then
    there is no spread to divide by, and "p = 0" would be wrong: of two equal mechanisms, which differ in a handful of
    items, two seeds would call one in ten different. The spread of the items takes its place there. (In place
    of every smaller spread it would cost a third of the power at three seeds.)
    """
    if len(values) != len(reference) or not values:
        raise ValueError(f"values and reference must pair up, got {len(values)} and {len(reference)} numbers.")
    differences = np.asarray(values, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    mean, count = float(differences.mean()), len(differences)
    if count < 2:
        return PairedDifference(mean, math.nan, math.nan, math.nan, count)
    spread = float(differences.std(ddof=1))
    # Figures come in float32, so equal differences are equal but for its rounding.
    rounding = 2 * float(np.finfo(np.float32).eps) * float(np.max(np.abs([values, reference])))
    same = spread <= rounding
    if same:
        spread = float(item_spread)
    if spread == 0.0:
        p_value = 1.0 if abs(mean) <= rounding else math.nan
        return PairedDifference(mean, math.nan, math.nan, p_value, count, 0.0)
    error = spread / math.sqrt(count)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    p_value = float(2 * stats.t.sf(abs(mean) / error, count - 1))
    return PairedDifference(mean, mean - half, mean + half, p_value, count, spread, same)


class Disagreement(NamedTuple):
    """How two trained models differ on the same test items.

    Attributes:
        gained: items that the model got right and the reference wrong.
        lost: items that it got wrong and the reference right.
        items: all items.
    """

    gained: int
    lost: int
    items: int


def disagreement(correct: NDArray[np.bool_], reference_correct: NDArray[np.bool_]) -> Disagreement:
    """Count where a model and the reference differ.

    Args:
        correct, reference_correct: (items,) bool, item by item in the same order.
    """
    correct, reference_correct = np.asarray(correct, bool), np.asarray(reference_correct, bool)
    if correct.shape != reference_correct.shape:
        raise ValueError(f"both need the same items, got shapes {correct.shape} and {reference_correct.shape}.")
    gained, lost = (correct & ~reference_correct).sum(), (~correct & reference_correct).sum()
    return Disagreement(int(gained), int(lost), correct.size)


def item_spread(found: Disagreement) -> float:
    """Standard deviation of a difference of two accuracies, had the test items been drawn anew.

    Item by item the difference is 1 (gained), -1 (lost) or 0; this is its standard deviation by the root of the items.
    """
    gained, lost, items = found
    return math.sqrt((gained + lost) * items - (gained - lost) ** 2) / (items * math.sqrt(items))


def holm_adjust(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of p-values for the number of comparisons made; NaN stays NaN."""
    known = [(p, index) for index, p in enumerate(p_values) if not math.isnan(p)]
    adjusted = list(map(float, p_values))
    running = 0.0
    for rank, (p, index) in enumerate(sorted(known)):
        running = max(running, min(1.0, p * (len(known) - rank)))
        adjusted[index] = running
    return adjusted


def mcnemar(found: Disagreement) -> float:
    """Exact McNemar test: two-sided p-value that two models err equally often on the same test items."""
    differing = found.gained + found.lost
    return float(stats.binomtest(found.gained, differing, 0.5).pvalue) if differing else 1.0


def power(gap: float, std: float, count: int) -> float:
    """Chance that a paired t-test over `count` seeds finds a true gap, given the std of the differences."""
    if count < 2:
        return 0.0
    if gap == 0.0:
        return 1.0 - CONFIDENCE
    if std == 0.0:
        return 1.0
    critical = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)
    shift = abs(gap) / std * math.sqrt(count)
    # The square of a noncentral t is a noncentral F, whose tail is computed more reliably at one degree of freedom.
    return float(stats.ncf.sf(critical**2, 1, count - 1, shift**2))


def detectable_gap(std: float, count: int, wanted_power: float = 0.8) -> float:
    """Smallest true gap that `count` seeds find with the wanted power; infinite for fewer than two seeds.

    NaN if the std is not finite, as where a figure of some seed is not.
    """
    if count < 2:
        return math.inf
    if not math.isfinite(std):
        return math.nan
    if std == 0.0:
        return 0.0
    highest = std
    while power(highest, std, count) < wanted_power:
        highest *= 2.0
    return float(optimize.brentq(lambda gap: power(gap, std, count) - wanted_power, 0.0, highest))


def pareto_frontier(costs: Sequence[float], gains: Sequence[float]) -> list[bool]:
    """Which points no other point beats: lower or equal cost and higher or equal gain, one of them strictly.

    A point with a NaN beats none and counts as beaten.
    """
    points = list(zip(costs, gains, strict=True))
    return [
        not (math.isnan(cost) or math.isnan(gain))
        and not any(c <= cost and g >= gain and (c < cost or g > gain) for c, g in points)
        for cost, gain in points
    ]
