"""What a comparison was, as one file for machines: summary.json, beside the table that it says everything about."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from approx_attn.metrics import metric_direction
from approx_attn.run.record import RESULT_FILE

SUMMARY_FILE = "summary.json"

Records = Mapping[str, Mapping[int, dict[str, Any] | None]]


def summarise_comparison(records: Records, *, metric: str, name: str, command: str, reference: str) -> dict[str, Any]:
    """The facts of a comparison that its table does not show.

    Args:
        records: mechanism -> seed -> record of the run with its `run_dir`, or None.
        metric: name of the test figure, without "test/".
        name, command, reference: as in `write_comparison`.

    Returns:
        Plain containers: `figures`, `validation` (what the best checkpoint was kept by, where a run kept one; "min" or
        "max" of it, the `validation_mode`) and `steps` by mechanism and seed (as text), `environments` without
        repetitions, the `config` and `spec` of one run, and when the first and the last run ended (UTC).
    """
    finished = {
        label: {seed: run for seed, run in by_seed.items() if run is not None and run["status"] == "finished"}
        for label, by_seed in records.items()
    }
    runs = [run for by_seed in finished.values() for run in by_seed.values()]
    ended = sorted(time for run in runs if (time := _ended(run)) is not None)
    return {
        "name": name,
        "command": command,
        "metric": metric,
        "reference": reference,
        "seeds": sorted({seed for by_seed in records.values() for seed in by_seed}),
        "figures": _by_seed(finished, lambda run: run["metrics"][f"test/{metric}"]),
        "validation": _by_seed(finished, _validation_figure),
        "validation_mode": _validation_mode(runs[0]["config"]) if runs else None,
        "steps": _by_seed(finished, lambda run: run["steps"]),
        "environments": list(_different(run["environment"] for run in runs)),
        "config": runs[0]["config"] if runs else None,
        "spec": runs[0]["spec"] if runs else None,
        "first_run": ended[0] if ended else None,
        "last_run": ended[-1] if ended else None,
    }


def _by_seed(finished: Mapping[str, Mapping[int, Any]], value: Callable[[Any], Any]) -> dict[str, dict[str, Any]]:
    return {label: {str(seed): value(run) for seed, run in by_seed.items()} for label, by_seed in finished.items()}


def _validation_figure(run: Mapping[str, Any]) -> float | None:
    return next((value for key, value in run["metrics"].items() if key.startswith("best_val/")), None)


def _validation_mode(config: Mapping[str, Any]) -> str | None:
    callbacks = (callback for callback in (config.get("callbacks") or {}).values() if callback)
    return next((metric_direction(callback["monitor"]) for callback in callbacks if _keeps_the_best(callback)), None)


def _keeps_the_best(callback: Mapping[str, Any]) -> bool:
    return callback["_target_"].endswith("ModelCheckpoint") and callback.get("monitor") is not None


def _ended(run: Mapping[str, Any]) -> str | None:
    """When the record of a run was written, which is the last thing that a run does."""
    path = Path(run["run_dir"]) / RESULT_FILE if "run_dir" in run else None
    if path is None or not path.is_file():
        return None
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")


def _different(items: Iterable[Any]) -> Iterable[Any]:
    """The items without repetitions, in their order."""
    seen: list[Any] = []
    for item in items:
        if item not in seen:
            seen.append(item)
            yield item
