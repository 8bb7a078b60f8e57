"""Validation curves of runs, and after how many steps they first reach a figure."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from approx_attn.comparison.statistics import PairedDifference, Summary, paired_difference, summarise
from approx_attn.metrics import Metric

Record = Mapping[str, Any]


def validation_curve(run: Record | None, metric: Metric) -> dict[int, float]:
    """Optimizer steps made -> validation figure of one run, from its record; if it has none, from its metrics.csv."""
    if run and "curve" in run:
        return dict(run["curve"])
    if run and run.get("history"):
        return {int(step): figure for step, figure in run["history"].get(f"val/{metric.name}", [])}
    path = Path(run["run_dir"]) / "metrics.csv" if run and "run_dir" in run else None
    if path is None or not path.is_file():
        return {}
    with path.open(newline="") as file:
        lines = csv.DictReader(file)
        # A row carries the number of steps made before its own.
        return {int(line["step"]) + 1: float(value) for line in lines if (value := line.get(f"val/{metric.name}"))}


@dataclass(frozen=True)
class StepsTo:
    """After how many steps the runs of a mechanism first had a validation figure at least as good as one asked for.

    A run that never had it is left out of the means, which are then of the quicker seeds: it is counted, not guessed.

    Attributes:
        seeds: those whose runs had it.
        runs: number of finished runs.
        steps: over these seeds; None if there is none.
        difference: from the reference, over the seeds that had it with both; None where there is no such seed.
    """

    seeds: tuple[int, ...]
    runs: int
    steps: Summary | None
    difference: PairedDifference | None


def steps_to(reach: float, runs: Mapping[int, Record], base: Mapping[int, Record] | None, metric: Metric) -> StepsTo:
    """When finished runs first had a validation figure as good as `reach`.

    Args:
        reach: the figure.
        runs: of a mechanism, by seed.
        base: of the reference, by seed; None for the reference itself.
        metric: which figure, and which way it gets better.
    """
    mine, theirs = (_first_steps(reach, each, metric) for each in (runs, base or {}))
    shared = [seed for seed in mine if seed in theirs]
    return StepsTo(
        seeds=tuple(mine),
        runs=len(runs),
        steps=summarise(list(mine.values())) if mine else None,
        difference=paired_difference([mine[s] for s in shared], [theirs[s] for s in shared]) if shared else None,
    )


def _first_steps(reach: float, runs: Mapping[int, Record], metric: Metric) -> dict[int, int]:
    found = {}
    for seed, run in runs.items():
        curve = sorted(validation_curve(run, metric).items())
        reached = (step for step, figure in curve if (figure >= reach if metric.higher_is_better else figure <= reach))
        first = next(reached, None)
        if first is not None:
            found[seed] = first
    return found
