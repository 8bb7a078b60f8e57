"""RESULTS.md: the tables of finished comparisons, as `compare` made them, between hand-written text.

    approx-attn results publish=[listops,mqar]
    approx-attn results

The first copies the records of two comparisons to `results/<name>.json`; both write the document anew from the records
that lie there. A comparison stands between `<!-- comparison: <name> -->` and `<!-- end -->`. Everything else in the
document is left as it is: headings, readings, and comparisons without records. A comparison that the document does not
have yet is added at its end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from approx_attn.command import as_list, run_plain, settings
from approx_attn.comparison.comparison_report import table_and_caption
from approx_attn.comparison.records_file import RECORDS_FILE, read_records, without_paths
from approx_attn.comparison.schedule import describe_schedule
from approx_attn.comparison.statistics import paired_difference, summarise
from approx_attn.comparison.summary import summarise_comparison
from approx_attn.comparison.table import show_difference, show_summary
from approx_attn.comparison.terms import EQUAL_STEPS, Terms
from approx_attn.config.instantiate import require_plain_name
from approx_attn.errors import ConfigError
from approx_attn.metrics import METRICS, Metric
from approx_attn.output import MISSING, require_file, require_folder
from approx_attn.run import record

BASELINES = ("linformer", "performer", "nystromformer", "sliding_window", "low_rank_topk")
FAMILY = "eigen_"
CONTROL = "rest=drop"  # the pairs that an eigen mechanism chooses, without the estimate that makes it one
END = "<!-- end -->"
OVERVIEW = "<!-- overview -->"
NO_READING = "*Reading: to be written.*"

NEW_DOCUMENT = f"""# Results

Every table below was made by `approx-attn compare` from the runs of one command; `approx-attn results` put it here. The
text between the tables is written by hand.

{OVERVIEW}
{END}
"""
OVERVIEW_HEAD = f"""\
The best `{FAMILY}*` by validation figure against the best of {", ".join(f"`{name}`" for name in BASELINES)}:

