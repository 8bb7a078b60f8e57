"""A learning rate for every mechanism of a comparison, from one grid, by validation."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from approx_attn.comparison.missing_runs import train_missing
from approx_attn.comparison.plan import Comparison, Run
from approx_attn.comparison.summary import validation_figure
from approx_attn.comparison.terms import Tuning
from approx_attn.errors import ConfigError

RATE = "optimizer.lr"


def tuned(comparison: Comparison, console: Console) -> Comparison:
    """Train the first seed of every mechanism with every learning rate, and give all its seeds the best.

    What trains here are ordinary runs: they are found again, and that of the best rate is the first seed's.
    A mechanism none of whose runs ended well keeps the first rate and is not trained further.
    """
    grid, monitor = comparison.tune, comparison.monitor
    assert monitor is not None
    seed = next(iter(comparison.runs[comparison.reference]))
    tried = {label: [each[seed].having({RATE: rate}) for rate in grid] for label, each in comparison.runs.items()}
    jobs = [
        (f"{label} lr={rate:g}", seed, run)
        for label, runs in tried.items()
        for rate, run in zip(grid, runs, strict=True)
        if not _diverged(run)  # would again
    ]
    train_missing(jobs, comparison.metric, console)
    figures = {label: tuple(_figure(run) for run in runs) for label, runs in tried.items()}
    tuning = Tuning(grid, monitor, seed, figures)
    rates = {label: tuning.best(label) or grid[0] for label in tried}
    runs = {
        label: {seed: run.having({RATE: rates[label]}) for seed, run in by_seed.items()}
        for label, by_seed in comparison.runs.items()
    }
    return replace(comparison, runs=runs, terms=replace(comparison.terms, tuning=tuning))


def _figure(run: Run) -> float | None:
    result = run.read()
    if result is None or result["status"] != "finished":
        return None
    figure = validation_figure(result)
    if figure is None:
        raise ConfigError(f"tune chooses by validation, and {run.folder} ended before the first: train longer.")
    return figure


def _diverged(run: Run) -> bool:
    return bool((run.read() or {}).get("diverged"))
