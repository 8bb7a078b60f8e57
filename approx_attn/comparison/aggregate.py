"""From the records of runs to the rows of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from approx_attn.comparison.statistics import PairedDifference, item_spread, paired_difference, summarise
from approx_attn.comparison.table import ComparisonRow
from approx_attn.metrics import Metric, metric_of
from approx_attn.run.stored_metrics import PREDICTIONS_FILE


@dataclass(frozen=True)
class StepMeasurement:
    """One training step of a mechanism, measured in turns with all others of the comparison.

    Attributes:
        relative_time: median over rounds of its time by the reference's in the same round.
        spread: half the interquartile range of that ratio.
        seconds: median time.
        memory: peak bytes held during the step.
    """

    relative_time: float
    spread: float
    seconds: float
    memory: int


def comparison_rows(
    records: Mapping[str, Mapping[int, dict[str, Any] | None]],
    reference: str,
    metric: str,
    measurements: Mapping[str, StepMeasurement],
) -> list[ComparisonRow]:
    """One row per mechanism, in the order given.

    Args:
        records: mechanism -> seed -> record of the run, None where there is none.
        reference: the mechanism that differences and ratios are relative to.
        metric: name of the test figure, without "test/".
        measurements: mechanism -> its measured training step, as far as known.
    """
    base = _finished(records[reference])
    base_figures = {seed: record["metrics"][f"test/{metric}"] for seed, record in base.items()}
    base_cost = _cost(base)
    rows = []
    for name, by_seed in records.items():
        finished = _finished(by_seed)
        figures = {seed: record["metrics"][f"test/{metric}"] for seed, record in finished.items()}
        cost = _cost(finished)
        measured = measurements.get(name)
        rows.append(
            ComparisonRow(
                name=name,
                figure=summarise(list(figures.values())) if figures else None,
                difference=None if name == reference else _difference(figures, base_figures, metric, finished, base),
                exact_share=cost["exact_pairs"] / cost["total_pairs"] if cost else None,
                multiply_adds=_multiply_adds(cost) / _multiply_adds(base_cost) if cost and base_cost else None,
                step_time=measured.relative_time if measured else None,
                step_time_spread=measured.spread if measured else None,
                memory=measured.memory if measured else None,
                parameters=next((record["parameters"] for record in finished.values()), None),
                is_reference=name == reference,
                finished=tuple(finished),
                missing={seed: _reason(record) for seed, record in by_seed.items() if seed not in finished},
            )
        )
    return rows


OtherRows = list[tuple[Metric, list[ComparisonRow]]]
"""Metrics besides that of the table, each with a row per mechanism."""


def other_rows(
    records: Mapping[str, Mapping[int, dict[str, Any] | None]], reference: str, names: Sequence[str]
) -> OtherRows:
    """Rows of other metrics of the same runs; a metric per class gives one for each class.

    Args:
        records, reference: as in `comparison_rows`.
        names: of the metrics; those that no record has are left out.
    """
    runs = [run for by_seed in records.values() for run in _finished(by_seed).values()]
    known = dict.fromkeys(
        key.removeprefix("test/") for run in runs for key in run["metrics"] if key.startswith("test/")
    )
    chosen = [key for name in names for key in known if key.split("/")[0] == name]
    return [(metric_of(key), comparison_rows(_with_figure(records, key), reference, key, {})) for key in chosen]


def _with_figure(
    records: Mapping[str, Mapping[int, dict[str, Any] | None]], metric: str
) -> dict[str, dict[int, dict[str, Any] | None]]:
    """The records that have a test figure; those without it count as not run."""
    return {
        label: {
            seed: run if run and f"test/{metric}" in run.get("metrics", {}) else None for seed, run in by_seed.items()
        }
        for label, by_seed in records.items()
    }


def _finished(by_seed: Mapping[int, dict[str, Any] | None]) -> dict[int, dict[str, Any]]:
    return {seed: record for seed, record in by_seed.items() if record and record["status"] == "finished"}


def _difference(
    figures: Mapping[int, float],
    base_figures: Mapping[int, float],
    metric: str,
    finished: Mapping[int, dict[str, Any]],
    base: Mapping[int, dict[str, Any]],
) -> PairedDifference | None:
    shared: Sequence[int] = [seed for seed in figures if seed in base_figures]
    if not shared:
        return None
    pairs = correct_pairs(finished, base).values() if metric == "accuracy" else ()
    spread = float(np.sqrt(np.mean([item_spread(*pair) ** 2 for pair in pairs]))) if pairs else 0.0
    return paired_difference([figures[seed] for seed in shared], [base_figures[seed] for seed in shared], spread)


def correct_pairs(
    by_seed: Mapping[int, dict[str, Any] | None], base: Mapping[int, dict[str, Any] | None]
) -> dict[int, tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """Seed -> which test items a mechanism and the reference got right, where both kept predictions of the same items.

    Args:
        by_seed, base: seed -> record with its `run_dir`.
    """
    pairs = {}
    for seed, result in by_seed.items():
        mine, theirs = _correct(result), _correct(base.get(seed))
        if mine is not None and theirs is not None and mine.shape == theirs.shape and mine.size:
            pairs[seed] = (mine, theirs)
    return pairs


def _correct(result: dict[str, Any] | None) -> NDArray[np.bool_] | None:
    path = Path(result["run_dir"]) / PREDICTIONS_FILE if result and "run_dir" in result else None
    if path is None or not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as arrays:
        return arrays["prediction"] == arrays["label"]


def _cost(finished: Mapping[int, dict[str, Any]]) -> dict[str, float] | None:
    """Mean over seeds, since some mechanisms learn what they compute."""
    costs = [record["cost"] for record in finished.values()]
    return {part: float(np.mean([cost[part] for cost in costs])) for part in costs[0]} if costs else None


def _multiply_adds(cost: Mapping[str, float]) -> float:
    return cost["score_multiply_adds"] + cost["value_multiply_adds"]


def _reason(record: dict[str, Any] | None) -> str:
    return "not run" if record is None else str(record.get("error", "failed"))
