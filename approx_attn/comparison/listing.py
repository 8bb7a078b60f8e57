"""The verb `approx-attn runs`: which runs there are, by what they are; and the removal of those of no use.

Reads each run's `result.json`, or `config.yaml` where there is none yet; nothing else, so thousands take seconds.
What is removed, `pruning` decides.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from approx_attn.attention.registry import attention_options, available_attention
from approx_attn.command import run_plain
from approx_attn.comparison import pruning
from approx_attn.comparison.table import wide_console
from approx_attn.config.compose import ConfigError, available_choices, config_dir, plain
from approx_attn.config.instantiate import suggestion
from approx_attn.errors import Unsuccessful
from approx_attn.output import require_folder
from approx_attn.run import record

STATUSES = ("finished", "failed", "running", "unfinished")
ORDERS = ("data", "attention", "seed", "status", "accuracy", "seconds", "date")
FIELDS = ("status", "data", "attention", "seed")  # filters that are not paths into the configuration
DAY = 24 * 3600.0


@dataclass(frozen=True)
class RunEntry:
    """One run as its folder tells.

    Attributes:
        folder: where it lies.
        status: one of `STATUSES`.
        config: the resolved configuration; empty if it cannot be read.
        result: the record; empty for a run without.
        written: seconds since 1970 when anything of the record was written last.
    """

    folder: Path
    status: str
    config: dict[str, Any]
    result: dict[str, Any]
    written: float

    @property
    def data(self) -> str:
        return str(self.config.get("name", "?"))

    @property
    def seed(self) -> Any:
        return self.config.get("seed")

    @property
    def attention(self) -> str:
        """The name of the mechanism; that of the folder where no record says it."""
        return str(self.result.get("attention") or self.folder.parent.name)

    @property
    def options(self) -> str:
        """The options of the mechanism that are not at their defaults; where a default is not known, not at null."""
        known = attention_options(self.attention) if self.attention in available_attention() else {}
        chosen = self.config.get("attention")
        if not isinstance(chosen, dict):
            return ""
        defaults = {key: parameter.default for key, parameter in known.items()}
        return " ".join(
            f"{key}={value}" for key, value in chosen.items() if not key.startswith("_") and value != defaults.get(key)
        )

    @property
    def accuracy(self) -> float | None:
        value = (self.result.get("metrics") or {}).get("test/accuracy")
        return float(value) if isinstance(value, int | float) else None

    @property
    def seconds(self) -> float | None:
        value = self.result.get("seconds")
        return float(value) if isinstance(value, int | float) else None

    @property
    def date(self) -> float:
        return self.written


def find_runs(root: str | Path) -> Iterator[RunEntry]:
    """All runs below a folder, sorted by where they lie. Links are not followed."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        if {record.MARKER, record.RESULT_FILE, record.CONFIG_FILE} & set(files) and record.holds_run(folder):
            subfolders.clear()
            yield read_run(Path(folder))


def read_run(folder: Path) -> RunEntry:
    """One run; what cannot be read counts as missing."""
    result = record.read_result(folder) or {}
    config = record.stored_config(folder) or {}
    status = result.get("status")
    if status not in ("finished", "failed"):
        status = "running" if is_running(folder) else "unfinished"
    newest = max((folder / name for name in (record.RESULT_FILE, record.CONFIG_FILE, record.MARKER)), key=_modified)
    return RunEntry(folder, status, config, result, _modified(newest))


def is_running(folder: Path) -> bool:
    """Whether a process holds the run's lock."""
    try:
        with open(folder / record.LOCK_FILE) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


# -- choosing ------------------------------------------------------------------------------------------


def matches(run: RunEntry, wanted: Mapping[str, Any]) -> bool:
    """Whether a run has every value asked for; a list asks for any of its values."""
    for key, value in wanted.items():
        has = getattr(run, key) if key in FIELDS else select(run.config, key)
        accepted = value if isinstance(value, list) and not isinstance(has, list) else [value]
        if not any(has == one and isinstance(has, bool) == isinstance(one, bool) for one in accepted):
            return False
    return True


MISSING = object()


def select(config: Any, key: str) -> Any:
    """The value at a dotted key, or `MISSING`."""
    for part in key.split("."):
        if not isinstance(config, Mapping) or part not in config:
            return MISSING
        config = config[part]
    return config


