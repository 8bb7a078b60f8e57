"""Time and memory of one training step of every variant of a comparison, in turns on one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from approx_attn.comparison.aggregate import StepMeasurement
from approx_attn.comparison.plan import Comparison
from approx_attn.config.compose import plain
from approx_attn.config.instantiate import build
from approx_attn.data.base import SequenceDataModule
from approx_attn.errors import ConfigError
from approx_attn.run import record
from approx_attn.run import train as training
from approx_attn.run.measurement import peak_memory, time_alternately
from approx_attn.run.steps import Precision, autocast_of, device_of, silent, training_step
from approx_attn.run.tasks.base import SequenceTask
from approx_attn.run.trainer import build_trainer, deterministic_algorithms_restored, quiet

MEASUREMENTS_FILE = "measurements.json"
ANEW = "delete it to measure anew, which gives the runs other numbers of steps"


def build_all(comparison: Comparison) -> tuple[dict[str, SequenceTask], SequenceDataModule]:
    """Every variant's task on the data of the first, so that a mechanism that cannot be used is refused now.

    Raises:
        ConfigError: anything wrong with any of them.
    """
    firsts = {label: next(iter(by_seed.values())).config for label, by_seed in comparison.runs.items()}
    containers = {label: training.check_config(config) for label, config in firsts.items()}
    for container in containers.values():
        training.check_model(container)
        with deterministic_algorithms_restored():
            build_trainer(container, training.run_folder(container))
    data = build(next(iter(containers.values()))["data"], "data", SequenceDataModule)
    if not data.has_static_spec:  # the shape of the model is in the data
        training.make_splits(data)
    tasks = {label: training.build_task(container, data.spec) for label, container in containers.items()}
    if data.has_static_spec:
        training.make_splits(data)
    for label, container in containers.items():
        training.warm_start(tasks[label], container)
        training.compile_model(tasks[label], container)
    return tasks, data


def measure_steps(
    comparison: Comparison, tasks: Mapping[str, SequenceTask], data: SequenceDataModule, console: Console
) -> dict[str, StepMeasurement]:
    """Time and memory of one training step of every variant, in turns, on the same batch, on one of their devices.

    Kept beside the table: only what is not there is measured, in turns with the reference. At equal steps what was
    measured under other conditions is measured again; at equal time, where numbers of steps depend on it, it is
    refused.

    Raises:
        ConfigError: at equal time, the kept measurements are of something else, or cannot be read.
    """
    if comparison.repeats == 0:
        return {}
    path, config = comparison.folder / MEASUREMENTS_FILE, comparison.config
    device = device_of(config)
    kept = _kept(comparison, path, device)
    known = {label: kept[label] for label in comparison.runs if label in kept}
    if len(known) == len(comparison.runs):
        return known
    timed = [label for label in comparison.runs if label not in known or label == comparison.reference]
    with console.status("measuring training steps in turns ..."), quiet():
        batch = {key: value.to(device) for key, value in next(iter(data.train_dataloader())).items()}
        precision = autocast_of(config, device)
        steps = {label: _step_of(tasks[label].to(device), batch, precision) for label in timed}
        timings = time_alternately(steps, comparison.repeats, comparison.warm_up)
        base = timings[comparison.reference]
        seconds = known[comparison.reference].seconds if known else base.median
        measured = {
            label: StepMeasurement(
                relative_time=timing.relative_to(base),
                spread=timing.spread_relative_to(base) / 2,
                seconds=timing.relative_to(base) * seconds,
                memory=_peak_memory(tasks[label], steps[label], device),
            )
            for label, timing in timings.items()
        }
    found = {**measured, **known}
    hashes = _hashes(comparison)
    content = {
        "reference": comparison.reference,
        "repeats": comparison.repeats,
        "device": str(device),
        "steps": {label: {**asdict(each), "config_hash": hashes[label]} for label, each in found.items()},
        "environment": {**record.environment(), "device": str(device)},
    }
    record.write_json_atomically(path, content)
    return {label: found[label] for label in comparison.runs}


def _kept(comparison: Comparison, path: Path, device: torch.device) -> dict[str, StepMeasurement]:
    """The measurements in a file that are of this comparison: of none if the conditions or the reference changed."""
    stored, strict = record.read_json(path), comparison.equal == "time"
    if stored is None and not (strict and path.exists()):
        return {}
    stored = stored or {}
    try:
        steps = {label: StepMeasurement.read(each) for label, each in stored["steps"].items()}
    except (KeyError, TypeError, AttributeError, ValueError):
        if strict:
            raise ConfigError(f"{path} holds no measured steps that can be read; {ANEW}.") from None
        return {}
    now: dict[str, Any] = {"reference": comparison.reference, "device": str(device)}
    now |= {"threads": torch.get_num_threads()} if strict else {"repeats": comparison.repeats}
    there = {"threads": (stored.get("environment") or {}).get("torch_threads"), **stored}
    other = [f"{key} {there[key]} and not {value}" for key, value in now.items() if there.get(key, value) != value]
    # Files of earlier versions have one fingerprint of all runs.
    if stored.get("fingerprint") != comparison.fingerprint:
        hashes = {label: each.get("config_hash") for label, each in stored["steps"].items()}
        changed = [label for label, mine in _hashes(comparison).items() if hashes.get(label, mine) != mine]
        other += [f"another configuration of {comparison.reference}"] * (comparison.reference in changed)
        if strict and changed and not other:
            other = [f"another configuration of {', '.join(changed)}"]
        steps = {label: each for label, each in steps.items() if label not in changed}
    if other and strict:
        raise ConfigError(f"{path} holds steps measured with {', '.join(other)}; {ANEW}.")
    return {} if other or comparison.reference not in steps else steps


def _hashes(comparison: Comparison) -> dict[str, str]:
    """By label, what says whether it is the same configuration."""
    return {
        label: record.config_hash(plain(next(iter(by_seed.values())).config))
        for label, by_seed in comparison.runs.items()
    }


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
