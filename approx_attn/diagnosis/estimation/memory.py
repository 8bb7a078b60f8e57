"""Memory of a run: what is counted, and what is measured at smaller batches and extrapolated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from approx_attn.data.base import SequenceDataModule
from approx_attn.diagnosis.estimation.figures import Estimate, Figure, show
from approx_attn.run.measurement import peak_memory
from approx_attn.run.steps import Precision, autocast_of, batch_of, device_of, silent, training_step
from approx_attn.run.tasks.base import SequenceTask
from approx_attn.run.train import describe_run


def estimate_memory(
    result: Estimate, config: Mapping[str, Any], task: SequenceTask, data: SequenceDataModule, world: int
) -> None:
    """Fill in the memory of one device, and a note on what attention holds of it.

    Args:
        result: its lines of memory are set.
        task: moved to the device of this machine; its optimizer makes steps.
        world: processes that train together.
    """
    strategy = str(config["trainer"].get("strategy", "auto"))
    shards = world if strategy == "fsdp" else 1
    split = f", split over {shards} devices" if shards > 1 else ""
    device = device_of(config)
    task.to(device)
    optimizer = task.build_optimizer()
    precision = autocast_of(config, device)
    step, how = _at_batch(
        data.batch_size, lambda size: _step_memory(task, optimizer, batch_of(data, size, device), precision)
    )
    forward, how_forward = _at_batch(
        data.eval_batch_size, lambda size: _forward_memory(task, batch_of(data, size, device), precision)
    )
    trained = tensor_bytes(p for p in task.parameters() if p.requires_grad)
    weights = tensor_bytes([*task.parameters(), *task.buffers()])
    state = tensor_bytes(value for state in optimizer.state.values() for value in state.values())
    gradients = min(step, trained)  # what a step holds at its peak includes them
    result.memory = [
        Figure("parameters and buffers", weights / shards, "B", f"counted{split}"),
        Figure("optimizer state", state / shards, "B", f"counted after a step{split}"),
    ]
    if world > 1 and shards == 1:
        result.memory.append(Figure("gradients on their way between devices", trained, "B", "counted"))
    result.training = [
        Figure("gradients", gradients / shards, "B", f"counted{split}"),
        Figure(f"activations and working arrays, batch of {data.batch_size}", step - gradients, "B", how),
    ]
    result.evaluation = [Figure(f"or evaluation, batch of {data.eval_batch_size}", forward, "B", how_forward)]
    numbers = describe_run(dict(config), task, data.spec)["cost"]["state"]
    arrays = numbers * bytes_per_number(config) * data.batch_size
    result.notes.append(f"Arrays of attention in one forward pass of a batch: {show(arrays, 'B')}, by its cost record.")


def _at_batch(size: int, measure: Callable[[int], int]) -> tuple[float, str]:
    """Bytes at a batch size, from measurements at a quarter and at half of it; and how they came about."""
    small = sorted({max(size // 4, 1), max(size // 2, 1)})
    value = extrapolated({each: measure(each) for each in small}, size)
    return value, "measured" if small == [size] else f"extrapolated from batches of {' and '.join(map(str, small))}"


def _step_memory(
    task: SequenceTask,
    optimizer: Optimizer,
    batch: Mapping[str, Tensor],
    precision: Precision,
) -> int:
    """Most bytes that a training step holds besides parameters and optimizer state."""
    step = partial(training_step, task, optimizer, batch, precision)
    with silent(task):
        step()  # the optimizer makes its state
        optimizer.zero_grad()
        peak = peak_memory(step, task.device)
        optimizer.zero_grad()
    return peak


def _forward_memory(task: SequenceTask, batch: Mapping[str, Tensor], precision: Precision) -> int:
    """Most bytes that an evaluated batch needs besides parameters."""
    task.eval()
    with torch.inference_mode(), precision():
        return peak_memory(lambda: task(batch), task.device)


def bytes_per_number(config: Mapping[str, Any]) -> int:
    """Bytes of one number of an activation at the precision of the trainer."""
    precision = str(config["trainer"].get("precision", "32-true"))
    return 2 if "16" in precision else 8 if "64" in precision else 4


def tensor_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of tensors; what is none counts nothing."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))


def extrapolated(measured: Mapping[int, float], size: int) -> float:
    """The value at a size, on the line through the measured points, or proportional to the only one."""
    (first, low), (last, high) = min(measured.items()), max(measured.items())
    if first == last:
        return low * size / first
    slope = max(high - low, 0.0) / (last - first)
    return high + slope * (size - last)
