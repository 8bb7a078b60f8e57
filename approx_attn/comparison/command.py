"""Comparisons: train what is missing of mechanisms × seeds, skip what is done, and write one table.

    compare(["data=digits", "attention=[exact,eigen_row,topk]", "seeds=[1,2,3]"])

`plan` reads the words, `step_measurement` measures, `equal_time` and `tuning` set how long and how fast each learns,
`missing_runs` trains, `comparison_report` writes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console

from approx_attn.command import run_plain
from approx_attn.comparison.aggregate import comparison_rows, other_rows
from approx_attn.comparison.comparison_report import write_comparison
from approx_attn.comparison.equal_time import at_equal_time
from approx_attn.comparison.missing_runs import train_missing
from approx_attn.comparison.plan import Comparison, plan
from approx_attn.comparison.records_file import RECORDS_FILE, StoredComparison, write_records
from approx_attn.comparison.step_measurement import MEASUREMENTS_FILE, build_all, measure_steps
from approx_attn.comparison.table import OTHERS_CAPTION, ComparisonRow, for_terminal, other_cells, wide_console
from approx_attn.comparison.tuning import tuned
from approx_attn.errors import Unsuccessful
from approx_attn.output import require_folder, shown_seconds, to_table
from approx_attn.run import record
from approx_attn.run.stored_metrics import how_to_get, lacking
from approx_attn.run.trainer import quiet


def main(arguments: Sequence[str]) -> int:
    """The verb `compare`; returns the exit code."""
    return run_plain("compare", lambda: require_all(compare(arguments)), arguments)


def require_all(rows: Sequence[ComparisonRow]) -> None:
    """Raises `Unsuccessful` unless all runs of a table finished, with figures that are numbers."""
    missing = sum(len(row.missing) for row in rows)
    if missing:
        raise Unsuccessful(f"{missing} of {missing + sum(len(row.finished) for row in rows)} runs failed.")
    for row in rows:
        if row.figure is None or not math.isfinite(row.figure.mean):
            raise Unsuccessful(f"the figure of {row.name} is no finite number.")


def compare(arguments: Sequence[str], console: Console | None = None) -> list[ComparisonRow]:
    """Run a comparison to its table.

    Args:
        arguments: overrides of `compare.yaml` and, for every other key, of `train.yaml`.
        console: where progress and the table are printed.

    Returns:
        The rows of the table, also written as table.csv, table.md, plot.png and report.html.

    Raises:
        ConfigError: anything wrong with any of the runs; nothing has been trained.
        DiskFullError: no space is left; the same arguments continue.
        Stopped: a signal ended it; the same arguments continue.
    """
    console = wide_console() if console is None else console
    comparison = plan(arguments)
    folder, metric = comparison.folder, comparison.metric
    require_folder("results", folder)
    for _, _, run in comparison.jobs():
        if not record.is_finished(run.folder):
            require_folder("paths.runs", run.folder)
    with quiet():
        tasks, data = build_all(comparison)  # refuses what cannot run before the first step
    with record.run_lock(folder):  # the same comparison may have been started twice
        measurements = measure_steps(comparison, tasks, data, console)
    if comparison.equal == "time":
        comparison = at_equal_time(comparison, measurements, len(data.train_dataloader()))
        _tell_steps(comparison, console)
    del tasks, data  # training makes its own
    if comparison.tune:
        comparison = tuned(comparison, console)
    train_missing(list(comparison.jobs()), metric, console)
    with record.run_lock(folder):
        record.remove_unfinished(folder)
        records = comparison.records()
        rows = comparison_rows(records, comparison.reference, metric, measurements, comparison.terms.reach)
        others = other_rows(records, comparison.reference, comparison.others)
        named = (comparison.name, comparison.command, comparison.reference)
        caption = write_comparison(folder, rows, records, metric, *named, others, comparison.terms)
        measured = (record.read_json(folder / MEASUREMENTS_FILE) or {}) if measurements else {}
        stored = StoredComparison(*named, metric, comparison.others, measured, records, comparison.terms)
        write_records(folder / RECORDS_FILE, stored)
        comparison.write_folders()
    console.print(for_terminal(rows, metric, comparison.name, caption, console.width, comparison.terms))
    if others:
        words = ("attention", "verdict")
        console.print(to_table(other_cells(others), words=words, title="Other metrics", caption=OTHERS_CAPTION))
    for sentence in _missing_figures(comparison):
        console.print(sentence, highlight=False, markup=False)
    console.print(f"Written: {folder}/table.csv, table.md, plot.png, report.html", highlight=False)
    for what, name in (("Picture", "plot.png"), ("Report", "report.html")):
        console.print(f"{what}: {(folder / name).absolute()}", highlight=False, markup=False, soft_wrap=True)
    return rows


def _tell_steps(comparison: Comparison, console: Console) -> None:
    """Say before training how many steps each mechanism gets."""
    terms, firsts = comparison.terms, {label: next(iter(each.values())) for label, each in comparison.runs.items()}
    steps = {label: run.config.trainer.max_steps for label, run in firsts.items() if label != comparison.reference}
    told = [f"{label} {count:,}" for label, count in {comparison.reference: terms.steps, **steps}.items()]
    kept = comparison.folder / MEASUREMENTS_FILE
    seconds = shown_seconds(terms.seconds or 0.0)
    console.print(f"steps in {seconds} of training: {', '.join(told)} (by {kept})", highlight=False, markup=False)


def _missing_figures(comparison: Comparison) -> list[str]:
    """A sentence for every metric that the records of some finished runs do not tell."""
    sentences = []
    for name in comparison.others:
        without = {
            f"{label} seed {seed}": run.folder
            for label, seed, run in comparison.jobs()
            if (known := run.read()) and known["status"] == "finished" and lacking(known, [name])
        }
        if without:
            sentences.append(f"{name} of {', '.join(without)}: {how_to_get(name, next(iter(without.values())))}")
    return sentences
