"""What a comparison was, beside its table: where and when it ran, for how long, and what validation said."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from approx_attn.comparison.aggregate import Record, Records, finished_runs
from approx_attn.metrics import Metric, metric_direction
from approx_attn.run.record import RESULT_FILE


def summarise_comparison(
    records: Records, *, metric: Metric, name: str, command: str, reference: str
) -> dict[str, Any]:
    """The facts of a comparison that its table does not show.

    Args:
        records: of all runs.
        metric: the test figure.
        name, command, reference: as in `write_comparison`.

    Returns:
        Plain containers: `figures`, `validation` (what the best checkpoint was kept by, where a run kept one; "min" or
        "max" of it, the `validation_mode`) and `steps` by mechanism and seed (as text), `environments` without
        repetitions, the `config` and `spec` of one run, and when the first and the last run ended (UTC).
    """
    finished = {label: finished_runs(by_seed) for label, by_seed in records.items()}
    runs = [run for by_seed in finished.values() for run in by_seed.values()]
    first: Record = runs[0] if runs else {}
    watched = watched_figure(first["config"]) if first else None
    ends = sorted(filter(None, map(ended, runs)))

    def by_seed(value: Callable[[Record], Any]) -> dict[str, dict[str, Any]]:
        return {label: {str(seed): value(run) for seed, run in each.items()} for label, each in finished.items()}

    environments: list[Any] = []
    environments += (each for run in runs if (each := run["environment"]) not in environments)
    return {
        "name": name,
        "command": command,
        "metric": metric.name,
        "reference": reference,
        "seeds": sorted({seed for each in records.values() for seed in each}),
        "figures": by_seed(lambda run: run["metrics"][metric.key]),
        "validation": by_seed(validation_figure),
        "validation_mode": metric_direction(watched) if watched else None,
        "steps": by_seed(lambda run: run["steps"]),
        "environments": environments,
        "config": first.get("config"),
        "spec": first.get("spec"),
        "first_run": ends[0] if ends else None,
        "last_run": ends[-1] if ends else None,
    }


def validation_figure(run: Record) -> float | None:
    """What made the best checkpoint of a run the best; None where it kept none."""
    return next((value for key, value in run["metrics"].items() if key.startswith("best_val/")), None)


def watched_figure(config: Mapping[str, Any]) -> str | None:
    """The figure that the best checkpoint is kept by, such as `val/accuracy`."""
    callbacks = filter(None, (config.get("callbacks") or {}).values())
    watched = (each.get("monitor") for each in callbacks if each["_target_"].endswith("ModelCheckpoint"))
    return next((str(monitor) for monitor in watched if monitor is not None), None)


def ended(run: Record) -> str | None:
    """When the record of a run was written (UTC), which is the last thing that a run does."""
    if "ended" in run:
        return str(run["ended"])
    path = Path(run["run_dir"]) / RESULT_FILE if "run_dir" in run else None
    if path is None or not path.is_file():
        return None
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
