"""The command line of `compare`, read into the runs that it asks for.

A comparison is a list of variants (a mechanism with options) and seeds over one training configuration. Its runs
are ordinary runs, found by their configuration, so that comparisons share them and an interrupted one goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from approx_attn.attention.registry import attention_options, suggestion
from approx_attn.command import as_list, mechanism_spec, require_counts
from approx_attn.comparison.aggregate import Record, Records
from approx_attn.comparison.summary import watched_figure
from approx_attn.comparison.terms import EQUAL_STEPS, Terms
from approx_attn.config.compose import ConfigError, compose_config, config_dir, parse_overrides, plain
from approx_attn.config.instantiate import require_plain_name
from approx_attn.config.trust import plugin_words
from approx_attn.metrics import DEFAULT, METRICS, Metric, metric_names
from approx_attn.run import record
from approx_attn.run import train as training
from approx_attn.run.stored_metrics import how_to_get, lacking, with_metrics

EQUAL = ("steps", "time")
FOLDERS_FILE = "runs.json"  # beside a table: where its runs lie on this machine

# Keys of training that a comparison sets itself, and what to write instead.
REFUSED = {
    "seed": "seed is set by the comparison; write seeds=[...].",
    "paths.run_dir": "paths.run_dir is the folder of one run, and a comparison has several; write paths.runs=.",
    "extend": "extend trains one run longer; a longer comparison has a larger trainer.max_epochs.",
    **{
        key: f"{key} is not used by compare, which trains one run after the other; start the runs with train -m "
        "launcher=... resume=true, and compare finds them."
        for key in ("launcher", "hydra/launcher")
    },
}


def _word(value: Any) -> Any:
    return "null" if value is None else value


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
        return [f"{key}={_word(value)}" for key, value in self.options]


@dataclass(frozen=True)
class Run:
    """One training run of a comparison: the words that select it, and the configuration they give."""

    overrides: list[str]
    config: DictConfig

    @classmethod
    def compose(cls, overrides: list[str]) -> Run:
        return cls(overrides, compose_config([*overrides, "resume=true", "progress_bar=false"]))

    @cached_property
    def folder(self) -> Path:
        return training.run_folder(plain(self.config))

    def having(self, settings: Mapping[str, Any]) -> Run:
        """The run with other values of some keys."""
        if not settings:
            return self
        kept = [word for word in self.overrides if word.partition("=")[0].lstrip("+") not in settings]
        return Run.compose([*kept, *(f"{key}={_word(value)}" for key, value in settings.items())])

    def read(self) -> Record | None:
        """The record of the run with where it lies and how to get it, or None if it has not ended."""
        result = record.read_result(self.folder)
        if result is None:
            return None
        if result["status"] == "finished":
            result = with_metrics(result, self.folder, metric_names(self.config.get("metrics")))
        command = shlex.join(["python", "scripts/train.py", *plugin_words(), *self.overrides])
        return {**result, "run_dir": str(self.folder), "command": command}


Job = tuple[str, int, Run]
"""Label, seed and run."""


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
        equal: what is to be the same for all, `steps` or `time`.
        tune: learning rates to choose from for every mechanism; empty: all have the one of the configuration.
        fingerprint: six hexadecimal digits of what is compared.
        terms: what has come of `equal` and `tune` so far.
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
    equal: str
    tune: tuple[float, ...]
    fingerprint: str
    terms: Terms = EQUAL_STEPS

    def jobs(self) -> Iterator[Job]:
        """Label, seed and run of all runs to make, in the order of the table: not of what no learning rate trains."""
        for label, by_seed in self.runs.items():
            if self.terms.tuning is None or self.terms.tuning.best(label) is not None:
                yield from ((label, seed, run) for seed, run in by_seed.items())

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of a run of the reference."""
        return plain(next(iter(self.runs[self.reference].values())).config)

    @property
    def monitor(self) -> str | None:
        """The figure that the best checkpoint is kept by."""
        return watched_figure(self.config)

    def write_folders(self) -> None:
        """Note where the runs lie, for comparisons that start from them."""
        folders = {label: {seed: str(run.folder) for seed, run in each.items()} for label, each in self.runs.items()}
        record.write_json_atomically(self.folder / FOLDERS_FILE, folders)

    def records(self) -> Records:
        """What the runs left; in place of a record that lacks the compared figure one that says so."""
        return {label: {seed: self._record(run) for seed, run in each.items()} for label, each in self.runs.items()}

    def _record(self, run: Run) -> Record | None:
        result, name = run.read(), self.metric.name
        if result is None or result["status"] != "finished" or not lacking(result, [name]):
            return result
        return {**result, "status": "failed", "error": f"{name}: {how_to_get(name, run.folder)}"}


