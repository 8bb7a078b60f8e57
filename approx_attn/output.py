"""What verbs print and where they write: figures, tables whose numbers stay whole, places tried before any work.

A table is a list of rows, each a mapping from header to cell: `to_table` shows it on a console, `to_markdown` in a
document, `to_csv` in a file.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

from approx_attn.errors import ConfigError

NO_EDGE = 10_000  # characters in a line of a file or pipe
MISSING = "–"

Rows = Sequence[Mapping[str, Any]]


# -- figures -------------------------------------------------------------------------------------------


def shown(value: float | None, form: str, unit: str = "") -> str:
    """A number in a format such as `.1%` or `,` with its unit behind; a dash for None and NaN."""
    return MISSING if value is None or value != value else f"{value:{form}}{unit}"


def shown_bytes(count: float) -> str:
    """A number of bytes in the unit that fits."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 2**10:.1f} KiB"


def shown_seconds(seconds: float) -> str:
    """A time in the unit that fits."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# -- tables --------------------------------------------------------------------------------------------


def to_table(rows: Rows, *, words: Collection[str] = (), title: str | None = None, caption: str | None = None) -> Table:
    """At least one row as a table for a console.

    Args:
        rows: from header to cell; cells are text, shown as it is.
        words: headers of columns of words, which stand left as the first column does; figures stand right.
        title, caption: above and below.
    """
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for index, header in enumerate(rows[0]):
        table.add_column(header, justify="left" if index == 0 or header in words else "right")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row.values()))
    return table


def to_markdown(rows: Rows, words: Collection[str] = ()) -> str:
    """At least one row as a table in Markdown; arguments as `to_table`."""
    headers = list(rows[0])
    rules = ["---" if index == 0 or header in words else "---:" for index, header in enumerate(headers)]
    lines = [f"| {' | '.join(headers)} |", f"|{'|'.join(rules)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(_escaped, row.values()))} |" for row in rows)]) + "\n"


def _escaped(cell: str) -> str:
    """Text that Markdown shows as it is, and HTML in Markdown too."""
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("`", "\\`"), ("\n", " ")):
        cell = cell.replace(character, entity)
    return cell


def to_csv(rows: Rows) -> str:
    """At least one row as comma-separated values: full precision, empty for None."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def output_console() -> Console:
    """The console of this process; where it is a file or pipe, which has no edge, nothing is wrapped or cut."""
    console = Console()
    return console if console.is_terminal else Console(width=NO_EDGE)


def print_table(table: Table, console: Console | None = None) -> None:
    """Print a table; one that is too wide goes on below, its first column repeated, so that no number is cut.

    Args:
        table: numbers stand in columns that are justified to the right; other columns may wrap.
        console: `output_console()` if None.
    """
    console = output_console() if console is None else console
    unlimited = console.options.update(width=NO_EDGE)
    for column in table.columns:
        column.overflow, column.no_wrap = "fold", column.justify == "right"
        if column.no_wrap:
            cells = (column.header, *column.cells)
            column.min_width = max(Measurement.get(console, unlimited, cell).maximum for cell in cells)
    first, *rest = table.columns
    parts: list[list[Column]] = []
    for column in rest:
        if not parts or not _fits(_part(table, [first, *parts[-1], column]), console):
            parts.append([])
        parts[-1].append(column)
    for index, columns in enumerate(parts or [[]]):
        part = _part(table, [first, *columns])
        part.title = table.title if index == 0 else None
        part.caption = table.caption if index >= len(parts) - 1 else None
        console.print(part)


def _part(table: Table, columns: list[Column]) -> Table:
    part = Table(title_justify=table.title_justify, caption_justify=table.caption_justify)
    part.columns = [dataclasses.replace(column, _index=index) for index, column in enumerate(columns)]
    part.rows = table.rows
    return part


def _fits(table: Table, console: Console) -> bool:
    """Whether the console is wide enough for every number, and for the longest word of the other columns."""
    unlimited = console.options.update(width=NO_EDGE)
    return Measurement.get(console, unlimited, table).minimum <= console.width


# -- places --------------------------------------------------------------------------------------------


def require_file(key: str, path: Any) -> Path:
    """A path at which a file can be written.

    Raises:
        ConfigError: it cannot; found out before any work, and nothing is left behind.
    """
    path = _path(key, path)
    if path.exists() and not path.is_file():
        raise ConfigError(f"{key}={path} must be a file, and something else is there.")
    _try_folder(key, path, path.parent)
    if path.exists():
        try:
            path.open("ab").close()
        except OSError as error:
            raise ConfigError(f"{key}={path} cannot be written: {error.strerror}.") from error
    return path


def require_folder(key: str, path: Any) -> Path:
    """A path at which a folder can be made, or is, and files be written into it.

    Raises:
        ConfigError: it cannot; found out before any work, and nothing is left behind.
    """
    path = _path(key, path)
    _try_folder(key, path, path)
    return path


def _path(key: str, path: Any) -> Path:
    if not isinstance(path, str | Path) or not str(path) or "\0" in str(path):
        raise ConfigError(f"{key} must be a path, got {path!r}.")
    return Path(path)


def _try_folder(key: str, path: Path, folder: Path) -> None:
    """Write a file into the nearest folder that exists; a permission says less than an attempt."""
    try:
        while not folder.exists() and not folder.is_symlink() and folder != folder.parent:
            folder = folder.parent
        if not folder.is_dir():
            raise ConfigError(f"{key}={path} cannot be written: {folder} is not a folder.")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{key}={path} cannot be written: {folder}: {error.strerror}.") from error
