"""The verb `approx-attn estimate`: memory and time of a training run, before it is started.

Memory is parameters, gradients and optimizer state, which are counted, and what a step holds besides (activations,
working arrays), which is measured at two smaller batches and extrapolated: it is linear in the batch. Time is steps
that are made by the trainer here, with loading, logging and checkpoints, or operations that are counted here and
divided by the speed of another device. The table says of every amount how it came about.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.table import Table
from rich.text import Text
from torch import Tensor

from approx_attn.command import run_plain
from approx_attn.config.compose import compose_config, config_dir, parse_overrides, plain
from approx_attn.data.base import SequenceDataModule
from approx_attn.diagnosis.estimated_time import Amount, computed_time, measured_time
from approx_attn.errors import ConfigError
from approx_attn.output import print_table, shown_bytes, to_table
from approx_attn.run import train as training
from approx_attn.run.measurement import peak_memory
from approx_attn.run.steps import autocast_of, batch_of, device_of, silent, training_step
from approx_attn.run.tasks.base import SequenceTask
from approx_attn.run.trainer import build_trainer, deterministic_algorithms_restored, quiet


@dataclass
class Estimate:
    """Memory and time of a run.

    Attributes:
        memory: what one device holds all the time, in bytes.
        training: what it holds besides while training.
        evaluation: what it holds besides while evaluating.
        time: parts of the time, in seconds, and the counts they come from.
        notes: what is not in them.
    """

    memory: list[Amount] = field(default_factory=list)
    training: list[Amount] = field(default_factory=list)
    evaluation: list[Amount] = field(default_factory=list)
    time: list[Amount] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def peak_bytes(self) -> float:
        """Peak memory of one device."""
        held, *at_times = (sum(part.value for part in each) for each in (self.memory, self.training, self.evaluation))
        return held + max(at_times)

    @property
    def seconds(self) -> float:
        """Time of the whole run."""
        return sum(part.value for part in self.time if part.unit == "s")


def estimate(
    config: Mapping[str, Any],
    *,
    steps: int = 8,
    batch_size: int | None = None,
    tflops: float | None = None,
    utilization: float = 0.3,
) -> Estimate:
    """Estimate a run.

    Args:
        config: as `compose_config` gives it.
        steps: training steps that are timed on this machine.
        batch_size: sequences in these steps; `data.batch_size` if None.
        tflops: 10^12 operations per second of the device that is meant; None: time is that of this machine.
        utilization: share of `tflops` that training reaches.

    Raises:
        ConfigError: a configuration that cannot be run.
    """
    container = _on_this_machine(training.check_config(config))
    with quiet(), deterministic_algorithms_restored(), tempfile.TemporaryDirectory() as nowhere:
        data = training.check_run(container, Path(nowhere))
        training.make_splits(data)
        task = training.build_task(container, data.spec)
        world = build_trainer(container, Path(nowhere)).world_size
        result = estimate_memory(container, task, data, world)
        if tflops is None:
            single = _on_one_device(config, batch_size)
            result.time = measured_time(single, container, data, world, steps, Path(nowhere))
        else:
            result.time = computed_time(container, task, data, world, tflops * 1e12 * utilization)
            result.notes.append(
                "Time is at least that: it is of operations alone, and small models are bound by starting them."
            )
    if world > 1:
        result.notes.append("Messages between devices are not in the time.")
    if (container.get("callbacks") or {}).get("early_stopping"):
        result.notes.append("Early stopping may end the run sooner.")
    return result


def _on_this_machine(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of any machine as one that can be built on this one, its processes on the CPU if need be."""
    own = copy.deepcopy(dict(config))
    devices = own["trainer"].get("devices")
    if not torch.cuda.is_available() or (isinstance(devices, int) and devices > torch.cuda.device_count()):
        own["trainer"]["accelerator"] = "cpu"
    return own


def _on_one_device(config: Mapping[str, Any], batch_size: int | None) -> dict[str, Any]:
    """The configuration on one device, with a batch that it bears."""
    own = copy.deepcopy(dict(config))
    own["trainer"].update(devices=1, num_nodes=1, strategy="auto")
    if batch_size is not None:
        own["data"]["batch_size"] = batch_size
    return _on_this_machine(own)


# -- memory --------------------------------------------------------------------------------------------