def plan(arguments: Sequence[str]) -> Comparison:
    """Read a command line into the runs that it asks for.

    Raises:
        ConfigError: one sentence that names the key.
    """
    own, passed_on = _split(arguments)
    settings = _settings(own)
    measure = settings["measure"]
    require_counts({f"measure.{key}": measure[key] for key in ("repeats", "warm_up")}, least=0)
    seeds = _checked_seeds(settings["seeds"])
    metric = settings["metric"]
    if metric not in METRICS:
        raise ConfigError(f"metric={metric!r} is unknown{suggestion(str(metric), METRICS)}")
    if METRICS[metric].per_class:
        raise ConfigError(f"metric={metric} is one figure per class; metrics=[{metric}] shows them beside another.")
    asked = metric_names(next((item.value() for item in passed_on if item.key_or_group == "metrics"), None))
    variants = _expand([_read_variant(entry) for entry in as_list(settings["attention"])], passed_on)
    reference = _checked_reference(settings["reference"], variants)
    common = [str(item.input_line) for item in passed_on if not _is_option(item)]
    if METRICS[metric].compute is not None and metric not in asked:
        common.append(f"metrics=[{','.join([*asked, metric])}]")
    runs = {
        variant.label: {seed: Run.compose([*common, *variant.overrides, f"seed={seed}"]) for seed in seeds}
        for variant in variants
    }
    if settings["start_from"] is not None:
        earlier = Path(settings["results"]) / require_plain_name("start_from", settings["start_from"])
        runs = started_from(earlier, runs, reference)
    equal, tune = settings["equal"], _checked_rates(settings["tune"], passed_on)
    # Comparisons at equal steps are called as they were before there were others.
    fingerprint = _fingerprint(runs, [] if equal == "steps" and not tune else [equal, *tune])
    name = settings["name"] or f"{runs[variants[0].label][seeds[0]].config.name}-{fingerprint}"
    comparison = Comparison(
        name=require_plain_name("name", name),
        runs=runs,
        reference=reference,
        metric=METRICS[metric],
        others=tuple(name for name in asked if name != metric) if asked != DEFAULT else (),
        folder=Path(settings["results"]) / str(name),
        command=shlex.join(["python", "scripts/compare.py", *plugin_words(), *arguments]),
        repeats=measure["repeats"],
        warm_up=measure["warm_up"],
        equal=equal,
        tune=tune,
        fingerprint=fingerprint,
        terms=Terms(reach=_checked_reach(settings["reach"])),
    )
    _check_terms(comparison)
    return comparison


