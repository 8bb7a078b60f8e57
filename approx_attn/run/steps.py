"""One step of a task outside of the trainer: its device, batch and precision, and nobody to log to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from approx_attn.data.base import SequenceDataModule
from approx_attn.run.tasks.base import SequenceTask

Precision = Callable[[], AbstractContextManager[Any]]
"""Makes the context that a forward pass runs in."""


def device_of(config: Mapping[str, Any]) -> torch.device:
    """The first device that the trainer of a configuration uses on this machine."""
    on_cpu = config["trainer"].get("accelerator") == "cpu" or not torch.cuda.is_available()
    return torch.device("cpu" if on_cpu else "cuda")


def training_step(task: SequenceTask, optimizer: Optimizer, batch: Mapping[str, Tensor], precision: Precision) -> None:
    """Forward, backward and the optimizer's step; gradients add to those that there are."""
    task.train()
    with precision():
        loss = task.training_step(batch, 0)
    loss.backward()
    optimizer.step()


def batch_of(data: SequenceDataModule, size: int, device: torch.device) -> dict[str, Tensor]:
    """Training sequences as one batch, the first again where there are not enough."""
    items: Any = data.joint_train_batches().dataset
    batch: dict[str, Tensor] = items.__getitems__([index % len(items) for index in range(size)])
    return {key: value.to(device) for key, value in batch.items()}


def autocast_of(config: Mapping[str, Any], device: torch.device) -> Precision:
    """How the trainer's precision runs a forward pass."""
    precision = str(config["trainer"].get("precision", "32-true"))
    if "mixed" not in precision:
        return nullcontext
    dtype = torch.float16 if "16" in precision and not precision.startswith("bf16") else torch.bfloat16
    return lambda: torch.autocast(device.type, dtype=dtype)


@contextlib.contextmanager
def silent(task: SequenceTask) -> Iterator[None]:
    """Let a task be called without a trainer: it logs nothing."""
    logs: dict[str, Any] = dict.fromkeys(("log", "log_dict"), lambda *args, **kwargs: None)
    vars(task).update(logs)
    try:
        yield
    finally:
        for name in logs:
            del vars(task)[name]