def estimate_memory(config: Mapping[str, Any], task: SequenceTask, data: SequenceDataModule, world: int) -> Estimate:
    """The memory of one device, and a note on what attention holds of it.

    Args:
        config: of the run.
        task: moved to the device of this machine; its optimizer makes steps.
        data: of the run.
        world: processes that train together.
    """
    shards = world if config["trainer"].get("strategy") == "fsdp" else 1
    split = f", split over {shards} devices" if shards > 1 else ""
    device = device_of(config)
    task.to(device)
    optimizer, precision = task.build_optimizer(), autocast_of(config, device)

    def step_memory(size: int) -> int:
        """Most bytes that a training step holds besides parameters and optimizer state."""
        step = partial(training_step, task, optimizer, batch_of(data, size, device), precision)
        with silent(task):
            step()  # the optimizer makes its state
            optimizer.zero_grad()
            peak = peak_memory(step, device)
            optimizer.zero_grad()
        return peak

    def forward_memory(size: int) -> int:
        """Most bytes that an evaluated batch needs besides parameters."""
        batch = batch_of(data, size, device)
        task.eval()
        with torch.inference_mode(), precision():
            return peak_memory(lambda: task(batch), device)

    size, evaluated = data.batch_size, data.eval_batch_size
    step, how = _at_batch(size, step_memory)
    forward, how_forward = _at_batch(evaluated, forward_memory)
    trained = tensor_bytes(parameter for parameter in task.parameters() if parameter.requires_grad)
    weights = tensor_bytes([*task.parameters(), *task.buffers()])
    state = tensor_bytes(value for each in optimizer.state.values() for value in each.values())
    gradients = min(step, trained)  # what a step holds at its peak includes them
    memory = [
        Amount("parameters and buffers", weights / shards, "B", f"counted{split}"),
        Amount("optimizer state", state / shards, "B", f"counted after a step{split}"),
    ]
    if world > 1 and shards == 1:
        memory.append(Amount("gradients on their way between devices", trained, "B", "counted"))
    numbers = training.describe_run(dict(config), task, data.spec)["cost"]["state"]
    arrays = shown_bytes(numbers * bytes_per_number(config) * size)
    return Estimate(
        memory=memory,
        training=[
            Amount("gradients", gradients / shards, "B", f"counted{split}"),
            Amount(f"activations and working arrays, batch of {size}", step - gradients, "B", how),
        ],
        evaluation=[Amount(f"or evaluation, batch of {evaluated}", forward, "B", how_forward)],
        notes=[f"Arrays of attention in one forward pass of a batch: {arrays}, by its cost record."],
    )


def _at_batch(size: int, measure: Callable[[int], int]) -> tuple[float, str]:
    """Bytes at a batch size, from measurements at a quarter and at half of it; and how they came about."""
    small = sorted({max(size // 4, 1), max(size // 2, 1)})
    value = extrapolated({each: measure(each) for each in small}, size)
    return value, "measured" if small == [size] else f"extrapolated from batches of {' and '.join(map(str, small))}"


def extrapolated(measured: Mapping[int, float], size: int) -> float:
    """The value at a size, on the line through the measured points, or proportional to the only one."""
    (first, low), (last, high) = min(measured.items()), max(measured.items())
    if first == last:
        return low * size / first
    slope = max(high - low, 0.0) / (last - first)
    return high + slope * (size - last)


def bytes_per_number(config: Mapping[str, Any]) -> int:
    """Bytes of one number of an activation at the precision of the trainer."""
    precision = str(config["trainer"].get("precision", "32-true"))
    return 2 if "16" in precision else 8 if "64" in precision else 4


def tensor_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of the tensors among some objects."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))


# -- the verb ------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """`approx-attn estimate`; returns the exit code."""
    return run_plain("estimate", lambda: _estimate_and_report(arguments), arguments)


def split_words(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The keys of `configs/estimate.yaml`, and the words of the training run.

    Raises:
        ConfigError: a word that cannot be read, or an impossible value.
    """
    own = plain(OmegaConf.load(config_dir() / "estimate.yaml"))  # type: ignore[arg-type]
    words = []
    for override, argument in zip(parse_overrides(arguments), arguments, strict=True):
        if override.is_sweep_override():
            raise ConfigError(f"{argument}: an estimate is of one run; several values for one key cannot be given.")
        if override.key_or_group in own:
            own[override.key_or_group] = override.value()
        else:
            words.append(argument)
    for key, value in own.items():
        whole = key in ("steps", "batch_size")
        if value is None and key not in ("steps", "utilization"):
            continue
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or value <= 0:
            raise ConfigError(f"{key} must be a {'whole ' if whole else ''}number above 0, got {value!r}.")
    if own["utilization"] > 1:
        raise ConfigError(f"utilization must be a share above 0 and up to 1, got {own['utilization']!r}.")
    return own, words


def _estimate_and_report(arguments: Sequence[str]) -> None:
    own, words = split_words(arguments)
    memory = own.pop("memory")
    config = compose_config([*words, "progress_bar=false"])
    result = estimate(plain(config), **own)
    print_table(_table(result, f"Estimate: {' '.join(words) or 'the defaults'}"))
    if memory is not None:
        print(verdict(result, memory, config.data.batch_size))
    for note in result.notes:
        print(note)


def verdict(result: Estimate, gibibytes: float, batch_size: int) -> str:
    """Whether the run fits into a device, and the largest batch that does.

    Args:
        result: of the run.
        gibibytes: memory of the device.
        batch_size: sequences of the batch that was estimated.
    """
    activations = result.training[-1].value
    fixed = sum(part.value for part in (*result.memory, *result.training)) - activations
    largest = int((gibibytes * 2**30 - fixed) / max(activations / batch_size, 1.0))
    fits = "fits into" if result.peak_bytes <= gibibytes * 2**30 else "does not fit into"
    batch = f"the largest batch that does has about {largest:,} sequences" if largest > 0 else "no batch does"
    return f"The run {fits} {gibibytes:g} GiB; {batch}."


def _table(result: Estimate, title: str) -> Table:
    """All amounts, with how they came about, and their sums."""
    of_memory = [*result.memory, *result.training, *result.evaluation]
    peak = Amount("peak memory", result.peak_bytes, "B", "the sum, of training or evaluation what is more")
    time = Amount("time", result.seconds, "s", "their sum; start and data preparation not")
    rows = []
    for part in (*of_memory, peak, *result.time, time):
        style = "bold" if part in (peak, time) else ""
        name, value = (Text(cell, style) for cell in (part.name, part.shown))
        rows.append({"of one device": name, "value": value, "how": part.how})
    table = to_table(rows, words=("how",), title=title)
    table.rows[len(of_memory)].end_section = True
    return table
