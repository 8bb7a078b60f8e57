"""Training what a comparison lacks, with a bar that says where it is and when it will be done.

On a terminal one line follows the current run: its number, mechanism, seed, epoch and step, and the time left. Where
the output is a file or pipe, a line for every run that ended is all.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from approx_attn.comparison.aggregate import Record
from approx_attn.comparison.plan import Job, Run
from approx_attn.config.compose import ConfigError
from approx_attn.metrics import Metric
from approx_attn.output import shown_seconds
from approx_attn.run import record
from approx_attn.run import train as training

REFRESH_SECONDS = 0.2
KNOWN_SHARE = 0.05  # of a run, from which on its own speed says how long it takes


@dataclass
class TimeLeft:
    """How long the runs to come will take, from those that ended: by mechanism where one did, else by all.

    Attributes:
        seconds: of finished runs, by mechanism; those of earlier attempts from their records.
        waiting: mechanisms of the runs that have not begun.
    """

    waiting: list[str]
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, label: str, seconds: float | None) -> None:
        """Note what a run took."""
        if seconds is not None:
            self.seconds.setdefault(label, []).append(seconds)

    def expected(self, label: str) -> float | None:
        """Seconds of one run of a mechanism; None as long as nothing is known."""
        known = self.seconds.get(label) or [each for group in self.seconds.values() for each in group]
        return fmean(known) if known else None

    def left(self, label: str | None = None, elapsed: float = 0.0, done: float = 0.0) -> float | None:
        """Seconds until the last run ends; None as long as nothing is known.

        Args:
            label: mechanism of the current run; None between runs.
            elapsed: seconds since it began.
            done: share of it that is done.
        """
        rest = 0.0
        current = None
        if label is not None:
            current = elapsed / done if done >= KNOWN_SHARE else self.expected(label)
            if current is None:
                return None
            rest = max(current - elapsed, 0.0)
        for other in self.waiting:
            each = self.expected(other) if self.seconds else current
            if each is None:
                return None
            rest += each
        return rest


class RunWatcher(pl.Callback):
    """Tells the bar the epoch and step of the run that trains.

    Args:
        bar: one task, whose total is the number of runs.
        head: what the line begins with.
        label: mechanism of the run.
        ended: how many runs have ended before.
        time_left: of the comparison.
    """

    def __init__(self, bar: Progress, head: str, label: str, ended: int, time_left: TimeLeft) -> None:
        self.bar, self.head, self.label, self.ended, self.time_left = bar, head, label, ended, time_left
        self.started = time.perf_counter()
        self._shown_at = 0.0
        self.show("starting")

    def show(self, where: str, share: float = 0.0) -> None:
        """Bring the line up to date; `share` of the run is done."""
        left = _words(self.time_left.left(self.label, time.perf_counter() - self.started, share))
        self.bar.update(self.bar.task_ids[0], completed=self.ended + share, head=self.head, where=where, left=left)
        self.bar.refresh()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        if now - self._shown_at >= REFRESH_SECONDS:
            self._shown_at = now
            most = trainer.max_epochs or -1
            of = f"/{most}" if most > 0 else ""
            total = trainer.estimated_stepping_batches
            share = trainer.global_step / total if 0 < total < float("inf") else 0.0
            self.show(f"epoch {trainer.current_epoch + 1}{of}, step {trainer.global_step:,}", share)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.show("testing", 1.0)


def train_missing(jobs: Sequence[Job], metric: Metric, console: Console) -> None:
    """Train the runs without a finished record; a failing run is recorded and the others go on.

    A signal or a full disk ends the comparison; the same command continues it.

    Args:
        jobs: the runs.
        metric: the test figure that is shown of each.
        console: where progress is printed.
    """
    time_left, missing = TimeLeft([]), set()
    for label, seed, run in jobs:
        known = _finished(run)
        if known is None:
            missing.add((label, seed))
        else:
            time_left.add(label, known.get("seconds"))
    columns = [TextColumn("{task.fields[head]}", markup=False), TextColumn("{task.fields[where]}"), BarColumn(20)]
    columns.append(TextColumn("{task.fields[left]}"))
    bar = Progress(*columns, console=console, transient=True, auto_refresh=False, disable=not console.is_terminal)
    bar.add_task("", total=len(jobs), head="", where="", left="")
    with bar:
        for number, (label, seed, run) in enumerate(jobs, start=1):
            head = f"[{number}/{len(jobs)}] {label} seed {seed}"
            known = _finished(run)  # by now, another comparison may have trained it
            if known is not None:
                figure = _figure(known, metric)
                console.print(f"{head}: done before, {figure}", highlight=False, markup=False)
                continue
            time_left.waiting = [other for other, its_seed, _ in jobs[number:] if (other, its_seed) in missing]
            watcher = RunWatcher(bar, head, label, number - 1, time_left)
            result = _train(run.config, [watcher])
            seconds = time.perf_counter() - watcher.started
            if result["status"] == "finished":
                time_left.add(label, seconds)
                outcome = _figure(result, metric)
            else:
                outcome = f"FAILED: {result['error']}"
            left = _words(time_left.left()) if time_left.waiting else ""
            spent = ", ".join(filter(None, (f"{seconds:.0f} s", left)))
            console.print(f"{head}: {outcome} ({spent})", highlight=False, markup=False)


def _finished(run: Run) -> Record | None:
    result = run.read()
    return result if result is not None and result["status"] == "finished" else None


def _words(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"about {f'{seconds:.0f} s' if seconds < 120 else shown_seconds(seconds)} left"


def _train(config: Mapping[str, Any], callbacks: Sequence[pl.Callback]) -> dict[str, Any]:
    """The record of a run, or what it failed with."""
    try:
        return training.train(config, callbacks).record
    except ConfigError:
        raise
    except Exception as error:
        if record.is_disk_full(error):
            raise  # as it would be for every run to come
        return {"status": "failed", "error": f"{type(error).__name__}: {error}"}


def _figure(result: Mapping[str, Any], metric: Metric) -> str:
    if metric.key not in result["metrics"]:
        return f"no {metric.name}"
    return f"test {metric.header} {metric.show(result['metrics'][metric.key])}"
