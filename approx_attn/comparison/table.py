"""The comparison as one table: for the terminal, Markdown and CSV, all from the same rows."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.table import Table as RichTable
from rich.text import Text

from approx_attn.comparison.statistics import PairedDifference, Summary, holm_adjust
from approx_attn.metrics import Metric

MISSING = "–"


@dataclass(frozen=True)
class ComparisonRow:
    """What one mechanism reached and cost. Everything unknown is None, never zero.

    Attributes:
        name: mechanism with the options that were set, as in the command.
        figure: test figure over the finished seeds.
        difference: paired with the reference by seed; None for the reference itself.
        exact_share: share of the pairs whose score is computed exactly, 0 to 1.
        multiply_adds: of attention, relative to the reference.
        step_time: of a training step, relative to the reference, measured alternately with it.
        step_time_spread: half the interquartile range of the same ratio.
        memory: peak bytes of a training step.
        parameters: trainable parameters of the model.
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
class Column:
    """A column: what it is called, how it reads, and what it holds for machines."""

    header: str
    key: str
    show: Callable[[ComparisonRow], str]
    value: Callable[[ComparisonRow], Any]
    numeric: bool = True


def comparison_columns(metric: Metric) -> list[Column]:
    """The columns of the table, `metric` being its test figure."""
    return [
        Column("attention", "attention", lambda r: r.name, lambda r: r.name, numeric=False),
        Column(
            f"test {metric.header}",
            f"{metric.name}_mean",
            lambda r: _show_figure(r, metric),
            lambda r: r.figure and r.figure.mean,
        ),
        Column(
            "difference (95%)",
            "difference",
            lambda r: _show_difference(r, metric),
            lambda r: r.difference and r.difference.mean,
        ),
        Column("verdict", "verdict", lambda r: r.verdict(metric), lambda r: r.verdict(metric), numeric=False),
        Column("exact pairs", "exact_pairs", lambda r: _percent(r.exact_share), lambda r: r.exact_share),
        Column("multiply-adds", "multiply_adds", lambda r: _times(r.multiply_adds), lambda r: r.multiply_adds),
        Column("step time", "step_time", _show_step_time, lambda r: r.step_time),
        Column("peak memory", "memory_bytes", lambda r: _mebibytes(r.memory), lambda r: r.memory),
        Column("parameters", "parameters", lambda r: _thousands(r.parameters), lambda r: r.parameters),
        Column("seeds", "seeds", _show_seeds, lambda r: " ".join(map(str, r.finished))),
    ]


# Beyond what the terminal shows, the CSV has the spread behind the means.
_CSV_EXTRAS: list[tuple[str, Callable[[ComparisonRow], Any]]] = [
    ("std", lambda r: r.figure and r.figure.std),
    ("difference_low", lambda r: r.difference and r.difference.low),
    ("difference_high", lambda r: r.difference and r.difference.high),
    ("p_value", lambda r: r.difference and r.difference.p_value),
    ("step_time_spread", lambda r: r.step_time_spread),
    ("missing_seeds", lambda r: " ".join(map(str, r.missing))),
]


FULL_WIDTH = 168  # of a terminal that holds all columns side by side


def wide_console() -> Console:
    """The console of this process; wide enough for every column where it is a file, which has no edge."""
    console = Console()
    return console if console.is_terminal else Console(width=FULL_WIDTH)


def to_rich(rows: Sequence[ComparisonRow], metric: Metric, title: str, caption: str, width: int) -> Group:
    """The table for a terminal of `width` characters; a narrow one gets results above costs."""
    columns = comparison_columns(metric)
    if width >= FULL_WIDTH:
        return Group(_rich_table(rows, columns, title), Text(caption, style="dim"))
    name, figure, difference, verdict, *costs, seeds = columns
    return Group(
        _rich_table(rows, [name, figure, difference, verdict, seeds], title),
        _rich_table(rows, [name, *costs], None),
        Text(caption, style="dim"),
    )


def _rich_table(rows: Sequence[ComparisonRow], columns: Sequence[Column], title: str | None) -> RichTable:
    table = RichTable(title=title, title_justify="left")
    for column in columns:
        table.add_column(column.header, justify="right" if column.numeric else "left")
    for row in rows:
        style = "dim" if row.figure is None else ("bold" if row.is_reference else None)
        table.add_row(*(Text(column.show(row)) for column in columns), style=style)
    return table


