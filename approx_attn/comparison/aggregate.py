"""From the records of runs to the rows of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from approx_attn.comparison.statistics import (
    Disagreement,
    PairedDifference,
    disagreement,
    item_spread,
    paired_difference,
    summarise,
)
from approx_attn.comparison.table import ComparisonRow, MetricRows
from approx_attn.comparison.validation_curves import steps_to
from approx_attn.metrics import Metric, metric_of
from approx_attn.run.stored_metrics import PREDICTIONS_FILE

Record = dict[str, Any]
Records = Mapping[str, Mapping[int, Record | None]]
"""Mechanism -> seed -> record of the run with its `run_dir` and `command`; None where there is none."""


@dataclass(frozen=True)
class StepMeasurement:
    """One training step of a mechanism, measured in turns with all others of the comparison.

    Attributes:
        relative_time: median over rounds of its time by the reference's in the same round.
        spread: half the interquartile range of that ratio.
        seconds: that ratio times the median time of the reference's.
        memory: peak bytes held during the step.
    """

    relative_time: float
    spread: float
    seconds: float
    memory: int

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> StepMeasurement:
        """What was written to a file.

        Raises:
            KeyError, TypeError, ValueError: it is not a measurement.
        """
        found = cls(*(content[field.name] for field in fields(cls)))
        if not (found.relative_time > 0 and found.seconds > 0):
            raise ValueError("a step takes time.")
        return found


def comparison_rows(
    records: Records,
    reference: str,
    metric: Metric,
    measurements: Mapping[str, StepMeasurement],
    reach: float | None = None,
) -> list[ComparisonRow]:
    """One row per mechanism, in the order of the records.

    Args:
        records: of all runs.
        reference: the mechanism that differences and ratios are relative to.
        metric: the test figure.
        measurements: mechanism -> its measured training step, as far as known.
        reach: a validation figure, to count the steps to it.
    """
    base = finished_runs(records[reference])
    base_cost = _cost(base)
    rows = []
    for name, by_seed in records.items():
        runs = finished_runs(by_seed)
        cost, measured = _cost(runs), measurements.get(name)
        rows.append(
            ComparisonRow(
                name=name,
                figure=summarise(list(_figures(runs, metric).values())) if runs else None,
                difference=None if name == reference else _difference(runs, base, metric),
                exact_share=cost["exact_pairs"] / cost["total_pairs"] if cost else None,
                multiply_adds=_multiply_adds(cost) / _multiply_adds(base_cost) if cost and base_cost else None,
                step_time=measured.relative_time if measured else None,
                step_time_spread=measured.spread if measured else None,
                memory=measured.memory if measured else None,
                steps=float(np.mean([run["steps"] for run in runs.values()])) if runs else None,
                step_seconds=_step_seconds(runs, measured),
                learning_rate=next((_learning_rate(run) for run in runs.values()), None),
                parameters=next((run["parameters"] for run in runs.values()), None),
                steps_to=(
                    None if reach is None else steps_to(reach, runs, None if name == reference else base, metric)
                ),
                is_reference=name == reference,
                finished=tuple(runs),
                missing={seed: _reason(run) for seed, run in by_seed.items() if seed not in runs},
            )
        )
    return rows


def other_rows(records: Records, reference: str, names: Sequence[str]) -> list[MetricRows]:
    """Rows of other metrics of the same runs; a metric per class gives rows for each class.

    Args:
        records, reference: as in `comparison_rows`.
        names: of the metrics; those that no record has are left out.
    """
    runs = [run for by_seed in records.values() for run in finished_runs(by_seed).values()]
    known = dict.fromkeys(
        key.removeprefix("test/") for run in runs for key in run["metrics"] if key.startswith("test/")
    )
    chosen = [metric_of(key) for name in names for key in known if key.split("/")[0] == name]
    return [MetricRows(each, comparison_rows(_having(records, each), reference, each, {})) for each in chosen]


def finished_runs(by_seed: Mapping[int, Record | None]) -> dict[int, Record]:
    """Seed -> record of those runs that ended well."""
    return {seed: run for seed, run in by_seed.items() if run and run["status"] == "finished"}


def disagreements(by_seed: Mapping[int, Record | None], base: Mapping[int, Record | None]) -> dict[int, Disagreement]:
    """Seed -> how a mechanism and the reference differ by test items, where both kept predictions of the same items.

    Args:
        by_seed, base: seed -> record with its `run_dir`, or with the `disagreement` that a file of records tells.
    """
    found = {}
    for seed, run in by_seed.items():
        mine, theirs = _correct(run), _correct(base.get(seed))
        if run and "disagreement" in run:
            found[seed] = Disagreement(*run["disagreement"])
        elif mine is not None and theirs is not None and mine.shape == theirs.shape and mine.size:
            found[seed] = disagreement(mine, theirs)
    return found


def _having(records: Records, metric: Metric) -> Records:
    """The records with a test figure; those without count as not run."""
    return {
        label: {seed: run if run and metric.key in run.get("metrics", {}) else None for seed, run in by_seed.items()}
        for label, by_seed in records.items()
    }


def _figures(runs: Mapping[int, Record], metric: Metric) -> dict[int, float]:
    return {seed: run["metrics"][metric.key] for seed, run in runs.items()}


def _difference(runs: Mapping[int, Record], base: Mapping[int, Record], metric: Metric) -> PairedDifference | None:
    figures, base_figures = _figures(runs, metric), _figures(base, metric)
    shared = [seed for seed in figures if seed in base_figures]
    if not shared:
        return None
    found = disagreements(runs, base).values() if metric.is_share_of_items else ()
    spread = float(np.sqrt(np.mean([item_spread(each) ** 2 for each in found]))) if found else 0.0
    return paired_difference([figures[seed] for seed in shared], [base_figures[seed] for seed in shared], spread)


def _correct(run: Record | None) -> NDArray[np.bool_] | None:
    path = Path(run["run_dir"]) / PREDICTIONS_FILE if run and "run_dir" in run else None
    if path is None or not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as arrays:
        return arrays["prediction"] == arrays["label"]


def _cost(runs: Mapping[int, Record]) -> dict[str, float] | None:
    """Mean over seeds, since some mechanisms learn what they compute."""
    costs = [run["cost"] for run in runs.values()]
    return {part: float(np.mean([cost[part] for cost in costs])) for part in costs[0]} if costs else None


def _multiply_adds(cost: Mapping[str, float]) -> float:
    return cost["score_multiply_adds"] + cost["value_multiply_adds"]


def _step_seconds(runs: Mapping[int, Record], measured: StepMeasurement | None) -> float | None:
    """Seconds of a step of the optimizer, which may take several measured ones."""
    if measured is None or not runs:
        return None
    trainer = next(iter(runs.values()))["config"].get("trainer", {})
    return measured.seconds * int(trainer.get("accumulate_grad_batches", 1))


def _learning_rate(run: Record) -> float | None:
    return (run.get("config") or {}).get("optimizer", {}).get("lr")


def _reason(run: Record | None) -> str:
    return "not run" if run is None else str(run.get("error", "failed"))
