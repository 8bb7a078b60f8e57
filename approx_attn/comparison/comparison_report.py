"""What a comparison leaves behind: table.csv, table.md, figures, report.html and summary.json, from the same rows."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from approx_attn.comparison.aggregate import correct_pairs
from approx_attn.comparison.plots import COLOURS, budget_figure, comparison_figure, plain_text, save_figure
from approx_attn.comparison.report import Report
from approx_attn.comparison.statistics import PairedDifference, detectable_gap, holm_adjust, mcnemar
from approx_attn.comparison.summary import SUMMARY_FILE, summarise_comparison
from approx_attn.comparison.table import (
    MISSING,
    OTHERS_CAPTION,
    ComparisonRow,
    comparison_columns,
    other_cells,
    others_to_csv,
    others_to_markdown,
    to_csv,
    to_markdown,
)
from approx_attn.metrics import Metric
from approx_attn.run import record

Records = Mapping[str, Mapping[int, dict[str, Any] | None]]


def write_comparison(
    folder: Path,
    rows: Sequence[ComparisonRow],
    records: Records,
    metric: Metric,
    name: str,
    command: str,
    reference: str,
    others: Sequence[tuple[Metric, Sequence[ComparisonRow]]] = (),
) -> str:
    """Write all files and return the caption of the table.

    Args:
        folder: where to write.
        rows: the table.
        records: mechanism -> seed -> record of the run with its `run_dir` and `command`, or None.
        others: the same runs by other metrics.
    """
    caption = " ".join([table_caption(rows, reference, metric), *_mixed_commits(records)])
    figure = comparison_figure(rows, metric, name)
    record.write_text_atomically(folder / "table.csv", to_csv(rows, metric))
    more = f"\n{others_to_markdown(others)}\n{OTHERS_CAPTION}\n" if others else ""
    record.write_text_atomically(folder / "table.md", f"{to_markdown(rows, metric)}\n{caption}\n\n`{command}`\n{more}")
    if others:
        record.write_text_atomically(folder / "other_metrics.csv", others_to_csv(others))
    save_figure(figure, folder / "plot.png")
    budgets = budget_figure(rows, metric, name)
    if budgets is not None:
        save_figure(budgets, folder / "budgets.png")
    report = Report(f"Comparison: {name}", command)
    runs = [run for by_seed in records.values() for run in by_seed.values() if run and "environment" in run]
    if runs:
        report.subtitle += f" · {_machine(runs[0]['environment'])}"
    section = report.section("Table")
    columns = comparison_columns(metric)
    section.table([c.header for c in columns], [[c.show(row) for c in columns] for row in rows], caption)
    for row in rows:
        for seed, reason in row.missing.items():
            section.text(f"Missing: {row.name}, seed {seed}: {reason}")
    report.section("Accuracy against cost" if metric.percent else "Figure against cost").figure(
        figure, "Each point is a mechanism. The dashed line joins those that no other beats in both directions."
    )
    if budgets is not None:
        report.section(f"{(metric.label or metric.name).capitalize()} by budget").figure(
            budgets,
            f"One curve per mechanism that was run at several budgets. {reference} is the line across, "
            "in a band of one standard deviation.",
        )
    if others:
        header, *lines = other_cells(others)
        report.section("Other metrics").table(header, lines, OTHERS_CAPTION)
    _add_statistics(report, rows, records, metric, reference)
    _add_learning_curves(report, records, metric)
    _add_runs(report, records)
    report.save(folder / "report.html")
    summary = summarise_comparison(records, metric=metric.name, name=name, command=command, reference=reference)
    record.write_json_atomically(folder / SUMMARY_FILE, summary)
    return caption


def table_caption(rows: Sequence[ComparisonRow], reference: str, metric: Metric) -> str:
    """How the figures were made, and how far to trust the verdicts."""
    compared = [row for row in rows if row.difference is not None]
    parts = [
        f"Differences from {reference} are paired by seed, with Student's t interval.",
        "Multiply-adds are of attention alone.",
        "Training step time and memory are of the whole model, measured in turns in one process"
        " (median ratio ± half the interquartile range)."
        if any(row.step_time is not None for row in rows)
        else "Step time and memory were not measured.",
    ]
    if len(compared) > 1 and any(row.difference.count > 1 for row in compared if row.difference):
        adjusted = holm_adjust([row.difference.p_value for row in compared if row.difference])
        kept = [row.name for row, p in zip(compared, adjusted, strict=True) if p < 0.05]
        parts.append(
            f"{len(compared)} mechanisms are compared at once: after Holm's correction different at 5%: "
            f"{', '.join(kept) or 'none'}."
        )
    gaps = [_found_gap(row.difference) for row in compared if row.difference]
    gaps = [gap for gap in gaps if math.isfinite(gap)]
    if gaps:
        span = " to ".join(dict.fromkeys(metric.show(gap) for gap in (min(gaps), max(gaps))))
        parts.append(
            f"Smallest true difference that these seeds find with 80% power: {span} ({metric.header}), "
            "depending on the mechanism."
        )
    return " ".join(parts)


def _mixed_commits(records: Records) -> list[str]:
    """A sentence if the runs were not all made by one commit of the code."""
    finished = [run for by_seed in records.values() for run in by_seed.values() if run and run["status"] == "finished"]
    counts = Counter(run["environment"].get("commit") or "unknown" for run in finished)
    if len(counts) < 2:
        return []
    return [f"The runs were made by different commits: {', '.join(f'{c} ({n} runs)' for c, n in counts.items())}."]


def _found_gap(difference: PairedDifference) -> float:
    """Smallest true difference that as many seeds find four times out of five; infinite where that is not known."""
    return detectable_gap(difference.spread, difference.count) if difference.has_interval else math.inf


def _add_statistics(
    report: Report, rows: Sequence[ComparisonRow], records: Records, metric: Metric, reference: str
) -> None:
    compared = [row for row in rows if row.difference is not None]
    if not compared:
        return
    section = report.section("How sure are the differences?")
    adjusted = holm_adjust([row.difference.p_value for row in compared if row.difference])
    lines = []
    for row, p_holm in zip(compared, adjusted, strict=True):
        difference = row.difference
        assert difference is not None
        gap = _found_gap(difference)
        of_items = " (of items)" if difference.spread_of_items else ""
        lines.append(
            [
                row.name,
                metric.show_difference(difference.mean),
                f"{metric.show(difference.spread)}{of_items}" if difference.has_interval else MISSING,
                _number(difference.p_value),
                _number(p_holm),
                metric.show(gap) if math.isfinite(gap) else MISSING,
                ", ".join(
                    f"{seed}: {_number(p)}" for seed, p in _item_tests(records[row.name], records[reference]).items()
                ),
            ]
        )
    section.table(
        [
            "attention",
            "difference",
            "its spread",
            "p (paired t)",
            "p (Holm)",
            "gap found with 80% power",
            "McNemar p by seed",
        ],
        lines,
        "The t-test asks whether training with other seeds would show the same difference; the spread is the standard "
        "deviation of the difference over seeds, or that of the test items where all seeds show the same difference. "
        "McNemar's exact test asks, for one seed, whether the two trained models err equally often on the same test "
        "items. The gap is the smallest true difference that this many seeds find four times out of five.",
    )


def _item_tests(by_seed: Mapping[int, Any], base: Mapping[int, Any]) -> dict[int, float]:
    """Seed -> McNemar's p-value."""
    return {seed: mcnemar(*pair) for seed, pair in correct_pairs(by_seed, base).items()}


