"""Time of a run: its batches, times the seconds of one here, or its operations over the speed of another device."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from approx_attn.config.instantiate import build
from approx_attn.data.base import SequenceDataModule
from approx_attn.errors import ConfigError
from approx_attn.output import shown_bytes, shown_seconds
from approx_attn.run import train as training
from approx_attn.run.measurement import synchronize
from approx_attn.run.steps import batch_of, silent
from approx_attn.run.tasks.base import SequenceTask
from approx_attn.run.trainer import build_trainer

TIMED_EPOCHS = 3  # the first warms up
EVALUATED_BATCHES = 4  # in each of them, at most


@dataclass(frozen=True)
class Amount:
    """One line of an estimate.

    Attributes:
        name: what it is of.
        value: bytes, seconds or a number, as `unit` says.
        unit: `B`, `s`, `s/step`, or empty for a number.
        how: `computed`, `measured` or `extrapolated`, and from what.
    """

    name: str
    value: float
    unit: str
    how: str

    @property
    def shown(self) -> str:
        """The value for people, with its unit."""
        if self.unit == "B":
            return shown_bytes(self.value)
        if self.unit == "s":
            return shown_seconds(self.value)
        return f"{1000 * self.value:.2f} ms" if self.unit == "s/step" else f"{self.value:.3g}"


@dataclass(frozen=True)
class Plan:
    """How many batches a run has: of training in all, of validation in all, of the test, and epochs."""

    train: int
    validation: int
    test: int
    epochs: int

    @property
    def evaluated(self) -> int:
        return self.validation + self.test


def planned(config: Mapping[str, Any], data: SequenceDataModule, world: int) -> Plan:
    """The batches of a run that is not stopped early, in each of `world` processes.

    Raises:
        ConfigError: nothing but time ends the run.
    """
    trainer = config["trainer"]
    items, *evaluated = data.spec.num_items or (0, 0, 0)
    whole = [max(items // (data.batch_size * world), 1)]
    whole += [math.ceil(count / (data.eval_batch_size * world)) for count in evaluated]
    train, val, test = (
        min(limit, batches) if isinstance(limit, int) and not isinstance(limit, bool) else int(batches * float(limit))
        for split, batches in zip(("train", "val", "test"), whole, strict=True)
        for limit in (trainer.get(f"limit_{split}_batches", 1.0),)
    )
    epochs, max_steps = trainer["max_epochs"], trainer.get("max_steps", -1)
    batches = train * max(epochs, 0) if epochs != -1 else math.inf
    if max_steps != -1:
        batches = min(batches, max_steps * trainer.get("accumulate_grad_batches", 1))
    if math.isinf(batches):
        raise ConfigError("trainer.max_epochs=-1 needs trainer.max_steps for an estimate.")
    epochs = math.ceil(batches / max(train, 1))
    return Plan(int(batches), val * _evaluations(trainer, int(batches), train, epochs), test, epochs)


def _evaluations(trainer: Mapping[str, Any], batches: int, per_epoch: int, epochs: int) -> int:
    """How often a run of so many training batches evaluates."""
    every, often = trainer.get("val_check_interval", 1.0), trainer.get("check_val_every_n_epoch", 1)
    if often is None:  # counted in batches over the whole run
        return batches // every
    per = max(per_epoch // every, 1) if isinstance(every, int) else round(1.0 / every)
    return int(per) * (epochs // often)


class Stopwatch(pl.Callback):
    """When training batches, evaluations and epochs began and ended, in seconds; the first epoch warms up."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.evaluations: list[tuple[float, int]] = []  # seconds and batches
        self.ended = self._began = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.batches.append([])

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.batches[-1].append(_now())

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began = _now()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.evaluations.append((_now() - self._began, int(sum(trainer.num_val_batches))))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.ended = time.perf_counter()

    @property
    def step(self) -> float:
        """Median seconds from one training batch to the next, all that happens between them included."""
        return median(later - earlier for epoch in self.batches[1:] for earlier, later in itertools.pairwise(epoch))

    @property
    def evaluated_batch(self) -> float:
        """Median seconds of an evaluated batch."""
        return median(seconds / max(count, 1) for seconds, count in self.evaluations[1:])

    @property
    def rest_of_epoch(self) -> float:
        """Median seconds of an epoch that neither its steps nor its evaluation take, such as for checkpoints."""
        starts = [*(epoch[0] for epoch in self.batches), self.ended]
        spent = [len(epoch) * self.step for epoch in self.batches]
        evaluated = [seconds for seconds, _ in self.evaluations]
        lengths = (later - earlier for earlier, later in itertools.pairwise(starts))
        rests = [whole - sum(parts) for whole, *parts in zip(lengths, spent, evaluated, strict=False)]
        return max(median(rests[1:]), 0.0)


