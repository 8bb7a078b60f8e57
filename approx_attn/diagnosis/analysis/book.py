"""Where the analysis puts what it finds: one report, its figures as PNG, its numbers as CSV, JSON and Arrow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
from matplotlib.figure import Figure
from pyarrow import feather

from approx_attn.comparison.plots import save_figure
from approx_attn.comparison.report import Report, Section
from approx_attn.output import shown, to_csv
from approx_attn.run.record import write_json_atomically, write_text_atomically

Row = Mapping[str, Any]
SHOWN_ROWS = 200  # longer tables are in the files only


@dataclass
class Book:
    """A report with its figures and tables, each also a file of its own.

    Attributes:
        report: the page.
        facts: what was analysed and how, for `numbers.json`.
        figures: by file name, without ending.
        tables: rows by file name, without ending.
    """

    report: Report
    facts: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    tables: dict[str, list[Row]] = field(default_factory=dict)

    def section(self, heading: str) -> BookSection:
        """Start a section of the report."""
        return BookSection(self, self.report.section(heading))

    def keep(self, name: str, rows: Sequence[Row]) -> None:
        """Keep rows as files without showing them."""
        self.tables[name] = list(rows)

    def save(self, folder: str | Path) -> Path:
        """Write report.html, figures/, tables/ and numbers.json; returns the path of the report."""
        folder = Path(folder)
        for name, figure in self.figures.items():
            save_figure(figure, folder / "figures" / f"{name}.png")
        for name, rows in self.tables.items():
            if rows:
                write_text_atomically(folder / "tables" / f"{name}.csv", to_csv(rows))
                table = pyarrow.Table.from_pylist([dict(row) for row in rows])
                feather.write_feather(table, str(folder / "tables" / f"{name}.arrow"), compression="uncompressed")
        write_json_atomically(folder / "numbers.json", {**self.facts, "tables": _without_nan(self.tables)})
        return self.report.save(folder / "report.html")


@dataclass
class BookSection:
    """A section of the report, whose figures and tables the book keeps as files."""

    book: Book
    shown: Section

    def text(self, paragraph: str) -> None:
        """Add a paragraph of plain text."""
        self.shown.text(paragraph)

    def figure(self, name: str, figure: Figure, caption: str) -> None:
        """Show a figure and keep it as a file of this name."""
        self.book.figures[name] = figure
        self.shown.figure(figure, f"{caption} (figures/{name}.png)")

    def table(self, name: str, rows: Sequence[Row], caption: str, shown: Sequence[str] | None = None) -> None:
        """Show rows, a column per key, and keep them as files.

        Args:
            name: of the files.
            rows: with the same keys each.
            caption: below the table.
            shown: keys of the columns shown; all if None. The files hold all.
        """
        self.book.keep(name, rows)
        if not rows:
            return
        if len(rows) > SHOWN_ROWS:
            self.text(f"{caption} {len(rows)} rows, in tables/{name}.csv.")
            return
        keys = list(rows[0]) if shown is None else shown
        lines = [{key.replace("_", " "): show(row[key]) for key in keys} for row in rows]
        self.shown.table(lines, f"{caption} (tables/{name}.csv)")


def show(value: Any) -> str:
    """A cell: numbers to three digits or so, "–" for what is not there."""
    if value is None or isinstance(value, float):
        return shown(value, ".3f" if abs(value or 0.0) < 10 else ".1f")
    return str(value)


def _without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
