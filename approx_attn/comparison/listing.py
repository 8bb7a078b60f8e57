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
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from approx_attn.attention.registry import attention_options, available_attention
from approx_attn.command import as_list, run_plain
from approx_attn.comparison import pruning
from approx_attn.comparison.table import wide_console
from approx_attn.config.compose import ConfigError, available_choices, config_dir, plain
from approx_attn.config.instantiate import suggestion
from approx_attn.errors import Unsuccessful
from approx_attn.metrics import DEFAULT, METRICS, Metric
from approx_attn.output import MISSING, require_folder, shown, shown_bytes, to_table
from approx_attn.run import record

STATUSES = ("finished", "failed", "running", "unfinished")
ORDERS = ("data", "attention", "seed", "status", "seconds", "date", *METRICS)
WORDS = ("attention", "options", "differs in", "status", "date", "folder")  # columns of words
SHOWN_DISTINCTIONS = 4
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
        date: seconds since 1970 when anything of the record was written last.
    """

    folder: Path
    status: str
    config: dict[str, Any]
    result: dict[str, Any]
    date: float

    @cached_property
    def values(self) -> dict[str, Any]:
        """The configuration by dotted key."""
        return flat(self.config)

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
    def seconds(self) -> float | None:
        return _number(self.result.get("seconds"))

    def figure(self, metric: Metric) -> float | None:
        """A test figure; None for a run that has none."""
        return _number((self.result.get("metrics") or {}).get(metric.key))


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


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
    date = max(_modified(folder / name) for name in (record.RESULT_FILE, record.CONFIG_FILE, record.MARKER))
    return RunEntry(folder, status, config, result, date)


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
        has = getattr(run, key) if key in FIELDS else run.values.get(key, ABSENT)
        accepted = value if isinstance(value, list) and not isinstance(has, list) else [value]
        if not any(has == one and isinstance(has, bool) == isinstance(one, bool) for one in accepted):
            return False
    return True


ABSENT = object()


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a configuration by dotted key, and the groups that they stand in."""
    found = {}
    for key, value in config.items():
        found[f"{prefix}{key}"] = value
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
    return found


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
    for status in as_list(own["status"]):
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
        for name in as_list(own[key]):
            if name is not None and name not in accepted:
                raise ConfigError(f"{key}={name} is unknown{suggestion(str(name), accepted)}")
    for key in filters:
        if runs and all(key not in run.values for run in runs):
            known = {*own, *(name for run in runs[:100] for name in run.values)}
            # Of hundreds of keys only the one that was probably meant is named.
            meant, _, _ = suggestion(key, known).partition(" Accepted:")
            raise ConfigError(f"{key} is not a key of any run here{meant}")
    wanted = {key: own[key] for key in FIELDS if own[key] is not None}
    found = [run for run in runs if matches(run, {**wanted, **filters})]
    if own["older_than"] is not None:
        found = [run for run in found if run.date < time.time() - own["older_than"] * DAY]
    return sorted(found, key=lambda run: _order(run, own["sort"]))


def _order(run: RunEntry, sort: str) -> tuple[Any, ...]:
    value = run.figure(METRICS[sort]) if sort in METRICS else getattr(run, sort)
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
    metric = METRICS[own["sort"] if own["sort"] in METRICS else DEFAULT[0]]
    console.print(as_table(runs, str(own["folder"]), metric))
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
        say(f"{run.folder}: {run.status}, {shown_bytes(files.size)}")
        for path in files.foreign:
            say(f"{path} was not written by a run: it stays, with its folder.")
    total = f"{len(chosen)} runs, {shown_bytes(sum(files.size for files in chosen))}"
    if chosen and not confirmed:
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise ConfigError(f"prune=true deletes nothing before it is confirmed; confirm=true deletes {total}.")
        confirmed = input(f"Delete {total}? [y/N] ").strip().lower() in ("y", "yes")
    deleted = pruning.delete(chosen, root) if confirmed else 0
    say(f"{deleted} of {len(runs)} runs deleted.")


def as_table(runs: Sequence[RunEntry], folder: str, metric: Metric) -> Table:
    """One row per run, with one test figure."""
    counts = ", ".join(f"{sum(run.status == status for run in runs)} {status}" for status in STATUSES)
    apart = distinctions(runs)
    rows = []
    for run, words in zip(runs, apart, strict=True):
        figure = run.figure(metric)
        row = {
            "data": run.data,
            "attention": run.attention,
            "options": run.options,
            "differs in": words,
            "seed": MISSING if run.seed is None else str(run.seed),
            "status": run.status,
            f"test {metric.header}": MISSING if figure is None else metric.show(figure),
            "seconds": shown(run.seconds, ".0f"),
            "date": time.strftime("%Y-%m-%d %H:%M", time.localtime(run.date)),
            "folder": os.path.relpath(run.folder, folder),
        }
        rows.append(row if any(apart) else {key: cell for key, cell in row.items() if key != "differs in"})
    table = to_table(rows, words=WORDS, title=f"{len(runs)} runs in {folder}", caption=counts)
    for column in table.columns:
        column.overflow, column.no_wrap = "fold", column.header == "date"
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
        differing = [key for key in own if any(other.get(key, ABSENT) != own[key] for other in alike)]
        more = " ..." if len(differing) > SHOWN_DISTINCTIONS else ""
        words.append(" ".join(f"{key}={own[key]}" for key in differing[:SHOWN_DISTINCTIONS]) + more)
    return words


def _settings(run: RunEntry) -> dict[str, Any]:
    """What decides a run, by dotted key, without what other columns show."""
    return {
        key: value
        for key, value in flat(record.deciding(run.config)).items()
        if not isinstance(value, Mapping)
        and not key.startswith(("attention", "model.attention."))
        and not (key == "data.seed" and value == run.seed)
    }
