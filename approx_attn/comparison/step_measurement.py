"""Time and memory of one training step of every variant of a comparison, in turns on one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict

import torch
from rich.console import Console
from torch import Tensor

from approx_attn.comparison.aggregate import StepMeasurement
from approx_attn.comparison.plan import Comparison
from approx_attn.config.compose import plain
from approx_attn.data.base import SequenceDataModule
from approx_attn.run import record
from approx_attn.run import train as training
from approx_attn.run.measurement import peak_memory, time_alternately
from approx_attn.run.steps import Precision, autocast_of, device_of, silent, training_step
from approx_attn.run.tasks.base import SequenceTask
from approx_attn.run.trainer import quiet

MEASUREMENTS_FILE = "measurements.json"


def build_all(comparison: Comparison) -> tuple[dict[str, SequenceTask], SequenceDataModule]:
    """Every variant's task on the data of the first, so that a mechanism that cannot be used is refused now.

    Raises:
        ConfigError: anything wrong with any of them.
    """
    firsts = {label: next(iter(by_seed.values())).config for label, by_seed in comparison.runs.items()}
    modules = [training.check_run(config) for config in firsts.values()]
    data = modules[0]
    training.make_splits(data)
    tasks: dict[str, SequenceTask] = {}
    for label, config in firsts.items():
        container = training.check_config(config)
        tasks[label] = training.build_task(container, data.spec)
        training.warm_start(tasks[label], container)
        training.compile_model(tasks[label], container)
    return tasks, data


def measure_steps(
    comparison: Comparison, tasks: Mapping[str, SequenceTask], data: SequenceDataModule, console: Console
) -> dict[str, StepMeasurement]:
    """Time and memory of one training step of every variant, in turns, on the same batch, on one of their devices.

    Kept beside the table: measured again only when the compared runs change.
    """
    if comparison.repeats == 0:
        return {}
    path = comparison.folder / MEASUREMENTS_FILE
    config = plain(next(iter(comparison.runs[comparison.reference].values())).config)
    device = device_of(config)
    wanted = {"fingerprint": comparison.fingerprint, "repeats": comparison.repeats, "device": str(device)}
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