| comparison | eigen | test | baseline | test | difference (95%) | in words |
|---|---|---:|---|---:|---:|---|"""
OVERVIEW_FOOT = (
    "Chosen by the mean over seeds of what the best checkpoint was kept by, so that no test figure had a part in it; "
    f"differences are paired by seed. `{CONTROL}` is a control, not an eigen mechanism."
)


@dataclass(frozen=True)
class WrittenComparison:
    """A finished comparison as its records tell it.

    Attributes:
        summary: of `summarise_comparison`.
        table: Markdown of the table.
        caption: the sentences below the table.
        measured: environment in which step times were measured; None if they were not.
        terms: what was equal, and how learning rates were chosen.
    """

    summary: dict[str, Any]
    table: str
    caption: str
    measured: dict[str, Any] | None
    terms: Terms = EQUAL_STEPS

    @property
    def name(self) -> str:
        return str(self.summary["name"])

    @property
    def metric(self) -> Metric:
        return METRICS[self.summary["metric"]]

    def figures(self, label: str) -> dict[str, float]:
        """Seed -> test figure of a mechanism."""
        return self.summary["figures"][label]  # type: ignore[no-any-return]


def main(arguments: Sequence[str]) -> int:
    """The verb `results`; returns the exit code."""
    return run_plain("results", lambda: _run(arguments), arguments)


def _run(arguments: Sequence[str]) -> None:
    folders = [Path(argument) for argument in arguments if "=" not in argument]
    given = settings("results", [argument for argument in arguments if "=" in argument])
    results = Path(given["results"])
    output = require_file("output", given["output"])
    if folders and (given["publish"] or given["report"]):
        raise ConfigError("results: publish and report take names of comparisons, and no folders beside them.")
    if given["report"]:
        _draw_reports(results, as_list(given["report"]))
        return
    names = as_list(given["publish"] or [])
    copies = {results / f"{require_plain_name('publish', name)}.json": _records_of(results / name) for name in names}
    for path, text in copies.items():
        record.write_text_atomically(path, text)
        print(f"Written: {path}")
    comparisons = [read_comparison(folder) for folder in folders] or published(results)
    text = write_document(output, comparisons)
    print(f"Written: {output}")
    known = {comparison.name for comparison in comparisons}
    without = [name for name in re.findall(r"<!-- comparison: (.+) -->", text) if name not in known]
    if without:
        print(f"As they were, for want of records: {', '.join(without)}")
    unread = text.count(NO_READING)
    if unread:
        print(f"{unread} of its comparisons have no reading yet: replace {NO_READING!r}.")


def _records_of(folder: Path) -> str:
    """The records of a finished comparison, as text."""
    read_comparison(folder)
    return (folder / RECORDS_FILE).read_text(encoding="utf-8")


def _draw_reports(results: Path, names: Sequence[str]) -> None:
    """Write table, plots and report of published comparisons."""
    stored = {name: read_records(results / f"{require_plain_name('report', name)}.json") for name in names}
    for name in names:
        require_folder("report", results / name)
    for name, comparison in stored.items():
        comparison.write_report(results / name)
        print(f"Written: {results / name}/table.csv, table.md, plot.png, report.html")


def published(results: Path) -> list[WrittenComparison]:
    """The comparisons whose records are published in a folder, by name.

    Raises:
        ConfigError: there are none, or a file there holds something else.
    """
    paths = sorted(results.glob("*.json"))
    if not paths:
        raise ConfigError(
            f"results: {results} holds no published records (<name>.json); publish=[<name>] puts those of a finished "
            "comparison there."
        )
    return [read_comparison(path) for path in paths]


def write_document(path: Path, comparisons: Sequence[WrittenComparison]) -> str:
    """Bring a document up to date with these comparisons; returns its text.

    Raises:
        ConfigError: two comparisons of one name, or a mark without its end; nothing has been written.
    """
    if len({comparison.name for comparison in comparisons}) < len(comparisons):
        raise ConfigError("results: two of the comparisons have one name; run one again with name=<other>.")
    text = path.read_text(encoding="utf-8") if path.is_file() else NEW_DOCUMENT
    for comparison in comparisons:
        text = put_block(text, f"<!-- comparison: {comparison.name} -->", section(comparison), comparison.name)
    if OVERVIEW in text:
        lines = known_lines(text) | {comparison.name: overview_line(comparison) for comparison in comparisons}
        text = put_block(text, OVERVIEW, "\n".join([OVERVIEW_HEAD, *lines.values(), "", OVERVIEW_FOOT]), "")
    record.write_text_atomically(path, text)
    return text


def put_block(text: str, start: str, content: str, title: str) -> str:
    """Replace what is between `start` and the next end mark, or add a section with it at the end of the text."""
    block = f"{start}\n{content.strip()}\n{END}"
    if start not in text:
        return f"{text.rstrip()}\n\n## {title}\n\n{block}\n\n{NO_READING}\n"
    before, _, rest = text.partition(start)
    inside, found, after = rest.partition(END)
    if not found or "<!-- comparison:" in inside:
        raise ConfigError(f"results: the document has {start!r} without a {END!r} behind it.")
    return before + block + after


def read_comparison(path: Path) -> WrittenComparison:
    """A finished comparison from the folder that `compare` wrote, or from a file of records.

    Raises:
        ConfigError: neither of both, or no run of it finished.
    """
    comparison = read_records(path / RECORDS_FILE if path.is_dir() else path)
    metric, records, reference = comparison.metric, comparison.records, comparison.reference
    summary = summarise_comparison(
        records, metric=metric, name=comparison.name, command=comparison.command, reference=reference
    )
    if not summary["environments"]:
        raise ConfigError(f"results: no run of {path} has finished; the same compare command tries again.")
    table, caption = table_and_caption(comparison.rows(), records, metric, reference, comparison.terms)
    return WrittenComparison(
        summary, table.strip(), caption, comparison.measurements.get("environment"), comparison.terms
    )


# -- one comparison ------------------------------------------------------------------------------------


def section(comparison: WrittenComparison) -> str:
    """The generated part of a comparison's section."""
    summary = comparison.summary
    steps = [count for by_seed in summary["steps"].values() for count in by_seed.values()]
    where = f"on {_machine(summary['environments'])}"
    measured = "" if comparison.measured is None else f"on {_machine([comparison.measured])}"
    times = f"; step times {measured}" if measured not in ("", where) else ""
    commits = dict.fromkeys(environment.get("commit") for environment in summary["environments"])
    known = ", ".join(filter(None, commits))
    commit = f"; commit {known}{' and others' if None in commits else ''}" if known else ""
    seeds = ", ".join(map(str, summary["seeds"]))
    given = "" if replace(comparison.terms, reach=None) == EQUAL_STEPS else f"- {comparison.terms.facts()}.\n"
    return (
        f"```\n{summary['command']}\n```\n\n"
        f"- Trained: {describe_schedule(summary['config'], summary['spec'], steps)}\n{given}"
        f"- Seeds {seeds}; runs ended {_dates(summary)}; {where}{times}{commit}.\n\n"
        f"{comparison.table}\n\n{without_paths(comparison.caption)}"
    )


