"""Comparisons: train what is missing of mechanisms × seeds, skip what is done, and write one table.

    compare(["data=digits", "attention=[exact,eigen_row,topk]", "seeds=[1,2,3]"])

A comparison is a list of variants (a mechanism with options) and seeds over one training configuration. Its runs
are ordinary runs, found by their configuration, so that comparisons share them and an interrupted one goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import Tensor

from approx_attn.attention.registry import attention_options, available_attention
from approx_attn.command import run_plain
from approx_attn.comparison.aggregate import OtherRows, StepMeasurement, comparison_rows, other_rows
from approx_attn.comparison.comparison_report import write_comparison
from approx_attn.comparison.table import ComparisonRow, others_to_rich, to_rich, wide_console
from approx_attn.config.compose import ConfigError, compose_config, config_dir, parse_overrides, plain
from approx_attn.config.instantiate import require_plain_name, suggestion
from approx_attn.config.trust import plugin_words
from approx_attn.data.base import SequenceDataModule
from approx_attn.errors import Unsuccessful, require_count
from approx_attn.metrics import DEFAULT, METRICS, Metric, metric_names
from approx_attn.output import require_folder
from approx_attn.run import record
from approx_attn.run import train as training
from approx_attn.run.measurement import peak_memory, time_alternately
from approx_attn.run.steps import Precision, autocast_of, device_of, silent, training_step
from approx_attn.run.stored_metrics import how_to_get, lacking, with_metrics
from approx_attn.run.tasks.base import SequenceTask
from approx_attn.run.trainer import quiet


@dataclass(frozen=True)
class Variant:
    """A mechanism with the options that set it apart from the other rows of a table."""

    attention: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        return " ".join([self.attention, *self._settings()])

    @property
    def overrides(self) -> list[str]:
        return [f"attention={self.attention}", *(f"attention.{setting}" for setting in self._settings())]

    def _settings(self) -> list[str]:
        return [f"{key}={'null' if value is None else value}" for key, value in self.options]


@dataclass(frozen=True)
class Run:
    """One training run of a comparison: the words that select it, and the configuration they give."""

    overrides: list[str]
    config: DictConfig

    @classmethod
    def compose(cls, overrides: list[str]) -> Run:
        return cls(overrides, compose_config([*overrides, "resume=true", "progress_bar=false"]))

    @property
    def command(self) -> str:
        return shlex.join(["python", "scripts/train.py", *plugin_words(), *self.overrides])

    @property
    def folder(self) -> Path:
        return training.run_folder(plain(self.config))

    def read(self) -> dict[str, Any] | None:
        """The record of the run with where it lies and how to get it, or None if it has not ended."""
        result = record.read_result(self.folder)
        if result is None:
            return None
        if result["status"] == "finished":
            result = with_metrics(result, self.folder, self.metrics)
        return {**result, "run_dir": str(self.folder), "command": self.command}

    @property
    def metrics(self) -> tuple[str, ...]:
        return metric_names(self.config.get("metrics"))


@dataclass(frozen=True)
class Comparison:
    """What is compared, ready to run.

    Attributes:
        name: folder below the results folder.
        runs: variant label -> seed -> run.
        reference: label that differences and ratios are relative to.
        metric: the test figure that is compared.
        others: the other test figures that are, in a table of their own.
        folder: where the table goes.
        command: what to type to get it again.
        repeats, warm_up: measured and unmeasured rounds of training steps; without repeats none are measured.
    """

    name: str
    runs: dict[str, dict[int, Run]]
    reference: str
    metric: Metric
    others: tuple[str, ...]
    folder: Path
    command: str
    repeats: int
    warm_up: int


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
    require_folder("results", comparison.folder)
    for run in (run for by_seed in comparison.runs.values() for run in by_seed.values()):
        if not record.is_finished(run.folder):
            require_folder("paths.runs", run.folder)
    with quiet():
        tasks, data = _build_all(comparison)  # refuses what cannot run before the first step
    _train_missing(comparison, console)
    with record.run_lock(comparison.folder):  # the same comparison may have been started twice
        record.remove_unfinished(comparison.folder)
        measurements = _measure(comparison, tasks, data, console)
        rows, others, caption = _write(comparison, measurements)
        missing_figures = _missing_figures(comparison)
    console.print(to_rich(rows, comparison.metric, comparison.name, caption, console.width))
    if others:
        console.print(others_to_rich(others))
    for sentence in missing_figures:
        console.print(sentence, highlight=False, markup=False)
    console.print(f"Written: {comparison.folder}/table.csv, table.md, plot.png, report.html", highlight=False)
    return rows


def _write(
    comparison: Comparison, measurements: Mapping[str, StepMeasurement]
) -> tuple[list[ComparisonRow], OtherRows, str]:
    """Make the tables of what has been run, with all that belongs to them; returns their rows and the caption."""
    metric = comparison.metric.name
    records = {
        label: {seed: _with_figure(run.read(), metric) for seed, run in by_seed.items()}
        for label, by_seed in comparison.runs.items()
    }
    rows = comparison_rows(records, comparison.reference, metric, measurements)
    others = other_rows(records, comparison.reference, comparison.others)
    caption = write_comparison(
        comparison.folder,
        rows,
        records,
        comparison.metric,
        comparison.name,
        comparison.command,
        comparison.reference,
        others,
    )
    return rows, others, caption


def _missing_figures(comparison: Comparison) -> list[str]:
    """A sentence for every metric that the records of some finished runs do not tell."""
    sentences = []
    for name in comparison.others:
        without = {
            f"{label} seed {seed}": run.folder
            for label, by_seed in comparison.runs.items()
            for seed, run in by_seed.items()
            if (known := run.read()) and known["status"] == "finished" and lacking(known, [name])
        }
        if without:
            sentences.append(f"{name} of {', '.join(without)}: {how_to_get(name, next(iter(without.values())))}")
    return sentences


def _with_figure(result: dict[str, Any] | None, metric: str) -> dict[str, Any] | None:
    """A record, or in place of one that lacks the figure one that says so."""
    if result is None or result["status"] != "finished" or not lacking(result, [metric]):
        return result
    return {**result, "status": "failed", "error": f"{metric}: {how_to_get(metric, result['run_dir'])}"}


# -- from words to configurations ----------------------------------------------------------------------


def plan(arguments: Sequence[str]) -> Comparison:
    """Read a command line into the runs that it asks for.

    Raises:
        ConfigError: one sentence that names the key.
    """
    own, passed_on = _split(arguments)
    settings = _settings(own)
    seeds = _checked_seeds(settings["seeds"])
    metric = settings["metric"]
    if metric not in METRICS:
        raise ConfigError(f"metric={metric!r} is unknown{suggestion(str(metric), METRICS)}")
    if METRICS[metric].per_class:
        raise ConfigError(f"metric={metric} is one figure per class; metrics=[{metric}] shows them beside another.")
    asked = metric_names(next((item.value() for item in passed_on if item.key_or_group == "metrics"), None))
    variants = _expand([_read_variant(entry) for entry in _as_list(settings["attention"])], passed_on)
    reference = _checked_reference(settings["reference"], variants)
    common = [str(item.input_line) for item in passed_on if not _is_option(item)]
    if METRICS[metric].compute is not None and metric not in asked:
        common.append(f"metrics=[{','.join([*asked, metric])}]")
    runs = {
        variant.label: {seed: Run.compose([*common, *variant.overrides, f"seed={seed}"]) for seed in seeds}
        for variant in variants
    }
    first = next(iter(next(iter(runs.values())).values()))
    name = settings["name"] or f"{first.config.name}-{_fingerprint(runs)}"
    return Comparison(
        name=require_plain_name("name", name),
        runs=runs,
        reference=reference,
        metric=METRICS[metric],
        others=tuple(name for name in asked if name != metric) if asked != DEFAULT else (),
        folder=Path(settings["results"]) / str(name),
        command=shlex.join(["python", "scripts/compare.py", *plugin_words(), *arguments]),
        repeats=_checked_count("measure.repeats", settings["measure"]["repeats"]),
        warm_up=_checked_count("measure.warm_up", settings["measure"]["warm_up"]),
    )


def _settings(overrides: Sequence[Override] = ()) -> dict[str, Any]:
    """compare.yaml with its overrides. Not composed by Hydra, to which `attention=[a,b]` would be one mechanism."""
    settings = cast(DictConfig, OmegaConf.load(config_dir() / "compare.yaml"))
    for item in overrides:
        if OmegaConf.select(settings, item.key_or_group, default=item) is item:
            siblings = OmegaConf.select(settings, item.key_or_group.rpartition(".")[0] or "measure")
            raise ConfigError(f"{item.key_or_group} is not a key of compare{suggestion(item.key_or_group, siblings)}")
        if item.is_sweep_override():
            raise ConfigError(f"{item.key_or_group} takes a list: {item.key_or_group}=[...].")
        OmegaConf.update(settings, item.key_or_group, item.value())
    return plain(settings)


def _split(arguments: Sequence[str]) -> tuple[list[Override], list[Override]]:
    """Overrides of compare.yaml, and those that go on to the training runs."""
    overrides = parse_overrides(arguments)
    own_keys = set(_settings())
    own = [item for item in overrides if item.key_or_group.split(".")[0] in own_keys and not _is_option(item)]
    passed_on = [item for item in overrides if item not in own]
    for item in passed_on:
        if item.key_or_group == "seed":
            raise ConfigError("seed is set by the comparison; write seeds=[...].")
        if item.key_or_group == "paths.run_dir":
            raise ConfigError(
                "paths.run_dir is the folder of one run, and a comparison has several; write paths.runs=."
            )
        if item.key_or_group == "extend":
            raise ConfigError("extend trains one run longer; a longer comparison has a larger trainer.max_epochs.")
        if item.key_or_group in ("launcher", "hydra/launcher"):
            raise ConfigError(
                f"{item.key_or_group} is not used by compare, which trains one run after the other; start the runs "
                "with train -m launcher=... resume=true, and compare finds them."
            )
        if item.key_or_group == "resume" and item.value() is not True:
            raise ConfigError(f"resume must be true in compare, which finds what has been run, got {item.value()!r}.")
        if item.is_sweep_override() and not _is_option(item):
            raise ConfigError(f"{item.key_or_group} cannot be swept in a comparison; only attention options can.")
    return own, passed_on


def _is_option(item: Override) -> bool:
    return item.key_or_group.startswith("attention.")


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def _read_variant(entry: Any) -> Variant:
    """A name, or a mapping with `name` and options."""
    if isinstance(entry, str):
        entry = {"name": entry}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        raise ConfigError(f"attention entries must be names or mappings with a name, got {entry!r}.")
    if entry["name"] not in available_attention():
        raise ConfigError(f"attention={entry['name']} is unknown{suggestion(entry['name'], available_attention())}")
    known = attention_options(entry["name"])
    options = {str(key): value for key, value in entry.items() if key != "name"}
    for key in options:
        if key not in known:
            raise ConfigError(f"attention.{key} is not an option of {entry['name']}{suggestion(key, known)}")
    return Variant(entry["name"], tuple(options.items()))


def _expand(variants: list[Variant], overrides: Sequence[Override]) -> list[Variant]:
    """Apply `attention.<option>=...` to the mechanisms that have the option; several values multiply them."""
    for item in filter(_is_option, overrides):
        option = item.key_or_group.partition(".")[2]
        takers = [variant for variant in variants if option in attention_options(variant.attention)]
        if not takers:
            known = {key for variant in variants for key in attention_options(variant.attention)}
            raise ConfigError(f"attention.{option} is not an option of any of them{suggestion(option, known)}")
        values = list(item.sweep_string_iterator()) if item.is_sweep_override() else [item.get_value_element_as_str()]
        variants = [
            replaced
            for variant in variants
            for replaced in (_with_option(variant, option, values) if variant in takers else [variant])
        ]
    labels = [variant.label for variant in variants]
    if len(set(labels)) < len(labels):
        raise ConfigError(f"attention must not name the same thing twice, got {labels}.")
    return variants


def _with_option(variant: Variant, option: str, values: Sequence[str]) -> list[Variant]:
    if option in dict(variant.options):
        return [variant]  # what an entry sets itself stays
    return [replace(variant, options=(*variant.options, (option, value))) for value in values]


def _checked_seeds(seeds: Any) -> list[int]:
    seeds = _as_list(seeds)
    if not seeds or len(set(seeds)) < len(seeds) or any(isinstance(s, bool) or not isinstance(s, int) for s in seeds):
        raise ConfigError(f"seeds must be a list of different whole numbers, got {seeds!r}.")
    return seeds


def _checked_count(key: str, value: Any) -> int:
    try:
        return require_count(key, value, 0)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _checked_reference(reference: Any, variants: Sequence[Variant]) -> str:
    labels = [variant.label for variant in variants]
    matching = [v.label for v in variants if reference in (v.label, v.attention)]
    if not matching:
        raise ConfigError(f"reference={reference!r} is not among the compared{suggestion(str(reference), labels)}")
    return matching[0]


def _fingerprint(runs: Mapping[str, Mapping[int, Run]]) -> str:
    """Six hexadecimal digits of what is compared."""
    hashes = sorted(
        f"{record.config_hash(plain(run.config))}-{seed}" for by_seed in runs.values() for seed, run in by_seed.items()
    )
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:6]


# -- running -------------------------------------------------------------------------------------------


def _build_all(comparison: Comparison) -> tuple[dict[str, SequenceTask], SequenceDataModule]:
    """Every variant's task on the data of the first, so that a mechanism that cannot be used is refused now."""
    firsts = {label: next(iter(by_seed.values())).config for label, by_seed in comparison.runs.items()}
    modules = [training.check_run(config) for config in firsts.values()]
    data = modules[0]
    training.make_splits(data)
    tasks: dict[str, SequenceTask] = {}
    for label, config in firsts.items():
        container = training.check_config(config)
        pl.seed_everything(container["seed"], workers=True, verbose=False)
        tasks[label] = training.build_task(container, data.spec)
        training.warm_start(tasks[label], container)
        training.compile_model(tasks[label], container)
    return tasks, data


