"""RESULTS.md: the tables of finished comparisons, as `compare` made them, between hand-written text.

    approx-attn results results/listops results/mqar output=RESULTS.md

A comparison stands between `<!-- comparison: <name> -->` and `<!-- end -->`. What is between is written anew from the
comparison's folder; everything else in the document is left as it is: headings, readings, and comparisons whose folders
were not given. A comparison that the document does not have yet is added at its end.
"""

from __future__ import annotations

import csv
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
from approx_attn.config.instantiate import suggestion
from approx_attn.errors import ConfigError
from approx_attn.metrics import METRICS, Metric
from approx_attn.output import require_file
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


@dataclass(frozen=True)
class WrittenComparison:
    """A finished comparison as its folder tells it.

    Attributes:
        summary: what summary.json holds.
        table: Markdown of the table, and the caption below it.
        rows: the lines of table.csv by mechanism.
        measured: environment in which step times were measured; None if they were not.
    """

    summary: dict[str, Any]
    table: str
    caption: str
    rows: dict[str, dict[str, str]]
    measured: dict[str, Any] | None

    @property
    def name(self) -> str:
        return str(self.summary["name"])

    @property
    def metric(self) -> Metric:
        return METRICS[self.summary["metric"]]


def main(arguments: Sequence[str]) -> int:
    """The verb `results`; returns the exit code."""
    if not arguments or any(argument in ("-h", "--help") for argument in arguments):
        print("usage: approx-attn results <folder of a comparison> ... [output=RESULTS.md]")
        return 0
    return exit_code(lambda: _write_and_report(arguments))


def _write_and_report(arguments: Sequence[str]) -> None:
    folders = [argument for argument in arguments if "=" not in argument]
    output = "RESULTS.md"
    for argument in arguments:
        key, _, value = argument.partition("=")
        if argument not in folders:
            if key != "output":
                raise ConfigError(f"{key} is not a key of results{suggestion(key, ['output'])}")
            output = value
    if not folders:
        raise ConfigError("results needs at least one folder of a comparison, got none.")
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
        text = put_block(text, OVERVIEW, overview(comparisons, known_lines(text)), "")
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
    with (folder / "table.csv").open(newline="", encoding="utf-8") as file:
        rows = {row["attention"]: row for row in csv.DictReader(file)}
    measured = record.read_json(folder / "measurements.json")
    return WrittenComparison(summary, table, caption, rows, measured and measured.get("environment"))


# -- one comparison ------------------------------------------------------------------------------------


def section(comparison: WrittenComparison) -> str:
    """The generated part of a comparison's section."""
    summary = comparison.summary
    steps = [count for by_seed in summary["steps"].values() for count in by_seed.values()]
    seeds = ", ".join(map(str, summary["seeds"]))
    facts = [
        f"Trained: {describe_schedule(summary['config'], summary['spec'], steps)}",
        f"Seeds {seeds}; runs ended {_dates(summary)}; {_machines(comparison)}{_commits(summary)}.",
    ]
    return "\n\n".join(
        [
            f"```\n{portable_command(summary['command'], summary['config']['name'])}\n```",
            "\n".join(f"- {fact}" for fact in facts),
            comparison.table,
            without_paths(comparison.caption),
        ]
    )


def portable_command(command: str, recipe: str) -> str:
    """A command line without the places of one machine: where results go is left out, other paths are named."""
    words = []
    for word in shlex.split(command):
        key, equals, value = word.partition("=")
        if equals and key in PLACES:
            continue
        if equals and key.endswith("path") and _is_place(value):
            value = f"<{recipe} folder>" if key == "data.path" else f"<{key}>"
        words.append(without_paths(f"{key}{equals}{value}"))
    return shlex.join(words)


def _is_place(value: str) -> bool:
    """Whether a path is one of this machine, and neither a hub id nor the name of a folder nearby."""
    return value.startswith(("/", "~", ".")) or value.count("/") > 1


def without_paths(text: str) -> str:
    """Text with `<path>` for every absolute path."""
    return ABSOLUTE_PATH.sub("<path>", text)


def _dates(summary: Mapping[str, Any]) -> str:
    if not summary["last_run"]:
        return "at a time not kept"
    first, last = summary["first_run"][:10], summary["last_run"][:10]
    return last if first == last else f"{first} to {last}"


def _commits(summary: Mapping[str, Any]) -> str:
    commits = dict.fromkeys(environment.get("commit") for environment in summary["environments"])
    known = [commit for commit in commits if commit]
    return f"; commit {', '.join(known)}{' and others' if None in commits else ''}" if known else ""


def _machines(comparison: WrittenComparison) -> str:
    text = f"on {_machine(comparison.summary['environments'])}"
    if comparison.measured is not None:
        measured = _machine([comparison.measured])
        text += "" if text == f"on {measured}" else f"; step times on {measured}"
    return text


