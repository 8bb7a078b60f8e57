"""The records of a comparison in one small file, all that its table, its part of RESULTS.md and its report are made of.

`compare` writes it into its folder, and `approx-attn results publish=[<name>]` copies it to `results/<name>.json`, for
version control. It holds no weights, no predictions (but how often a run and the reference disagreed) and no place of
the machine.

Runs of a comparison are much alike, so the first stands there whole and every other as its difference from another:
from the first finished run of its mechanism, or, where there is none before it, of all. Test figures, costs and times
are not rounded.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from approx_attn.comparison.aggregate import (
    Record,
    Records,
    StepMeasurement,
    comparison_rows,
    disagreements,
    other_rows,
)
from approx_attn.comparison.comparison_report import write_comparison
from approx_attn.comparison.summary import ended
from approx_attn.comparison.table import ComparisonRow
from approx_attn.comparison.terms import EQUAL_STEPS, Terms
from approx_attn.comparison.validation_curves import validation_curve
from approx_attn.errors import ConfigError
from approx_attn.metrics import Metric, metric_of
from approx_attn.run import record

RECORDS_FILE = "records.json"
ABSENT = "-"  # in a difference, the keys that are not there
# Keys that say where things are kept; a command without them computes the same.
PLACES = ("results", "paths.runs", "paths.run_dir", "data.cache_dir")
ABSOLUTE_PATH = re.compile(r"(?<![\w.)\]>])(?:~|file:/)?/[\w.~-][^\s,\]}'\"]*")


@dataclass(frozen=True)
class StoredComparison:
    """A comparison as its file tells it.

    Attributes:
        name: of the comparison.
        command: what to type to get it again.
        reference: label that differences and ratios are relative to.
        metric: the test figure that is compared.
        others: names of the other metrics that have a table.
        measurements: the measured training `steps` by mechanism and the `environment` of that; empty if none were.
        records: of all runs, each with the time at which it `ended` (UTC), its validation `curve` (step and figure) and
            its `disagreement` with the reference, as far as these are known.
        terms: what was equal, and how learning rates were chosen.
    """

    name: str
    command: str
    reference: str
    metric: Metric
    others: tuple[str, ...]
    measurements: Mapping[str, Any]
    records: Records
    terms: Terms = EQUAL_STEPS

    def rows(self) -> list[ComparisonRow]:
        """The table."""
        steps = {label: StepMeasurement(**each) for label, each in self.measurements.get("steps", {}).items()}
        return comparison_rows(self.records, self.reference, self.metric, steps, self.terms.reach)

    def write_report(self, folder: Path) -> None:
        """Write table, plots and report as `compare` does."""
        others = other_rows(self.records, self.reference, self.others)
        named = (self.name, self.command, self.reference)
        write_comparison(folder, self.rows(), self.records, self.metric, *named, others, self.terms)


def write_records(path: Path, comparison: StoredComparison) -> None:
    """Write the file of a comparison, whose records may still lie in the folders of their runs."""
    shown = _portable_labels(comparison.records)
    reference = comparison.records[comparison.reference]
    measured_steps = comparison.measurements.get("steps", {})  # also of mechanisms that were compared here before
    steps = {label: each for label, each in measured_steps.items() if label in shown}
    environment = comparison.measurements.get("environment")
    kept = {
        shown[label]: {part.name: each[part.name] for part in fields(StepMeasurement)} for label, each in steps.items()
    }
    measured = {"steps": kept, "environment": environment}
    head = {
        "name": comparison.name,
        "command": portable_command(comparison.command, _recipe(comparison.records)),
        "metric": comparison.metric.name,
        "reference": shown[comparison.reference],
        "others": list(comparison.others),
        "measurements": measured if steps else {},
        "terms": comparison.terms.renamed(shown).to_json(),
    }
    whole: dict[str, dict[int, Record | None]] = {}
    for label, by_seed in comparison.records.items():
        differing = disagreements(by_seed, reference) if label != comparison.reference else {}
        known = {seed: {"disagreement": list(each)} for seed, each in differing.items()}
        whole[shown[label]] = {
            seed: run and {**_portable_run(run, seed, comparison.metric), **known.get(seed, {})}
            for seed, run in by_seed.items()
        }
    record.write_text_atomically(
        path, _as_text(head, _each_by_its_base(whole, lambda run, base: (difference(run, base), run)))
    )


def read_records(path: Path) -> StoredComparison:
    """The comparison in a file.

    Raises:
        ConfigError: the file is missing or damaged, or holds something else.
    """
    content = record.read_json(path) or {}
    try:
        head = {key: content[key] for key in ("name", "command", "reference", "measurements")}
        metric, others = str(content["metric"]), tuple(content["others"])
        terms = Terms.from_json(content["terms"])
        runs = _each_by_its_base(content["runs"], lambda run, base: 2 * (restored(run, base),))
        records = {
            label: {int(seed): _with_command(run, seed) for seed, run in each.items()} for label, each in runs.items()
        }
        if head["reference"] not in records:
            raise KeyError(head["reference"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"results: {path} does not hold the records of a comparison, as compare writes them; the same compare "
            "command again writes them without training again."
        ) from error
    return StoredComparison(**head, metric=metric_of(metric), others=others, records=records, terms=terms)


# -- runs as differences -------------------------------------------------------------------------------


Told = Callable[[Any, Record | None], tuple[Any, Record]]


def _each_by_its_base(runs: Mapping[str, Mapping[Any, Any]], convert: Told) -> dict[str, dict[Any, Any]]:
    """Runs converted one after the other, None where there is none.

    Args:
        convert: from a run and the record that it is told by (None for the first) to the result and its whole record.
    """
    first_of_all: Record | None = None
    converted: dict[str, dict[Any, Any]] = {}
    for label, by_seed in runs.items():
        first: Record | None = None
        converted[label] = {}
        for seed, run in by_seed.items():
            converted[label][seed], whole = (None, None) if run is None else convert(run, first or first_of_all)
            if whole and whole.get("status") == "finished":  # what a failed run tells is too little to tell others by
                first = first or whole
        first_of_all = first_of_all or first
    return converted


def difference(value: Any, base: Any) -> Any:
    """What turns `base` into `value`: of mappings the keys that differ, and a list of those that are `ABSENT`."""
    if not isinstance(value, Mapping):
        return value
    base = base if isinstance(base, Mapping) else {}
    # As text, since 1, 1.0 and True are equal and are not the same.
    changed = {key: each for key, each in value.items() if key not in base or _line(each) != _line(base[key])}
    told = {key: difference(each, base.get(key)) for key, each in changed.items()}
    absent = [key for key in base if key not in value]
    return {**told, ABSENT: absent} if absent else told


def restored(told: Any, base: Any) -> Any:
    """The value of a `difference` from `base`."""
    if not isinstance(told, Mapping):
        return told
    absent = told.get(ABSENT, ())
    kept = {key: each for key, each in base.items() if key not in absent} if isinstance(base, Mapping) else {}
    return {**kept, **{key: restored(each, kept.get(key)) for key, each in told.items() if key != ABSENT}}


def _as_text(head: Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]]) -> str:
    """JSON with one line per run, which version control compares line by line."""
    lines = [f"{_line(key)}: {_line(value)}" for key, value in head.items()]
    blocks = [
        f"{_line(label)}: {{\n"
        + ",\n".join(f"{_line(str(seed))}: {_line(run)}" for seed, run in by_seed.items())
        + "\n}"
        for label, by_seed in runs.items()
    ]
    lines.append('"runs": {\n' + ",\n".join(blocks) + "\n}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# -- nothing of the machine's places -------------------------------------------------------------------


def portable_command(command: str, recipe: str) -> str:
    """A command line without the places of one machine: where results go is left out, other paths are named."""
    words = []
    for word in shlex.split(command):
        key, equals, value = word.partition("=")
        if not equals or key not in PLACES:
            words.append(f"{key}{equals}{_portable_value(value, key, recipe)}" if equals else without_paths(word))
    return shlex.join(words)


def without_paths(text: str) -> str:
    """Text with `<path>` for every absolute path."""
    return ABSOLUTE_PATH.sub("<path>", text)


def _portable_value(value: str, key: str, recipe: str) -> str:
    # A hub id, or the name of a folder nearby, is not a place of one machine.
    if key.endswith("path") and (value.startswith(("/", "~", ".")) or value.count("/") > 1):
        return f"<{recipe} folder>" if key == "data.path" else f"<{key}>"
    return without_paths(value)


def _portable_run(run: Record, seed: int, metric: Metric) -> Record:
    """A run's record with what was read from its folder in place of the folder."""
    recipe = str(run.get("name"))
    # Records of earlier versions have no history. Its figures are float32, which seven digits tell.
    known = {} if run.get("history") else validation_curve(run, metric)
    curve = [[step, float(f"{value:.7g}")] for step, value in known.items()]
    beside = {"ended": ended(run), "curve": curve}
    kept = {**run, **{key: value for key, value in beside.items() if value}}
    # The same words for every seed, so that they are written once.
    command = re.sub(rf"(?<!\S)seed={seed}(?!\S)", "seed=<seed>", portable_command(run["command"], recipe))
    kept = {key: value for key, value in kept.items() if key not in ("command", "run_dir")}
    config = {"config": _portable(kept.pop("config"), "", recipe)} if "config" in kept else {}
    return {**_portable(kept, "", recipe), **config, "command": command}


def _with_command(run: Record | None, seed: str) -> Record | None:
    return run and {**run, "command": run["command"].replace("<seed>", seed)}


def _portable(value: Any, key: str, recipe: str) -> Any:
    if isinstance(value, Mapping):
        return {name: _portable(each, f"{key}.{name}" if key else str(name), recipe) for name, each in value.items()}
    if isinstance(value, list):
        return [_portable(each, key, recipe) for each in value]
    if not isinstance(value, str):
        return value
    return f"<{key}>" if key in PLACES else _portable_value(value, key, recipe)


def _portable_labels(records: Records) -> dict[str, str]:
    """Label -> label with names of files in place of their paths, as long as that tells the mechanisms apart."""
    short = {label: ABSOLUTE_PATH.sub(lambda path: Path(path[0]).name, label) for label in records}
    return short if len(set(short.values())) == len(short) else {label: label for label in records}


def _recipe(records: Records) -> str:
    names = (run["name"] for by_seed in records.values() for run in by_seed.values() if run and "name" in run)
    return next(names, "data")