def dotted_keys(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys of all values in a configuration."""
    for key, value in config.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from dotted_keys(value, f"{prefix}{key}.")


# -- the verb ------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """`approx-attn runs`; returns the exit code."""
    return run_plain("runs", lambda: _list_or_prune(arguments), arguments)


def split_words(arguments: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys of `configs/runs.yaml`, and the filters by keys of the configuration.

    Raises:
        ConfigError: an argument that cannot be read, or a value that is not accepted.
    """
    own = plain(OmegaConf.load(config_dir() / "runs.yaml"))  # type: ignore[arg-type]
    filters: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not key:
            raise ConfigError(f"argument {argument!r} cannot be read; write key=value.")
        try:
            value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[call-overload,index]
        except Exception as error:
            raise ConfigError(f"argument {argument!r} cannot be read; write key=value.") from error
        (own if key in own else filters)[key] = value
    statuses = own["status"] if isinstance(own["status"], list) else [own["status"]]
    for status in statuses:
        if status is not None and status not in STATUSES:
            raise ConfigError(f"status={status!r} is unknown{suggestion(str(status), STATUSES)}")
    days = own["older_than"]
    if days is not None and (isinstance(days, bool) or not isinstance(days, int | float) or days < 0):
        raise ConfigError(f"older_than must be a number of days of at least 0, got {days!r}.")
    if own["sort"] not in ORDERS:
        raise ConfigError(f"sort={own['sort']!r} is unknown{suggestion(str(own['sort']), ORDERS)}")
    for key in ("prune", "confirm"):
        if not isinstance(own[key], bool):
            raise ConfigError(f"{key} must be true or false, got {own[key]!r}.")
    if own["prune"] and own["status"] is None and days is None:
        raise ConfigError("prune=true needs status=failed, status=unfinished or older_than=<days>, else all would go.")
    if not Path(str(own["folder"])).is_dir():
        raise ConfigError(f"folder={str(own['folder'])!r} is not a folder; runs are below paths.runs of training.")
    return own, filters


def chosen_runs(own: Mapping[str, Any], filters: Mapping[str, Any]) -> list[RunEntry]:
    """The runs that the words ask for, in the order that they ask for.

    Raises:
        ConfigError: a filter by a key that no run's configuration has, or by a name that nothing has.
    """
    runs = list(find_runs(own["folder"]))
    names = {
        "attention": {*available_attention(), *(run.attention for run in runs)},
        "data": {*available_choices("data"), *(run.data for run in runs)},
    }
    for key, accepted in names.items():
        for name in own[key] if isinstance(own[key], list) else [own[key]]:
            if name is not None and name not in accepted:
                raise ConfigError(f"{key}={name} is unknown{suggestion(str(name), accepted)}")
    for key in filters:
        if runs and all(select(run.config, key) is MISSING for run in runs):
            known = {name for run in runs[:100] for name in dotted_keys(run.config)} | set(own)
            raise ConfigError(f"{key} is not a key of any run here{_closest(key, known)}")
    wanted = {key: own[key] for key in FIELDS if own[key] is not None}
    found = [run for run in runs if matches(run, {**wanted, **filters})]
    if own["older_than"] is not None:
        found = [run for run in found if run.written < time.time() - own["older_than"] * DAY]
    return sorted(found, key=lambda run: _order(run, own["sort"]))


def _closest(key: str, known: set[str]) -> str:
    """The end of a sentence: of hundreds of keys only the one that was probably meant is named."""
    meant, _, _ = suggestion(key, known).partition(" Accepted:")
    return meant


def _order(run: RunEntry, sort: str) -> tuple[Any, ...]:
    value = getattr(run, sort)
    first = (value is None, str(value) if isinstance(value, str) else value or 0)
    return (*first, run.data, run.attention, run.options, str(run.seed))


def _list_or_prune(arguments: Sequence[str]) -> None:
    own, filters = split_words(arguments)
    runs = chosen_runs(own, filters)
    console = wide_console()
    if own["prune"]:
        _prune(runs, Path(own["folder"]), own["confirm"], console)
        return
    if not runs:
        words = [word for word in arguments if not word.startswith(("folder=", "sort=", "verbose="))]
        raise Unsuccessful(f"no run in {own['folder']}{' has ' if words else ''}{' and '.join(words)}.")
    console.print(as_table(runs, str(own["folder"])))
    failed = [run for run in runs if run.status == "failed"]
    for run in failed[:20]:
        console.print(f"{run.folder}: {run.result.get('error', '')}", highlight=False, markup=False)
    if own["status"] is not None or own["older_than"] is not None:
        console.print("prune=true deletes these, and first shows how much that is.", highlight=False)


def _prune(runs: Sequence[RunEntry], root: Path, confirmed: bool, console: Console) -> None:
    """Show what is to be deleted, ask unless that has been confirmed, and delete it.

    Raises:
        ConfigError: not confirmed, and nobody can be asked.
    """

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    chosen = []
    for run in runs:
        kept = "is running" if run.status == "running" else pruning.why_kept(run.folder, root)
        if kept is not None:
            say(f"{run.folder} {kept}: it stays.")
            continue
        require_folder("folder", run.folder)
        files = pruning.files_of(run.folder, run.config)
        chosen.append(files)
        say(f"{run.folder}: {run.status}, {_size(files.size)}")
        for path in files.foreign:
            say(f"{path} was not written by a run: it stays, with its folder.")
    total = f"{len(chosen)} runs, {_size(sum(files.size for files in chosen))}"
    if chosen and not confirmed:
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise ConfigError(f"prune=true deletes nothing before it is confirmed; confirm=true deletes {total}.")
        confirmed = input(f"Delete {total}? [y/N] ").strip().lower() in ("y", "yes")
    deleted = pruning.delete(chosen, root) if confirmed else 0
    say(f"{deleted} of {len(runs)} runs deleted.")


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def as_table(runs: Sequence[RunEntry], folder: str) -> Table:
    """One row per run."""
    numbers = ", ".join(f"{sum(run.status == status for run in runs)} {status}" for status in STATUSES)
    table = Table(title=f"{len(runs)} runs in {folder}", title_justify="left", caption=numbers, caption_justify="left")
    apart = distinctions(runs)
    columns = [column for column in COLUMNS if column[0] != DISTINCTIONS or any(apart)]
    for header, numeric in columns:
        table.add_column(header, justify="right" if numeric else "left", overflow="fold", no_wrap=header == "date")
    for run, words in zip(runs, apart, strict=True):
        cells = dict(zip([header for header, _ in COLUMNS], _cells(run, words, folder), strict=True))
        table.add_row(*(cells[header] for header, _ in columns))
    return table


def distinctions(runs: Sequence[RunEntry]) -> list[str]:
    """For every run, the settings that not all runs of its data and mechanism share; options and seeds left out."""
    settings = [_settings(run) for run in runs]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run, own in zip(runs, settings, strict=True):
        groups.setdefault((run.data, run.attention), []).append(own)
    words = []
    for run, own in zip(runs, settings, strict=True):
        alike = groups[run.data, run.attention]
        differing = [key for key in own if any(other.get(key, MISSING) != own[key] for other in alike)]
        more = " ..." if len(differing) > SHOWN_DISTINCTIONS else ""
        words.append(" ".join(f"{key}={own[key]}" for key in differing[:SHOWN_DISTINCTIONS]) + more)
    return words


def _settings(run: RunEntry) -> dict[str, Any]:
    """What decides a run, by dotted key, without what other columns show."""
    config = record.deciding(run.config)
    keys = [key for key in dotted_keys(config) if not key.startswith(("attention", "model.attention."))]
    values = {key: select(config, key) for key in keys}
    return {
        key: value
        for key, value in values.items()
        if not isinstance(value, Mapping) and not (key == "data.seed" and value == run.seed)
    }


DISTINCTIONS = "differs in"
SHOWN_DISTINCTIONS = 4

COLUMNS = (
    ("data", False),
    ("attention", False),
    ("options", False),
    (DISTINCTIONS, False),
    ("seed", True),
    ("status", False),
    ("test accuracy %", True),
    ("seconds", True),
    ("date", False),
    ("folder", False),
)


def _cells(run: RunEntry, apart: str, folder: str) -> list[str]:
    accuracy = "–" if run.accuracy is None else f"{100 * run.accuracy:.2f}"
    seconds = "–" if run.seconds is None else f"{run.seconds:.0f}"
    date = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.written))
    return [
        run.data,
        run.attention,
        run.options,
        apart,
        "–" if run.seed is None else str(run.seed),
        run.status,
        accuracy,
        seconds,
        date,
        os.path.relpath(run.folder, folder),
    ]