def _train_missing(comparison: Comparison, console: Console) -> None:
    """Train the runs without a finished record; a failing run is recorded and the others go on.

    A signal or a full disk ends the comparison; the same command continues it.
    """
    jobs = [(label, seed, run) for label, by_seed in comparison.runs.items() for seed, run in by_seed.items()]
    for number, (label, seed, run) in enumerate(jobs, start=1):
        head = f"[{number}/{len(jobs)}] {label} seed {seed}"
        known = run.read()
        if known is not None and known["status"] == "finished":
            console.print(f"{head}: done before, {_figure(known, comparison.metric)}", highlight=False, markup=False)
            continue
        started = time.perf_counter()
        with console.status(f"{head} ..."):
            try:
                result: dict[str, Any] = training.train(run.config).record
            except ConfigError:
                raise
            except Exception as error:
                if record.is_disk_full(error):
                    raise  # as it would be for every run to come
                result = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        outcome = _figure(result, comparison.metric) if result["status"] == "finished" else f"FAILED: {result['error']}"
        seconds = time.perf_counter() - started
        console.print(f"{head}: {outcome} ({seconds:.0f} s)", highlight=False, markup=False)


def _figure(result: Mapping[str, Any], metric: Metric) -> str:
    if f"test/{metric.name}" not in result["metrics"]:
        return f"no {metric.name}"
    return f"test {metric.header} {metric.show(result['metrics'][f'test/{metric.name}'])}"