def _machine(environments: Sequence[Mapping[str, Any]]) -> str:
    """The devices, threads and versions of torch that runs had."""
    devices: dict[str, set[int]] = {}
    for environment in environments:
        uses_accelerator = environment.get("accelerator") and environment.get("device", "cuda") != "cpu"
        device = environment["accelerator" if uses_accelerator else "processor"]
        threads = devices.setdefault(f"{device}, torch {environment['packages']['torch']}", set())
        if not uses_accelerator:
            threads.add(environment["torch_threads"])
    return " and ".join(f"{device}{_threads(sorted(counts))}" for device, counts in devices.items())


def _threads(counts: Sequence[int]) -> str:
    if not counts:
        return ""
    return f", {' or '.join(map(str, counts))} {'thread' if counts[-1] == 1 else 'threads'}"


# -- all of them ---------------------------------------------------------------------------------------


OVERVIEW_HEAD = f"""\
The best `{FAMILY}*` by validation figure against the best of {", ".join(f"`{name}`" for name in BASELINES)}:

| comparison | eigen | test | baseline | test | difference (95%) | in words |
|---|---|---:|---|---:|---:|---|"""
OVERVIEW_FOOT = (
    "Chosen by the mean over seeds of what the best checkpoint was kept by, so that no test figure had a part in it; "
    "differences are paired by seed."
)


def overview(comparisons: Sequence[WrittenComparison], known: Mapping[str, str]) -> str:
    """The best eigen mechanism of each comparison against the best of the baselines.

    Args:
        known: lines of comparisons that the document has already, by name.
    """
    lines = {**known, **{comparison.name: overview_line(comparison) for comparison in comparisons}}
    return "\n".join([OVERVIEW_HEAD, *lines.values(), "", OVERVIEW_FOOT])


def known_lines(text: str) -> dict[str, str]:
    """The lines of the overview of a document, by the name of their comparison; none if another rule chose them."""
    inside = text.partition(OVERVIEW)[2].partition(END)[0]
    if OVERVIEW_HEAD not in inside:
        return {}
    lines = [line for line in inside.splitlines() if line.startswith("| ")][1:]
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines}


def overview_line(comparison: WrittenComparison) -> str:
    """One comparison as a line of the overview."""
    eigen = best(comparison, lambda name: name.startswith(FAMILY))
    baseline = best(comparison, lambda name: name in BASELINES)
    if eigen is None or baseline is None:
        difference, words = "–", f"no {'eigen mechanism' if eigen is None else 'baseline'} with validation figures"
    else:
        difference, words = _compare(comparison, eigen, baseline)
    sides = [cell for label in (eigen, baseline) for cell in (label or "–", _figure(comparison, label))]
    absent = [name for name in BASELINES if not any(label.split()[0] == name for label in _finished(comparison))]
    words += f"; without {', '.join(absent)}" if absent else ""
    return f"| {comparison.name} | {' | '.join(sides)} | {difference} | {words} |"


def _finished(comparison: WrittenComparison) -> list[str]:
    return [label for label, figures in comparison.summary["figures"].items() if figures]


def best(comparison: WrittenComparison, belongs: Callable[[str], bool]) -> str | None:
    """Label of the mechanism with the best mean validation figure among those whose name belongs, None without any."""
    means = {
        label: summarise(list(figures.values())).mean
        for label, figures in comparison.summary["validation"].items()
        if figures and None not in figures.values() and belongs(label.split()[0])
    }
    if not means:
        return None
    lower_is_better = comparison.summary["validation_mode"] == "min"
    return (min if lower_is_better else max)(means, key=lambda label: means[label])


def _compare(comparison: WrittenComparison, label: str, other: str) -> tuple[str, str]:
    """The paired difference of two mechanisms and its verdict."""
    ours, theirs = (comparison.summary["figures"][name] for name in (label, other))
    shared = [seed for seed in ours if seed in theirs]
    if not shared:
        return "–", "no seed in common"
    found = paired_difference([ours[seed] for seed in shared], [theirs[seed] for seed in shared])
    metric = comparison.metric
    text = metric.show_difference(found.mean)
    better = (found.mean > 0.0) == metric.higher_is_better or found.mean == 0.0
    words = "at least as good" if better else "worse"
    if not found.has_interval:
        return text, f"{words}, {'one seed' if found.count < 2 else 'the same difference for every seed'}"
    text += f" [{metric.show_difference(found.low)}, {metric.show_difference(found.high)}]"
    return text, f"{words}, {'distinguishable' if found.distinguishable else 'not distinguishable'}"


def _figure(comparison: WrittenComparison, label: str | None) -> str:
    if label is None:
        return "–"
    figure = summarise(list(comparison.summary["figures"][label].values()))
    spread = f" ± {comparison.metric.show(figure.std)}" if figure.count > 1 else ""
    return f"{comparison.metric.show(figure.mean)}{spread}"
