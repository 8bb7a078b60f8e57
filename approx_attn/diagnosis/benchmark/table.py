"""The table of a benchmark: its rows, on the console, in a file, and from the files of other runs."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from approx_attn.errors import ConfigError
from approx_attn.output import shown, to_table

SDPA = "sdpa"
# How a word of a file becomes a value, by the type of the field.
READERS: dict[str, Callable[[str], Any]] = {
    "bool": lambda word: word == "True",
    "str": str,
    "int | None": int,
    "float | None": float,
}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        label: mechanism and the options that were given.
        length: tokens.
        pass_name: `forward`, `train` or `decode`.
        causal: whether under a causal mask.
        seconds: median time of a pass, of `decode` of one step; None where it did not run.
        spread: interquartile range of the times, seconds.
        speedup: time of SDPA over this time, median over the rounds.
        speedup_spread: interquartile range of that ratio over the rounds.
        peak_bytes: most memory held beyond inputs and parameters; None where not measured.
        exact_share: share of the pairs whose exact score enters the result, 0 to 1.
        computed_share: full scores that are computed, relative to those of exact attention.
        multiply_adds: of a forward pass over one sequence, or of one step of `decode`, from the cost record.
        relative_multiply_adds: the same relative to exact attention.
        error: ‖Ô − O‖ / ‖O‖, mean over layers and heads; None where not measured.
        compiled: whether it ran in a compiled operator of this package.
        note: what a reader must know: why something is missing, or what could not be calibrated.
        commit: of the code that was measured; empty where unknown.
        reference: where a row was measured, if not in this run.
    """

    label: str
    length: int
    pass_name: str
    causal: bool = False
    seconds: float | None = None
    spread: float | None = None
    speedup: float | None = None
    speedup_spread: float | None = None
    peak_bytes: int | None = None
    exact_share: float | None = None
    computed_share: float | None = None
    multiply_adds: int | None = None
    relative_multiply_adds: float | None = None
    error: float | None = None
    compiled: bool = False
    note: str = ""
    commit: str = ""
    reference: str = ""

    @property
    def place(self) -> tuple[int, bool, str]:
        """Length, causality and pass: what rows must share to be compared."""
        return self.length, self.causal, self.pass_name

    @property
    def shown_label(self) -> str:
        return f"{self.label} (measured at {self.reference})" if self.reference else self.label


def heading(length: int, causal: bool, pass_name: str) -> str:
    """The title of the rows of one place."""
    return f"{length:,} tokens, {'causal, ' if causal else ''}{pass_name}"


def as_tables(rows: Sequence[Row]) -> list[Table]:
    """The rows for a console, one table per length, causality and pass."""
    places: dict[tuple[int, bool, str], list[dict[str, str]]] = {}
    for row in rows:
        places.setdefault(row.place, []).append(_cells(row))
    return [to_table(cells, title=heading(*place)) for place, cells in places.items()]


def _cells(row: Row) -> dict[str, str]:
    spread = "" if row.speedup_spread is None else f" ± {row.speedup_spread:.2f}"
    return {
        "mechanism": row.shown_label,
        "ms": shown(row.seconds and row.seconds * 1e3, ".1f"),
        "±": shown(None if row.spread is None else row.spread * 1e3, ".1f"),
        "× SDPA": shown(row.speedup, ".2f", spread),
        "MiB": shown(None if row.peak_bytes is None else row.peak_bytes / 2**20, ".0f"),
        "exact pairs used": shown(row.exact_share, ".1%"),
        "scores computed": shown(row.computed_share, ".1%"),
        "multiply-adds": shown(row.relative_multiply_adds, ".1%"),
        "error": shown(row.error, ".4f"),
    }


def notes(rows: Sequence[Row]) -> list[str]:
    """What stands under the tables: sentences about single rows, each once, and which of them ran compiled."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.note:
            found.setdefault((row.shown_label, row.note), []).append(row)
    lines = []
    for (label, note), noted in found.items():
        everywhere = len(noted) == sum(row.shown_label == label for row in rows)
        where = "" if everywhere else f" ({'; '.join(heading(*row.place) for row in noted)})"
        lines.append(f"{label}: {note}{where}")
    measured = [row for row in rows if not row.reference and row.label != SDPA and row.seconds is not None]
    compiled, others = (
        ", ".join(dict.fromkeys(row.label for row in measured if row.compiled is wanted)) or "none"
        for wanted in (True, False)
    )
    if measured:
        lines.append(
            f"In a compiled operator of this package: {compiled}; in PyTorch's operators: {others}; {SDPA} is a fused "
            "operator of PyTorch."
        )
    return lines


def read_references(paths: Sequence[str]) -> list[Row]:
    """The rows of other runs' `table.csv`, without those of SDPA, which their ratios are over already.

    Absolute times stay behind: those of another run or machine do not compare. Columns that a file lacks, as those of
    earlier versions do, stay empty.

    Raises:
        ConfigError: a file that is no such table.
    """
    rows = []
    for path in paths:
        try:
            with Path(path).open(newline="", encoding="utf-8") as file:
                read = [_row(line) for line in csv.DictReader(file)]
        except (KeyError, TypeError, ValueError, OSError, csv.Error) as error:
            raise ConfigError(f"reference={path} must be the table.csv of a benchmark, it is not one.") from error
        for row in read:
            if row.label != SDPA:
                rows.append(replace(row, seconds=None, spread=None, reference=row.reference or row.commit or str(path)))
    return rows


def _row(line: dict[str, str]) -> Row:
    """A row from the words of a line."""
    values: dict[str, Any] = {"label": line["label"], "length": int(line["length"]), "pass_name": line["pass_name"]}
    for field in fields(Row):
        word = line.get(field.name) or ""
        if word and field.name not in values:
            values[field.name] = READERS[str(field.type)](word)
    return Row(**values)
