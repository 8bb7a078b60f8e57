"""The comparison as one table: the terminal, Markdown, CSV and the report show the same rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from approx_attn.comparison.statistics import PairedDifference, Summary, holm_adjust
from approx_attn.comparison.terms import EQUAL_STEPS, Terms
from approx_attn.comparison.validation_curves import StepsTo
from approx_attn.metrics import Metric
from approx_attn.output import MISSING, Rows, shown, to_csv, to_table

WORDS = ("attention", "verdict")  # columns of words; the others hold figures
RESULTS = ("attention", "difference (95%)", "verdict", "seeds")  # what a narrow terminal shows above the costs
FULL_WIDTH = 204  # characters of a terminal that holds all columns side by side
OTHERS_CAPTION = (
    "Differences are paired by seed, with Student's t interval; p by the paired t-test, after Holm's correction for "
    "the mechanisms compared by one metric."
)


@dataclass(frozen=True)
class ComparisonRow:
    """What one mechanism reached and cost. Everything unknown is None, never zero.

    Attributes:
        name: mechanism with the options that were set, as in the command.
        figure: test figure over the finished seeds.
        difference: paired with the reference by seed; None for the reference itself.
        exact_share: share of the pairs whose exact score enters the result, 0 to 1.
        multiply_adds: of attention, relative to the reference.
        step_time: of a training step, relative to the reference, measured alternately with it.
        step_time_spread: half the interquartile range of the same ratio.
        memory: peak bytes of a training step.
        parameters: trainable parameters of the model.
        steps: of training that runs made, mean over the finished seeds.
        step_seconds: measured time of one.
        learning_rate: at its peak.
        steps_to: until a validation figure was reached; None where none was asked for.
        is_reference: the row that the others are relative to.
        finished: seeds that ended well.
        missing: seeds that did not, with the reason.
    """

    name: str
    figure: Summary | None = None
    difference: PairedDifference | None = None
    exact_share: float | None = None
    multiply_adds: float | None = None
    step_time: float | None = None
    step_time_spread: float | None = None
    memory: int | None = None
    parameters: int | None = None
    steps: float | None = None
    step_seconds: float | None = None
    learning_rate: float | None = None
    steps_to: StepsTo | None = None
    is_reference: bool = False
    finished: tuple[int, ...] = ()
    missing: dict[int, str] = field(default_factory=dict)

    @property
    def mechanism(self) -> str:
        """The name without options."""
        return self.name.partition(" ")[0]

    @property
    def settings(self) -> dict[str, str]:
        """The options in the name, with their values as they were written."""
        words = (word.partition("=") for word in self.name.split(" ")[1:])
        return {option: value for option, _, value in words}

    @property
    def training_seconds(self) -> float | None:
        """Time of all steps; validation is not among them."""
        return None if self.steps is None or self.step_seconds is None else self.steps * self.step_seconds

    def verdict(self, metric: Metric) -> str:
        """The difference in words."""
        if self.figure is None:
            return "no finished run"
        if self.difference is None:
            return "reference" if self.is_reference else "nothing to compare with"
        if self.difference.count < 2:
            return "one seed: no verdict"
        if not self.difference.has_interval:
            return "equal for every seed" if self.difference.p_value == 1.0 else "no spread: no verdict"
        if not self.difference.distinguishable:
            return "not distinguishable"
        return "better" if (self.difference.mean > 0) == metric.higher_is_better else "worse"


@dataclass(frozen=True)
class MetricRows:
    """The rows of one metric."""

    metric: Metric
    rows: Sequence[ComparisonRow]

    @property
    def adjusted(self) -> list[float]:
        """By row, the p-value after Holm's correction; NaN where there is none."""
        return holm_adjust([row.difference.p_value if row.difference else math.nan for row in self.rows])


# -- rows as cells -------------------------------------------------------------------------------------


def cells(row: ComparisonRow, metric: Metric, terms: Terms = EQUAL_STEPS) -> dict[str, str]:
    """A row for people, by header; with steps and seconds if steps are not equal, and what else the terms ask for."""
    wanted = len(row.finished) + len(row.missing)
    spread = f" ± {row.step_time_spread:.2f}" if row.step_time_spread else ""
    seconds = row.training_seconds
    learned = {"learning rate": shown(row.learning_rate, "g")} if terms.tuning else {}
    length = {"steps": shown(row.steps, ",.0f"), "seconds": shown(seconds, ".2g" if (seconds or 0) < 10 else ",.0f")}
    return {
        "attention": row.name,
        f"test {metric.header}": show_summary(row.figure, metric),
        "difference (95%)": show_difference(row.difference, metric),
        "verdict": row.verdict(metric),
        **learned,
        **(length if terms.equal == "time" else {}),
        **({} if terms.reach is None or row.steps_to is None else _steps_to_cells(row.steps_to, metric, terms.reach)),
        "exact pairs": shown(row.exact_share, ".0%"),
        "multiply-adds": shown(row.multiply_adds, ".2f", "×"),
        "step time": shown(row.step_time, ".2f", f"×{spread}"),
        "peak memory": shown(row.memory and row.memory / 2**20, ".0f", " MiB"),
        "parameters": shown(row.parameters, ","),
        "seeds": str(wanted) if not row.missing else f"{len(row.finished)} of {wanted}",
    }


def show_summary(figure: Summary | None, metric: Metric) -> str:
    """Mean and standard deviation."""
    if figure is None:
        return MISSING
    spread = "" if math.isnan(figure.std) else f" ± {metric.show(figure.std)}"
    return f"{metric.show(figure.mean)}{spread}"


