"""RESULTS.md: the tables of finished comparisons, as `compare` made them, between hand-written text.

    approx-attn results results/listops results/mqar output=RESULTS.md

A comparison stands between `<!-- comparison: <name> -->` and `<!-- end -->`. What is between is written anew from the
comparison's folder; everything else in the document is left as it is: headings, readings, and comparisons whose folders
were not given. A comparison that the document does not have yet is added at its end.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from approx_attn.command import exit_code
from approx_attn.comparison.schedule import describe_schedule
from approx_attn.comparison.statistics import paired_difference, summarise
from approx_attn.comparison.summary import SUMMARY_FILE
from approx_attn.comparison.table import show_difference, show_summary
from approx_attn.comparison.terms import EQUAL_STEPS, Terms
from approx_attn.config.instantiate import suggestion
from approx_attn.errors import ConfigError
from approx_attn.metrics import METRICS, Metric
from approx_attn.output import MISSING, require_file
from approx_attn.run import record

BASELINES = ("linformer", "performer", "nystromformer", "sliding_window", "low_rank_topk")
FAMILY = "eigen_"
END = "<!-- end -->"
OVERVIEW = "<!-- overview -->"
NO_READING = "*Reading: to be written.*"
# Keys that say where things are kept; a command without them computes the same.
PLACES = ("results", "paths.runs", "paths.run_dir", "data.cache_dir")
ABSOLUTE_PATH = re.compile(r"(?<![\w.)\]>])(?:~|file:/)?/[\w.~-][^\s,\]}'\"]*")

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
    "differences are paired by seed."
)


@dataclass(frozen=True)
class WrittenComparison:
    """A finished comparison as its folder tells it.

    Attributes:
        summary: what summary.json holds.
        table: Markdown of the table.
        caption: the sentences below the table.
        measured: environment in which step times were measured; None if they were not.
    """

    summary: dict[str, Any]
    table: str
    caption: str
    measured: dict[str, Any] | None

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
    if not arguments or any(argument in ("-h", "--help") for argument in arguments):
        print("usage: approx-attn results <folder of a comparison> ... [output=RESULTS.md]")
        return 0
    return exit_code(lambda: _write_and_report(arguments))


def _write_and_report(arguments: Sequence[str]) -> None:
    folders = [argument for argument in arguments if "=" not in argument]
    options = dict(argument.split("=", 1) for argument in arguments if argument not in folders)
    for key in options:
        if key != "output":
            raise ConfigError(f"{key} is not a key of results{suggestion(key, ['output'])}")
    if not folders:
        raise ConfigError("results needs at least one folder of a comparison, got none.")
    output = options.get("output", "RESULTS.md")
    text = write_document(require_file("output", output), [Path(folder) for folder in folders])
    print(f"Written: {output}")
    unread = text.count(NO_READING)
    if unread:
        print(f"{unread} of its comparisons have no reading yet: replace {NO_READING!r}.")


def write_document(path: Path, folders: Sequence[Path]) -> str:
    """Bring a document up to date with the comparisons in these folders; returns its text.

    Raises:
        ConfigError: a folder without a finished comparison; nothing has been written.
    """
    comparisons = [read_comparison(folder) for folder in folders]
    if len({comparison.name for comparison in comparisons}) < len(comparisons):
        raise ConfigError("results: two of the folders hold comparisons of one name; run one again with name=<other>.")
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


def read_comparison(folder: Path) -> WrittenComparison:
    """What `compare` left in a folder.

    Raises:
        ConfigError: not the folder of a comparison with at least one finished run.
    """
    summary = record.read_json(folder / SUMMARY_FILE)
    if summary is None or not summary.get("environments"):
        raise ConfigError(
            f"results: {folder} has no {SUMMARY_FILE} of finished runs; it must be a folder that compare wrote "
            "(the same command again writes it without training again)."
        )
    table, caption, *_ = (folder / "table.md").read_text(encoding="utf-8").split("\n\n")
    measured = record.read_json(folder / "measurements.json") or {}
    return WrittenComparison(summary, table, caption, measured.get("environment"))


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
    terms = Terms.from_json(summary["terms"]) if "terms" in summary else EQUAL_STEPS
    given = "" if terms == EQUAL_STEPS else f"- {terms.facts()}.\n"
    return (
        f"```\n{portable_command(summary['command'], summary['config']['name'])}\n```\n\n"
        f"- Trained: {describe_schedule(summary['config'], summary['spec'], steps)}\n{given}"
        f"- Seeds {seeds}; runs ended {_dates(summary)}; {where}{times}{commit}.\n\n"
        f"{comparison.table}\n\n{without_paths(comparison.caption)}"
    )


def portable_command(command: str, recipe: str) -> str:
    """A command line without the places of one machine: where results go is left out, other paths are named."""
    words = []
    for word in shlex.split(command):
        key, equals, value = word.partition("=")
        if equals and key in PLACES:
            continue
        # A hub id, or the name of a folder nearby, is not a place of one machine.
        if equals and key.endswith("path") and (value.startswith(("/", "~", ".")) or value.count("/") > 1):
            value = f"<{recipe} folder>" if key == "data.path" else f"<{key}>"
        words.append(without_paths(f"{key}{equals}{value}"))
    return shlex.join(words)


def without_paths(text: str) -> str:
    """Text with `<path>` for every absolute path."""
    return ABSOLUTE_PATH.sub("<path>", text)


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
    eigen = best(comparison, lambda name: name.startswith(FAMILY))
    baseline = best(comparison, lambda name: name in BASELINES)
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
    """Label of the mechanism with the best mean validation figure among those whose name belongs, None without any."""
    means = {
        label: summarise(list(figures.values())).mean
        for label, figures in comparison.summary["validation"].items()
        if figures and None not in figures.values() and belongs(label.split()[0])
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