def to_markdown(rows: Sequence[ComparisonRow], metric: Metric) -> str:
    """The table for a README."""
    columns = comparison_columns(metric)
    lines = [
        "| " + " | ".join(column.header for column in columns) + " |",
        "|" + "|".join("---:" if column.numeric else "---" for column in columns) + "|",
    ]
    lines += ["| " + " | ".join(_escape(column.show(row)) for column in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _escape(cell: str) -> str:
    """Text that Markdown shows as it is, and HTML in Markdown too."""
    for character, shown in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("`", "\\`"), ("\n", " ")):
        cell = cell.replace(character, shown)
    return cell


def to_csv(rows: Sequence[ComparisonRow], metric: Metric) -> str:
    """The table for machines: full precision, empty where something is unknown."""
    columns = [(column.key, column.value) for column in comparison_columns(metric)] + _CSV_EXTRAS
    return _csv([key for key, _ in columns], ([value(row) for _, value in columns] for row in rows))


def _csv(header: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    for line in lines:
        writer.writerow("" if v is None or (isinstance(v, float) and math.isnan(v)) else v for v in line)
    return buffer.getvalue()


# -- other metrics of the same runs --------------------------------------------------------------------

OTHERS_CAPTION = (
    "Differences are paired by seed, with Student's t interval; p by the paired t-test, after Holm's correction for "
    "the mechanisms compared by one metric."
)

Others = Sequence[tuple[Metric, Sequence[ComparisonRow]]]


def other_cells(others: Others) -> list[list[str]]:
    """The table of other metrics, its header first: one line per metric and mechanism."""
    lines = [["metric", "attention", "test", "difference (95%)", "p (Holm)", "verdict"]]
    for metric, rows in others:
        for row, p in zip(rows, _adjusted(rows), strict=True):
            shown = MISSING if math.isnan(p) else f"{p:.3f}" if p >= 0.001 else "<0.001"
            figures = (_show_figure(row, metric), _show_difference(row, metric), shown, row.verdict(metric))
            lines.append([metric.header, row.name, *figures])
    return lines


def _adjusted(rows: Sequence[ComparisonRow]) -> list[float]:
    return holm_adjust([row.difference.p_value if row.difference else math.nan for row in rows])


def others_to_rich(others: Others) -> RichTable:
    """That table for a terminal."""
    header, *lines = other_cells(others)
    table = RichTable(title="Other metrics", title_justify="left", caption=OTHERS_CAPTION, caption_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index in (2, 3, 4) else "left")
    for line in lines:
        table.add_row(*map(Text, line))
    return table


def others_to_markdown(others: Others) -> str:
    """That table for a document."""
    header, *lines = other_cells(others)
    rows = [header, ["---", "---", "---:", "---:", "---:", "---"], *([*map(_escape, line)] for line in lines)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def others_to_csv(others: Others) -> str:
    """That table for machines: full precision, empty where something is unknown."""
    columns: dict[str, Callable[[ComparisonRow], Any]] = {
        "attention": lambda r: r.name,
        "mean": lambda r: r.figure and r.figure.mean,
        "std": lambda r: r.figure and r.figure.std,
        "difference": lambda r: r.difference and r.difference.mean,
        "difference_low": lambda r: r.difference and r.difference.low,
        "difference_high": lambda r: r.difference and r.difference.high,
        "p_value": lambda r: r.difference and r.difference.p_value,
        "seeds": lambda r: " ".join(map(str, r.finished)),
    }
    return _csv(
        ["metric", *columns],
        ([metric.name, *(value(row) for value in columns.values())] for metric, rows in others for row in rows),
    )


# -- how figures read ----------------------------------------------------------------------------------


def _show_figure(row: ComparisonRow, metric: Metric) -> str:
    if row.figure is None:
        return MISSING
    spread = "" if math.isnan(row.figure.std) else f" ± {metric.show(row.figure.std)}"
    return f"{metric.show(row.figure.mean)}{spread}"


def _show_difference(row: ComparisonRow, metric: Metric) -> str:
    if row.difference is None:
        return MISSING
    mean = metric.show_difference(row.difference.mean)
    if math.isnan(row.difference.low):
        return mean
    return f"{mean} [{metric.show_difference(row.difference.low)}, {metric.show_difference(row.difference.high)}]"


def _show_step_time(row: ComparisonRow) -> str:
    if row.step_time is None:
        return MISSING
    spread = f" ± {row.step_time_spread:.2f}" if row.step_time_spread else ""
    return f"{row.step_time:.2f}×{spread}"


def _show_seeds(row: ComparisonRow) -> str:
    wanted = len(row.finished) + len(row.missing)
    return str(wanted) if not row.missing else f"{len(row.finished)} of {wanted}"


def _percent(share: float | None) -> str:
    return MISSING if share is None else f"{100 * share:.0f}%"


def _times(ratio: float | None) -> str:
    return MISSING if ratio is None else f"{ratio:.2f}×"


def _mebibytes(count: int | None) -> str:
    return MISSING if count is None else f"{count / 2**20:.0f} MiB"


def _thousands(count: int | None) -> str:
    return MISSING if count is None else f"{count:,}"