def show_difference(difference: PairedDifference | None, metric: Metric) -> str:
    """A difference with its interval, if it has one."""
    if difference is None:
        return MISSING
    mean = metric.show_difference(difference.mean)
    if not difference.has_interval:
        return mean
    return f"{mean} [{metric.show_difference(difference.low)}, {metric.show_difference(difference.high)}]"


def _steps_to_cells(found: StepsTo, metric: Metric, reach: float) -> dict[str, str]:
    """The steps to a figure and their difference from the reference."""
    count = "" if len(found.seeds) == found.runs else f" ({len(found.seeds)} of {found.runs})"
    steps, difference = found.steps, found.difference
    spread = "" if steps is None or math.isnan(steps.std) else f" ± {steps.std:,.0f}"
    interval = f" [{difference.low:+,.0f}, {difference.high:+,.0f}]" if difference and difference.has_interval else ""
    return {
        f"steps to {metric.show(reach)}{'%' if metric.percent else ''}": shown(
            steps.mean if steps else None, ",.0f", spread
        )
        + count,
        "steps difference (95%)": shown(difference.mean if difference else None, "+,.0f", interval),
    }


def show_p(value: float) -> str:
    """A p-value."""
    return "<0.001" if value < 0.001 else shown(value, ".3f")


def other_cells(others: Sequence[MetricRows]) -> list[dict[str, str]]:
    """Rows of other metrics for people, one per metric and mechanism."""
    return [
        {
            "metric": each.metric.header,
            "attention": row.name,
            "test": show_summary(row.figure, each.metric),
            "difference (95%)": show_difference(row.difference, each.metric),
            "p (Holm)": show_p(p),
            "verdict": row.verdict(each.metric),
        }
        for each in others
        for row, p in zip(each.rows, each.adjusted, strict=True)
    ]


def _values(row: ComparisonRow, metric: Metric) -> dict[str, Any]:
    """A row for machines, in full precision; None where something is unknown."""
    figure, difference = row.figure, row.difference
    values: dict[str, Any] = {
        "attention": row.name,
        "mean": figure and figure.mean,
        "difference": difference and difference.mean,
        "verdict": row.verdict(metric),
        "exact_pairs": row.exact_share,
        "multiply_adds": row.multiply_adds,
        "step_time": row.step_time,
        "memory_bytes": row.memory,
        "parameters": row.parameters,
        "seeds": " ".join(map(str, row.finished)),
        "std": figure and figure.std,
        "difference_low": difference and difference.low,
        "difference_high": difference and difference.high,
        "p_value": difference and difference.p_value,
        "step_time_spread": row.step_time_spread,
        "steps": row.steps,
        "step_seconds": row.step_seconds,
        "training_seconds": row.training_seconds,
        "learning_rate": row.learning_rate,
        **_steps_to_values(row.steps_to),
        "missing_seeds": " ".join(map(str, row.missing)),
    }
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in values.items()}


def _steps_to_values(found: StepsTo | None) -> dict[str, Any]:
    steps, difference = (found.steps, found.difference) if found else (None, None)
    return {
        "steps_to": steps and steps.mean,
        "steps_to_std": steps and steps.std,
        "steps_to_seeds": " ".join(map(str, found.seeds)) if found else None,
        "steps_to_difference": difference and difference.mean,
        "steps_to_difference_low": difference and difference.low,
        "steps_to_difference_high": difference and difference.high,
    }


def comparison_csv(rows: Sequence[ComparisonRow], metric: Metric) -> str:
    """The table for machines."""
    renamed = {"mean": f"{metric.name}_mean"}
    return to_csv([{renamed.get(key, key): value for key, value in _values(row, metric).items()} for row in rows])


def others_csv(others: Sequence[MetricRows]) -> str:
    """The table of other metrics for machines."""
    keys = ("attention", "mean", "std", "difference", "difference_low", "difference_high", "p_value", "seeds")
    found: Rows = [
        {"metric": each.metric.name, **{key: _values(row, each.metric)[key] for key in keys}}
        for each in others
        for row in each.rows
    ]
    return to_csv(found)


# -- the terminal --------------------------------------------------------------------------------------


def wide_console() -> Console:
    """The console of this process; wide enough for every column where it is a file, which has no edge."""
    console = Console()
    return console if console.is_terminal else Console(width=FULL_WIDTH)


def for_terminal(
    rows: Sequence[ComparisonRow], metric: Metric, title: str, caption: str, width: int, terms: Terms = EQUAL_STEPS
) -> Group:
    """The table for a terminal of `width` characters; a narrow one gets results above costs."""
    lines = [cells(row, metric, terms) for row in rows]
    costs = [header for header in lines[0] if header not in (*RESULTS, f"test {metric.header}")]
    results = [header for header in lines[0] if header not in costs]
    parts = [list(lines[0])] if width >= FULL_WIDTH else [results, ["attention", *costs]]
    tables: list[RenderableType] = []
    for index, headers in enumerate(parts):
        part = [{header: line[header] for header in headers} for line in lines]
        table = to_table(part, words=WORDS, title=title if index == 0 else None)
        _mark(table, rows)
        tables.append(table)
    return Group(*tables, Text(caption, style="dim"))


def _mark(table: Table, rows: Sequence[ComparisonRow]) -> None:
    """Show the reference in bold, and mechanisms without a figure dimmed."""
    for line, row in zip(table.rows, rows, strict=True):
        line.style = "dim" if row.figure is None else ("bold" if row.is_reference else None)