def started_from(folder: Path, runs: Mapping[str, Mapping[int, Run]], reference: str) -> dict[str, dict[int, Run]]:
    """The runs, each from the best weights that its mechanism and seed reached in another comparison.

    A mechanism that is not in that comparison starts from the weights of the reference there.

    Args:
        folder: of the results of that comparison.
        runs: label -> seed -> run.
        reference: label of the reference.

    Raises:
        ConfigError: that comparison lacks one of them.
    """
    known = record.read_json(folder / FOLDERS_FILE)
    if known is None:
        raise ConfigError(f"start_from={folder.name} must be the name of a finished comparison in {folder.parent}.")

    def start(label: str, seed: int) -> Path:
        label = label if label in known else reference
        checkpoint = Path(known.get(label, {}).get(str(seed), "")) / "checkpoints" / "best.ckpt"
        if not checkpoint.is_file():
            there = ", ".join(f"{name} (seeds {', '.join(each)})" for name, each in known.items())
            raise ConfigError(
                f"start_from={folder.name} has no best checkpoint of {label} seed {seed}; it has {there}."
            )
        return checkpoint

    return {
        label: {seed: run.having({"init_from": start(label, seed)}) for seed, run in by_seed.items()}
        for label, by_seed in runs.items()
    }


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
        if item.key_or_group in REFUSED:
            raise ConfigError(REFUSED[item.key_or_group])
        if item.key_or_group == "resume" and item.value() is not True:
            raise ConfigError(f"resume must be true in compare, which finds what has been run, got {item.value()!r}.")
        if item.is_sweep_override() and not _is_option(item):
            raise ConfigError(f"{item.key_or_group} cannot be swept in a comparison; only attention options can.")
    return own, passed_on


def _is_option(item: Override) -> bool:
    return item.key_or_group.startswith("attention.")


def _read_variant(entry: Any) -> Variant:
    spec = mechanism_spec(entry)
    return Variant(spec.pop("name"), tuple(spec.items()))


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


def _checked_seeds(value: Any) -> list[int]:
    seeds = as_list(value)
    if not seeds or len(set(seeds)) < len(seeds) or any(isinstance(s, bool) or not isinstance(s, int) for s in seeds):
        raise ConfigError(f"seeds must be a list of different whole numbers, got {seeds!r}.")
    return seeds


def _checked_reference(reference: Any, variants: Sequence[Variant]) -> str:
    labels = [variant.label for variant in variants]
    matching = [v.label for v in variants if reference in (v.label, v.attention)]
    if not matching:
        raise ConfigError(f"reference={reference!r} is not among the compared{suggestion(str(reference), labels)}")
    return matching[0]


def _checked_rates(value: Any, passed_on: Sequence[Override]) -> tuple[float, ...]:
    """The learning rates of `tune`."""
    if value is None:
        return ()
    rates = as_list(value)
    numbers = all(isinstance(rate, int | float) and not isinstance(rate, bool) for rate in rates)
    if not rates or not numbers or not all(0 < rate < math.inf for rate in rates) or len(set(rates)) < len(rates):
        raise ConfigError(f"tune must be a list of different learning rates above 0 or null, got {value!r}.")
    if any(item.key_or_group == "optimizer.lr" for item in passed_on):
        raise ConfigError("optimizer.lr is chosen from tune=[...]; leave one of them out.")
    return tuple(rates)


def _checked_reach(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"reach must be a validation figure such as 0.9, or null, got {value!r}.")
    return float(value)


def _check_terms(comparison: Comparison) -> None:
    equal, trainer = comparison.equal, comparison.config["trainer"]
    if equal not in EQUAL:
        raise ConfigError(f"equal must be {' or '.join(EQUAL)}, got {equal!r}.")
    if comparison.tune and comparison.monitor is None:
        raise ConfigError("tune chooses by the figure of callbacks.best_checkpoint.monitor, which is null.")
    if equal == "steps":
        return
    if comparison.repeats == 0:
        raise ConfigError("measure.repeats must be at least 1 with equal=time, which needs the time of a step, got 0.")
    if trainer.get("max_time"):
        raise ConfigError("trainer.max_time must be null with equal=time, which counts steps; set trainer.max_epochs.")
    for key in ("devices", "num_nodes"):
        if trainer.get(key, 1) != 1:
            raise ConfigError(f"trainer.{key} must be 1 with equal=time, which times one device, got {trainer[key]!r}.")


def _fingerprint(runs: Mapping[str, Mapping[int, Run]], terms: Sequence[Any]) -> str:
    hashes = sorted(
        f"{record.config_hash(plain(run.config))}-{seed}" for by_seed in runs.values() for seed, run in by_seed.items()
    )
    return hashlib.sha256(json.dumps([*hashes, *terms]).encode()).hexdigest()[:6]