def _dates(summary: Mapping[str, Any]) -> str:
    if not summary["last_run"]:
        return "at a time not kept"
    return " to ".join(dict.fromkeys(summary[key][:10] for key in ("first_run", "last_run")))


def _machine(environments: Sequence[Mapping[str, Any]]) -> str:
    """The devices, threads and versions of torch that runs had."""
    devices: dict[str, set[int]] = {}
    for environment in environments:
        on_accelerator = environment.get("accelerator") and environment.get("device", "cuda") != "cpu"
        device = environment["accelerator" if on_accelerator else "processor"]
        threads = devices.setdefault(f"{device}, torch {environment['packages']['torch']}", set())
        if not on_accelerator:
            threads.add(environment["torch_threads"])
    parts = []
    for device, counts in devices.items():
        numbers = " or ".join(map(str, sorted(counts)))
        parts.append(f"{device}, {numbers} {'thread' if max(counts) == 1 else 'threads'}" if counts else device)
    return " and ".join(parts)


# -- all of them ---------------------------------------------------------------------------------------


def known_lines(text: str) -> dict[str, str]:
    """The lines of the overview of a document, by the name of their comparison; none if another rule chose them."""
    inside = text.partition(OVERVIEW)[2].partition(END)[0]
    if OVERVIEW_HEAD not in inside:
        return {}
    lines = [line for line in inside.splitlines() if line.startswith("| ")][1:]
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines}


def overview_line(comparison: WrittenComparison) -> str:
    """The best eigen mechanism of a comparison against the best of the baselines."""
    eigen = best(comparison, lambda label: label.startswith(FAMILY) and CONTROL not in label.split())
    baseline = best(comparison, lambda label: label.split()[0] in BASELINES)
    if eigen is None or baseline is None:
        difference, words = MISSING, f"no {'eigen mechanism' if eigen is None else 'baseline'} with validation figures"
    else:
        difference, words = _compare(comparison, eigen, baseline)
    cells = [comparison.name]
    for label in (eigen, baseline):
        figure = None if label is None else summarise(list(comparison.figures(label).values()))
        cells += [label or MISSING, show_summary(figure, comparison.metric)]
    ran = {label.split()[0] for label, figures in comparison.summary["figures"].items() if figures}
    absent = ", ".join(name for name in BASELINES if name not in ran)
    return f"| {' | '.join([*cells, difference, words])}{f'; without {absent}' if absent else ''} |"


def best(comparison: WrittenComparison, belongs: Callable[[str], bool]) -> str | None:
    """Label of the mechanism with the best mean validation figure among those that belong, None without any."""
    means = {
        label: summarise(list(figures.values())).mean
        for label, figures in comparison.summary["validation"].items()
        if figures and None not in figures.values() and belongs(label)
    }
    choose = min if comparison.summary["validation_mode"] == "min" else max
    return choose(means, key=lambda label: means[label], default=None)


def _compare(comparison: WrittenComparison, label: str, other: str) -> tuple[str, str]:
    """The paired difference of two mechanisms and its verdict."""
    ours, theirs = comparison.figures(label), comparison.figures(other)
    shared = [seed for seed in ours if seed in theirs]
    if not shared:
        return MISSING, "no seed in common"
    found = paired_difference([ours[seed] for seed in shared], [theirs[seed] for seed in shared])
    words = "worse" if (found.mean > 0.0) != comparison.metric.higher_is_better and found.mean else "at least as good"
    if found.has_interval:
        sure = "distinguishable" if found.distinguishable else "not distinguishable"
    else:
        sure = "one seed" if found.count < 2 else "the same difference for every seed"
    return show_difference(found, comparison.metric), f"{words}, {sure}"
