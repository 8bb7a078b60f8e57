"""What verbs print and where they write: tables whose numbers stay whole, places that are tried before any work."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table

from approx_attn.errors import ConfigError

NO_EDGE = 10_000  # characters in a line of a file or pipe


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
    """Is the console wide enough for every number, and the longest word of other columns?"""
    unlimited = console.options.update(width=NO_EDGE)
    return Measurement.get(console, unlimited, table).minimum <= console.width


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
