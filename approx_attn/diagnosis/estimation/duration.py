"""Time of a run: its batches, times the seconds of one here, or its operations over the speed of another device."""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from approx_attn.config.instantiate import build
from approx_attn.data.base import SequenceDataModule
from approx_attn.diagnosis.estimation.figures import Figure
from approx_attn.errors import ConfigError
from approx_attn.run import train as training
from approx_attn.run.measurement import synchronize
from approx_attn.run.steps import batch_of, silent
from approx_attn.run.tasks.base import SequenceTask
from approx_attn.run.trainer import build_trainer

TIMED_EPOCHS = 3  # the first warms up
EVALUATED_BATCHES = 4  # in each of them, at most


@dataclass(frozen=True)
class Plan:
    """How many batches a run has: of training in all, of validation in all, of the test, and epochs."""

    train: int
    validation: int
    test: int
    epochs: int


def planned(config: Mapping[str, Any], data: SequenceDataModule, world: int) -> Plan:
    """The batches of a run that is not stopped early, in each of `world` processes.

    Raises:
        ConfigError: nothing but time ends the run.
    """
    trainer = config["trainer"]
    items, val_items, test_items = data.spec.num_items or (0, 0, 0)
    limits = [trainer.get(f"limit_{split}_batches", 1.0) for split in ("train", "val", "test")]
    sizes = (data.batch_size, data.eval_batch_size, data.eval_batch_size)
    per_epoch = max(items // (sizes[0] * world), 1)
    evaluated = [
        math.ceil(count / (size * world)) for count, size in zip((val_items, test_items), sizes[1:], strict=True)
    ]
    train, val, test = (
        min(limit, batches) if isinstance(limit, int) and not isinstance(limit, bool) else int(batches * float(limit))
        for limit, batches in zip(limits, (per_epoch, *evaluated), strict=True)
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
    """When training batches, evaluations and epochs began and ended."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.evaluations: list[tuple[float, int]] = []
        self.ended = 0.0
        self._began = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.batches.append([])

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        synchronize()
        self.batches[-1].append(time.perf_counter())

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        synchronize()
        self._began = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        synchronize()
        self.evaluations.append((time.perf_counter() - self._began, int(sum(trainer.num_val_batches))))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.ended = time.perf_counter()

    @property
    def step(self) -> float:
        """Median seconds from one training batch to the next, all that happens between them included."""
        return statistics.median(
            later - earlier for epoch in self.batches[1:] for earlier, later in itertools.pairwise(epoch)
        )

    @property
    def evaluated_batch(self) -> float:
        """Median seconds of an evaluated batch."""
        return statistics.median(seconds / max(count, 1) for seconds, count in self.evaluations[1:])

    @property
    def rest_of_epoch(self) -> float:
        """Median seconds of an epoch that neither its steps nor its evaluation take, such as for checkpoints."""
        starts = [epoch[0] for epoch in self.batches] + [self.ended]
        rests = [
            later - earlier - len(epoch) * self.step - seconds
            for earlier, later, epoch, (seconds, _) in zip(
                starts, starts[1:], self.batches, self.evaluations, strict=False
            )
        ]
        return max(statistics.median(rests[1:]), 0.0)


def measured_time(
    single: dict[str, Any], config: Mapping[str, Any], data: SequenceDataModule, world: int, steps: int, folder: Path
) -> list[Figure]:
    """Time of the run at the speed of this machine, from a few steps of its trainer.

    Args:
        single: the configuration on one device, with a batch that it bears.
        config, data: of the whole run.
        world: processes that train together.
        steps: training steps per timed epoch.
        folder: where the trainer writes.
    """
    timed = copy.deepcopy(single)
    watch = Stopwatch()
    small = build(timed["data"], "data", SequenceDataModule)
    small.setup()
    pl.seed_everything(timed["seed"], workers=True, verbose=False)
    task = training.build_task(timed, small.spec)
    timed["trainer"].update(
        max_epochs=TIMED_EPOCHS,
        max_steps=-1,
        limit_train_batches=max(steps, 2),
        limit_val_batches=EVALUATED_BATCHES,
        val_check_interval=1.0,
        check_val_every_n_epoch=1,
    )
    timed["progress_bar"] = False
    trainer = build_trainer(timed, folder)
    trainer.callbacks.append(watch)  # type: ignore[attr-defined]
    trainer.fit(task, datamodule=small)
    ratio = config["data"]["batch_size"] / timed["data"]["batch_size"]
    how = "measured" if ratio == 1 else f"measured with batches of {timed['data']['batch_size']}, in proportion"
    plan = planned(config, data, world)
    return [
        Figure("one training step", watch.step * ratio, "s/step", how),
        Figure("training", plan.train * watch.step * ratio, "s", f"{plan.train:,} steps of {plan.epochs} epochs"),
        Figure(
            "evaluation",
            (plan.validation + plan.test) * watch.evaluated_batch,
            "s",
            f"{plan.validation + plan.test:,} batches, measured",
        ),
        Figure("checkpoints and the rest", plan.epochs * watch.rest_of_epoch, "s", f"{plan.epochs} epochs, measured"),
    ]


def computed_time(
    config: Mapping[str, Any], task: SequenceTask, data: SequenceDataModule, world: int, speed: float
) -> list[Figure]:
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
    plan = planned(config, data, world)
    return [
        Figure("operations of a training step", per_step, "", f"counted at a batch of {size}: matrix products alone"),
        Figure("one training step", per_step / speed, "s/step", "operations / (tflops · utilization)"),
        Figure("training", plan.train * per_step / speed, "s", f"{plan.train:,} steps of {plan.epochs} epochs"),
        Figure(
            "evaluation",
            (plan.validation + plan.test) * per_batch / speed,
            "s",
            f"{plan.validation + plan.test:,} batches, likewise",
        ),
    ]


def operations(function: Callable[[], Any]) -> int:
    """Floating point operations of the matrix products in a call, twice its multiply-adds."""
    # Of the fused attention of a CPU the counter knows nothing.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())