def _add_learning_curves(report: Report, records: Records, metric: Metric) -> None:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for index, (name, by_seed) in enumerate(records.items()):
        curves = [curve for curve in (_curve(result, metric) for result in by_seed.values()) if curve]
        steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
        if not steps:
            continue
        values = metric.factor * np.array([[curve[step] for step in steps] for curve in curves])
        style = ("-", "--", "-.", ":")[(index + index // len(COLOURS)) % 4]  # no two alike among 32
        colour = COLOURS[index % len(COLOURS)]
        marker = "o" if len(steps) == 1 else None  # a line of one point is none
        axis.plot(steps, values.mean(axis=0), style, marker=marker, color=colour, label=plain_text(name))
        axis.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.12, linewidth=0)
    if not axis.lines:
        return
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("training step")
    axis.set_ylabel(f"validation {metric.header}")
    axis.grid(True, color="0.9")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    report.section("Learning curves").figure(figure, "Mean over seeds; the band spans the lowest and highest seed.")


def _curve(result: dict[str, Any] | None, metric: Metric) -> dict[int, float]:
    """Training step -> validation figure of one run, from its metrics.csv."""
    path = Path(result["run_dir"]) / "metrics.csv" if result and "run_dir" in result else None
    if path is None or not path.is_file():
        return {}
    with path.open(newline="") as file:
        return {
            int(row["step"]): float(row[key])
            for row in csv.DictReader(file)
            if (key := f"val/{metric.name}") in row and row[key]
        }


def _add_runs(report: Report, records: Records) -> None:
    section = report.section("Runs")
    for name, by_seed in records.items():
        for seed, result in by_seed.items():
            if result is None or "config" not in result:
                continue
            content = f"{result['command']}\n\n{json.dumps(result['config'], indent=2)}"
            section.details(f"{name}, seed {seed}: {result['status']}, {result['run_dir']}", content)


def _machine(environment: Mapping[str, Any]) -> str:
    where = environment.get("accelerator") or f"{environment['processor']}, {environment['torch_threads']} threads"
    commit = f" · commit {environment['commit']}" if environment.get("commit") else ""
    return f"{where}, torch {environment['packages'].get('torch')}{commit}"


def _number(value: float) -> str:
    if np.isnan(value):
        return MISSING
    return "<0.001" if value < 0.001 else f"{value:.3f}"
