"""What a comparison leaves behind: table.csv, table.md, figures and report.html, from the same rows."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from approx_attn.comparison.aggregate import Records, disagreements, finished_runs
from approx_attn.comparison.plots import budget_figure, comparison_figure, learning_curves, save_figure
from approx_attn.comparison.report import Report
from approx_attn.comparison.settings_plot import settings_figure
from approx_attn.comparison.statistics import PairedDifference, detectable_gap, mcnemar
from approx_attn.comparison.table import (
    OTHERS_CAPTION,
    WORDS,
    ComparisonRow,
    MetricRows,
    cells,
    comparison_csv,
    other_cells,
    others_csv,
    show_p,
)
from approx_attn.comparison.terms import EQUAL_STEPS, Terms, Tuning
from approx_attn.comparison.validation_curves import validation_curve
from approx_attn.metrics import Metric, metric_of
from approx_attn.output import MISSING, shown, to_markdown
from approx_attn.run import record

TIME_PLOT = "time.png"


def write_comparison(
    folder: Path,
    rows: Sequence[ComparisonRow],
    records: Records,
    metric: Metric,
    name: str,
    command: str,
    reference: str,
    others: Sequence[MetricRows] = (),
    terms: Terms = EQUAL_STEPS,
) -> str:
    """Write all files and return the caption of the table.

    Args:
        folder: where to write.
        rows: the table.
        records: of all runs.
        metric: the test figure of the table.
        name: of the comparison.
        command: what to type to get it again.
        reference: the mechanism that differences are relative to.
        others: the same runs by other metrics.
        terms: what was equal, and how learning rates were chosen.
    """
    table, caption = table_and_caption(rows, records, metric, reference, terms)
    lines, other_lines = [cells(row, metric, terms) for row in rows], other_cells(others)
    more = f"\n{to_markdown(other_lines, ('attention', 'verdict'))}\n{OTHERS_CAPTION}\n" if others else ""
    markdown = f"{table}\n{caption}\n\n`{command}`\n{more}"
    record.write_text_atomically(folder / "table.csv", comparison_csv(rows, metric))
    record.write_text_atomically(folder / "table.md", markdown)
    if others:
        record.write_text_atomically(folder / "other_metrics.csv", others_csv(others))

    report = Report(f"Comparison: {name}", " · ".join([command, *_machine(records)]))
    section = report.section("Table")
    section.table(lines, caption)
    for row in rows:
        for seed, reason in row.missing.items():
            section.text(f"Missing: {row.name}, seed {seed}: {reason}")
    figure_name = (metric.label or metric.name).capitalize()
    figure = comparison_figure(rows, metric, name)
    save_figure(figure, folder / "plot.png")
    report.section(f"{figure_name} against cost").figure(
        figure, "Each point is a mechanism. The dashed line joins those that no other beats in both directions."
    )
    budgets = budget_figure(rows, metric, name)
    if budgets is not None:
        save_figure(budgets, folder / "budgets.png")
        report.section(f"{figure_name} by budget").figure(
            budgets,
            f"One curve per mechanism that was run at several budgets. {reference} is the line across, "
            "in a band of one standard deviation.",
        )
    settings = settings_figure(rows, metric, name)
    if settings is not None:
        save_figure(settings, folder / "settings.png")
        report.section(f"{figure_name} by setting").figure(
            settings, "One line per setting of a mechanism's other options, against the share of exact pairs."
        )
    if terms.tuning is not None:
        _add_tuning(report, terms.tuning)
    if others:
        report.section("Other metrics").table(other_lines, OTHERS_CAPTION)
    _add_statistics(report, MetricRows(metric, [row for row in rows if row.difference]), records, reference)
    curves = {label: [validation_curve(run, metric) for run in by_seed.values()] for label, by_seed in records.items()}
    learning = learning_curves(curves, metric)
    caption_of_curves = "Mean over seeds; the band spans the lowest and highest seed."
    if learning is not None:
        report.section("Learning curves").figure(learning, caption_of_curves)
    seconds = {row.name: row.step_seconds for row in rows if row.step_seconds is not None}
    by_time = learning_curves(curves, metric, seconds)
    if by_time is not None:
        save_figure(by_time, folder / TIME_PLOT)
        report.section(f"{figure_name} against time").figure(
            by_time,
            f"Time is that of the steps made, as it was measured; validation is not counted. {caption_of_curves}",
        )
    _add_runs(report, records)
    report.save(folder / "report.html")
    return caption


def table_and_caption(
    rows: Sequence[ComparisonRow], records: Records, metric: Metric, reference: str, terms: Terms = EQUAL_STEPS
) -> tuple[str, str]:
    """The table in Markdown, and what is said below it; arguments as `write_comparison`."""
    told = [*terms.sentences(reference), table_caption(rows, reference, metric), *_reached(terms, metric)]
    caption = " ".join([*told, *_mixed_commits(records)])
    return to_markdown([cells(row, metric, terms) for row in rows], WORDS), caption


def table_caption(rows: Sequence[ComparisonRow], reference: str, metric: Metric) -> str:
    """How the figures were made, and how far to trust the verdicts."""
    compared = [(row, row.difference) for row in rows if row.difference is not None]
    parts = [
        f"Differences from {reference} are paired by seed, with Student's t interval.",
        "Multiply-adds are of attention alone.",
        "Training step time and memory are of the whole model, measured in turns in one process"
        " (median ratio ± half the interquartile range)."
        if any(row.step_time is not None for row in rows)
        else "Step time and memory were not measured.",
    ]
    if len(compared) > 1 and any(difference.count > 1 for _, difference in compared):
        adjusted = MetricRows(metric, [row for row, _ in compared]).adjusted
        different = [row.name for (row, _), p in zip(compared, adjusted, strict=True) if p < 0.05]
        parts.append(
            f"{len(compared)} mechanisms are compared at once: after Holm's correction different at 5%: "
            f"{', '.join(different) or 'none'}."
        )
    gaps = [gap for _, difference in compared if math.isfinite(gap := _found_gap(difference))]
    if gaps:
        span = " to ".join(dict.fromkeys(metric.show(gap) for gap in (min(gaps), max(gaps))))
        parts.append(
            f"Smallest true difference that these seeds find with 80% power: {span} ({metric.header}), "
            "depending on the mechanism."
        )
    return " ".join(parts)


def _reached(terms: Terms, metric: Metric) -> list[str]:
    """What the column of steps counts."""
    if terms.reach is None:
        return []
    figure = f"a validation {metric.name} of {metric.show(terms.reach)}{'%' if metric.percent else ''}"
    return [
        f"Steps are those before the first validation with {figure}; where not all runs came to it, their number "
        "stands beside the mean, which is of those that did."
    ]


def _mixed_commits(records: Records) -> list[str]:
    """A sentence if the runs were not all made by one commit of the code."""
    runs = (run for by_seed in records.values() for run in finished_runs(by_seed).values())
    counts = Counter(run["environment"].get("commit") or "unknown" for run in runs)
    if len(counts) < 2:
        return []
    return [f"The runs were made by different commits: {', '.join(f'{c} ({n} runs)' for c, n in counts.items())}."]


def _machine(records: Records) -> list[str]:
    """Where the first run was made, and by which commit."""
    runs = (run for by_seed in records.values() for run in by_seed.values() if run and "environment" in run)
    environment: Mapping[str, Any] | None = next((run["environment"] for run in runs), None)
    if environment is None:
        return []
    where = environment.get("accelerator") or f"{environment['processor']}, {environment['torch_threads']} threads"
    commit = [f"commit {environment['commit']}"] if environment.get("commit") else []
    return [f"{where}, torch {environment['packages'].get('torch')}", *commit]


def _found_gap(difference: PairedDifference) -> float:
    """Smallest true difference that as many seeds find four times out of five; infinite where that is not known."""
    return detectable_gap(difference.spread, difference.count) if difference.has_interval else math.inf


def _add_statistics(report: Report, compared: MetricRows, records: Records, reference: str) -> None:
    """The tests behind the verdicts of rows that have a difference."""
    metric, lines = compared.metric, []
    for row, p_holm in zip(compared.rows, compared.adjusted, strict=True):
        difference = row.difference
        assert difference is not None
        gap = _found_gap(difference)
        of_items = " (of items)" if difference.spread_of_items else ""
        found = disagreements(records[row.name], records[reference])
        lines.append(
            {
                "attention": row.name,
                "difference": metric.show_difference(difference.mean),
                "its spread": f"{metric.show(difference.spread)}{of_items}" if difference.has_interval else MISSING,
                "p (paired t)": show_p(difference.p_value),
                "p (Holm)": show_p(p_holm),
                "gap found with 80% power": metric.show(gap) if math.isfinite(gap) else MISSING,
                "McNemar p by seed": ", ".join(f"{seed}: {show_p(mcnemar(each))}" for seed, each in found.items()),
            }
        )
    if not lines:
        return
    report.section("How sure are the differences?").table(
        lines,
        "The t-test asks whether training with other seeds would show the same difference; the spread is the standard "
        "deviation of the difference over seeds, or that of the test items where all seeds show the same difference. "
        "McNemar's exact test asks, for one seed, whether the two trained models err equally often on the same test "
        "items. The gap is the smallest true difference that this many seeds find four times out of five.",
    )


def _add_tuning(report: Report, tuning: Tuning) -> None:
    """All figures that learning rates were chosen by."""
    metric, lines = metric_of(tuning.monitor), []
    for label, figures in tuning.figures.items():
        tried = zip(tuning.grid, figures, strict=True)
        shown_figures = {f"{rate:g}": MISSING if each is None else metric.show(each) for rate, each in tried}
        lines.append({"attention": label, **shown_figures, "chosen": shown(tuning.best(label), "g")})
    figure = f"{tuning.monitor}{' in %' if metric.percent else ''}"
    report.section("Learning rates").table(lines, f"Best {figure} of seed {tuning.seed}, by learning rate.")


def _add_runs(report: Report, records: Records) -> None:
    section = report.section("Runs")
    for name, by_seed in records.items():
        for seed, run in by_seed.items():
            if run is not None and "config" in run:
                content = f"{run['command']}\n\n{json.dumps(run['config'], indent=2)}"
                place = f", {run['run_dir']}" if "run_dir" in run else ""
                section.details(f"{name}, seed {seed}: {run['status']}{place}", content)