def _now() -> float:
    synchronize()
    return time.perf_counter()


def measured_time(
    single: dict[str, Any], config: Mapping[str, Any], data: SequenceDataModule, world: int, steps: int, folder: Path
) -> list[Amount]:
    """Time of the run at the speed of this machine, from a few steps of its trainer.

    Args:
        single: the configuration on one device, with a batch that it bears.
        config, data: of the whole run.
        world: processes that train together.
        steps: training steps per timed epoch.
        folder: where the trainer writes.
    """
    timed = copy.deepcopy(single)
    timed["progress_bar"] = False
    timed["trainer"].update(
        max_epochs=TIMED_EPOCHS,
        max_steps=-1,
        limit_train_batches=max(steps, 2),
        limit_val_batches=EVALUATED_BATCHES,
        val_check_interval=1.0,
        check_val_every_n_epoch=1,
    )
    small = build(timed["data"], "data", SequenceDataModule)
    small.setup()
    watch = Stopwatch()
    trainer = build_trainer(timed, folder)
    trainer.callbacks.append(watch)  # type: ignore[attr-defined]  # last, so that checkpoints count as evaluation
    trainer.fit(training.build_task(timed, small.spec), datamodule=small)
    size = timed["data"]["batch_size"]
    ratio = config["data"]["batch_size"] / size
    how = "measured" if ratio == 1 else f"measured with batches of {size}, in proportion"
    plan = planned(config, data, world)
    rest = plan.epochs * watch.rest_of_epoch
    return [
        *_times(plan, watch.step * ratio, how, watch.evaluated_batch, "measured"),
        Amount("checkpoints and the rest", rest, "s", f"{plan.epochs} epochs, measured"),
    ]


def computed_time(
    config: Mapping[str, Any], task: SequenceTask, data: SequenceDataModule, world: int, speed: float
) -> list[Amount]:
    """Time of the run on a device of a given speed (operations per second), from counted operations."""
    size = max(config["data"]["batch_size"] // 4, 1)
    batch = batch_of(data, size, torch.device("cpu"))
    task.cpu()
    with silent(task):
        backward = operations(lambda: task.train().training_step(batch, 0).backward())
    forward = operations(lambda: task.eval()(batch))
    task.zero_grad()
    per_step = backward * config["data"]["batch_size"] / size
    per_batch = forward * data.eval_batch_size / size
    how = "operations / (tflops · utilization)"
    return [
        Amount("operations of a training step", per_step, "", f"counted at a batch of {size}: matrix products alone"),
        *_times(planned(config, data, world), per_step / speed, how, per_batch / speed, "likewise"),
    ]


def _times(plan: Plan, step: float, how: str, evaluated: float, how_evaluated: str) -> list[Amount]:
    """The time of a plan at the seconds of a training step and of an evaluated batch."""
    return [
        Amount("one training step", step, "s/step", how),
        Amount("training", plan.train * step, "s", f"{plan.train:,} steps of {plan.epochs} epochs"),
        Amount("evaluation", plan.evaluated * evaluated, "s", f"{plan.evaluated:,} batches, {how_evaluated}"),
    ]


def operations(function: Callable[[], Any]) -> int:
    """Floating point operations of the matrix products in a call, twice its multiply-adds."""
    # The counter knows nothing of the fused attention of a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())