def _measure(
    comparison: Comparison, tasks: Mapping[str, SequenceTask], data: SequenceDataModule, console: Console
) -> dict[str, StepMeasurement]:
    """Time and memory of one training step of every variant, in turns, on the same batch, on one of their devices.

    Kept beside the table: measured again only when the compared runs change.
    """
    if comparison.repeats == 0:
        return {}
    path = comparison.folder / "measurements.json"
    config = plain(next(iter(comparison.runs[comparison.reference].values())).config)
    device = device_of(config)
    wanted = {"fingerprint": _fingerprint(comparison.runs), "repeats": comparison.repeats, "device": str(device)}
    known = record.read_json(path)
    if known is not None and {key: known.get(key) for key in wanted} == wanted:
        return {label: StepMeasurement(**fields) for label, fields in known["steps"].items()}
    with console.status("measuring training steps in turns ..."), quiet():
        batch = {key: value.to(device) for key, value in next(iter(data.train_dataloader())).items()}
        precision = autocast_of(config, device)
        steps = {label: _step_of(task.to(device), batch, precision) for label, task in tasks.items()}
        timings = time_alternately(steps, comparison.repeats, comparison.warm_up)
        base = timings[comparison.reference]
        measured = {
            label: StepMeasurement(
                relative_time=timing.relative_to(base),
                spread=timing.spread_relative_to(base) / 2,
                seconds=timing.median,
                memory=_peak_memory(tasks[label], steps[label], device),
            )
            for label, timing in timings.items()
        }
    content = {**wanted, "steps": {label: asdict(m) for label, m in measured.items()}}
    record.write_json_atomically(path, {**content, "environment": {**record.environment(), "device": str(device)}})
    return measured


def _step_of(task: SequenceTask, batch: Mapping[str, Tensor], precision: Precision) -> Callable[[], None]:
    """A training step without the trainer: no loader, clipping or logging."""
    optimizer = task.build_optimizer()

    def step() -> None:
        optimizer.zero_grad()
        with silent(task):
            training_step(task, optimizer, batch, precision)

    return step


def _peak_memory(task: SequenceTask, step: Callable[[], None], device: torch.device) -> int:
    task.zero_grad()  # gradients left from timing would be freed inside the measurement
    return peak_memory(step, device)
