"""The verb `approx-attn estimate`: memory and time of a training run, before it is started.

Memory is parameters, gradients and optimizer state, which are counted, and what a step holds besides (activations,
working arrays), which is measured at two smaller batches and extrapolated: it is linear in the batch. Time is steps
that are made by the trainer here, with loading, logging and checkpoints, or operations that are counted here and
divided by the speed of another device. The table says of every figure how it came about.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from approx_attn import training
from approx_attn.command import exit_code
from approx_attn.configuration import compose_config, config_dir, plain
from approx_attn.data.base import SequenceDataModule
from approx_attn.instantiation import ConfigError, build
from approx_attn.measurement import peak_memory
from approx_attn.tasks.base import SequenceTask

TIMED_EPOCHS = 3  # the first warms up
EVALUATED_BATCHES = 4  # of each, at most


@dataclass(frozen=True)
class Figure:
    """One line of an estimate.

    Attributes:
        value: bytes, seconds or a number, as `unit` says.
        how: `computed`, `measured` or `extrapolated`, and from what.
    """

    name: str
    value: float
    unit: str
    how: str


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

    memory: list[Figure] = field(default_factory=list)
    training: list[Figure] = field(default_factory=list)
    evaluation: list[Figure] = field(default_factory=list)
    time: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def peak_bytes(self) -> float:
        """Peak memory of one device."""
        held, *at_times = (sum(f.value for f in part) for part in (self.memory, self.training, self.evaluation))
        return held + max(at_times)

    @property
    def seconds(self) -> float:
        """Time of the whole run."""
        return sum(figure.value for figure in self.time if figure.unit == "s")


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
    container = here(training.check_config(config))
    with training.quiet(), training.deterministic_algorithms_restored(), tempfile.TemporaryDirectory() as nowhere:
        data = training.check_run(container, Path(nowhere))
        training.make_splits(data)
        pl.seed_everything(container["seed"], workers=True, verbose=False)
        task = training.build_task(container, data.spec)
        world = training.build_trainer(container, Path(nowhere)).world_size
        own = alone(container, batch_size)
        result = Estimate()
        estimate_memory(result, container, task, data, world)
        if tflops is None:
            result.time = measured_time(own, container, data, world, steps, Path(nowhere))
        else:
            result.time = computed_time(container, task, data, world, tflops * 1e12 * utilization)
            result.notes.append(
                "Time is of operations alone; small models are bound by starting them, not by their number."
            )
    if world > 1:
        result.notes.append("Messages between devices are not in the time.")
    if container["callbacks"] and (container["callbacks"].get("early_stopping") or {}):
        result.notes.append("Early stopping may end the run sooner.")
    return result


def here(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of any machine as one that can be built on this one."""
    own = copy.deepcopy(dict(config))
    if not torch.cuda.is_available():
        own["trainer"]["accelerator"] = "cpu"
    return own


def alone(config: Mapping[str, Any], batch_size: int | None) -> dict[str, Any]:
    """The configuration on one device, with a batch that it bears."""
    own = copy.deepcopy(dict(config))
    own["trainer"].update(devices=1, num_nodes=1, strategy="auto")
    if batch_size is not None:
        own["data"]["batch_size"] = batch_size
    return own


# -- memory --------------------------------------------------------------------------------------------


def estimate_memory(
    result: Estimate, config: Mapping[str, Any], task: SequenceTask, data: SequenceDataModule, world: int
) -> None:
    """Fill in the memory of one device."""
    strategy = str(config["trainer"].get("strategy", "auto"))
    shards = world if strategy == "fsdp" else 1
    split = f", split over {shards} devices" if shards > 1 else ""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    numbers = training.describe_run(dict(config), task, data.spec)["cost"]["state"]
    arrays = numbers * bytes_per_number(config) * data.batch_size
    result.notes.append(f"Arrays of attention in one forward pass of a batch: {show(arrays, 'B')}, by its cost record.")


def _at_batch(size: int, measure: Callable[[int], int]) -> tuple[float, str]:
    """Bytes at a batch size, from measurements at a quarter and at half of it; and how they came about."""
    small = sorted({max(size // 4, 1), max(size // 2, 1)})
    value = extrapolated({each: measure(each) for each in small}, size)
    return value, "measured" if small == [size] else f"extrapolated from batches of {' and '.join(map(str, small))}"


def bytes_per_number(config: Mapping[str, Any]) -> int:
    """Bytes of one number of an activation at the precision of the trainer."""
    precision = str(config["trainer"].get("precision", "32-true"))
    return 2 if "16" in precision else 8 if "64" in precision else 4


def _forward_memory(
    task: SequenceTask, batch: Mapping[str, Tensor], precision: Callable[[], AbstractContextManager[Any]]
) -> int:
    """Most bytes that an evaluated batch needs besides parameters."""
    task.eval()
    with torch.inference_mode(), precision():
        return peak_memory(lambda: task(batch), task.device)


def batch_of(data: SequenceDataModule, size: int, device: torch.device) -> dict[str, Tensor]:
    """Training sequences as one batch, the first again where there are not enough."""
    items: Any = data.joint_train_batches().dataset
    batch: dict[str, Tensor] = items.__getitems__([index % len(items) for index in range(size)])
    return {key: value.to(device) for key, value in batch.items()}


def autocast_of(config: Mapping[str, Any], device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """How the trainer's precision runs a forward pass."""
    precision = str(config["trainer"].get("precision", "32-true"))
    if "mixed" not in precision:
        return nullcontext
    dtype = torch.float16 if "16" in precision and not precision.startswith("bf16") else torch.bfloat16
    return lambda: torch.autocast(device.type, dtype=dtype)


def _step_memory(
    task: SequenceTask,
    optimizer: Optimizer,
    batch: Mapping[str, Tensor],
    precision: Callable[[], AbstractContextManager[Any]],
) -> int:
    """Most bytes that a training step holds besides parameters and optimizer state."""

    def step() -> None:
        task.train()
        with precision():
            loss = task.training_step(batch, 0)
        loss.backward()
        optimizer.step()

    with silent(task):
        step()  # the optimizer makes its state
        optimizer.zero_grad()
        peak = peak_memory(step, task.device)
        optimizer.zero_grad()
    return peak


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


def tensor_bytes(tensors: Any) -> int:
    """Bytes of tensors; what is none counts nothing."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))


def extrapolated(measured: Mapping[int, float], size: int) -> float:
    """The value at a size, on the line through the measured points, or proportional to the only one."""
    (first, low), (last, high) = min(measured.items()), max(measured.items())
    if first == last:
        return low * size / first
    slope = max(high - low, 0.0) / (last - first)
    return high + slope * (size - last)


# -- time ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How many batches a run has: of training in all, of validation in all, of the test, and epochs."""

    train: int
    validation: int
    test: int
    epochs: int


def planned(config: Mapping[str, Any], data: SequenceDataModule, world: int) -> Plan:
    """The batches of a run that is not stopped early."""
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
    often = trainer.get("check_val_every_n_epoch") or 1
    every = trainer.get("val_check_interval", 1.0)
    per = max(train // every, 1) if isinstance(every, int) else round(1.0 / every)
    return Plan(int(batches), val * int(per) * (epochs // often), test, epochs)


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
        _wait(pl_module)
        self.batches[-1].append(time.perf_counter())

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _wait(pl_module)
        self._began = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _wait(pl_module)
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


def _wait(module: pl.LightningModule) -> None:
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)


def measured_time(
    own: dict[str, Any], config: Mapping[str, Any], data: SequenceDataModule, world: int, steps: int, folder: Path
) -> list[Figure]:
    """Time of the run at the speed of this machine, from a few steps of its trainer."""
    watch = Stopwatch()
    small = build(own["data"], "data", SequenceDataModule)
    small.setup()
    pl.seed_everything(own["seed"], workers=True, verbose=False)
    task = training.build_task(own, small.spec)
    own["trainer"].update(
        max_epochs=TIMED_EPOCHS,
        max_steps=-1,
        limit_train_batches=max(steps, 2),
        limit_val_batches=EVALUATED_BATCHES,
        val_check_interval=1.0,
        check_val_every_n_epoch=1,
    )
    own["progress_bar"] = False
    trainer = training.build_trainer(own, folder)
    trainer.callbacks.append(watch)  # type: ignore[attr-defined]
    trainer.fit(task, datamodule=small)
    ratio = config["data"]["batch_size"] / own["data"]["batch_size"]
    how = "measured" if ratio == 1 else f"measured with batches of {own['data']['batch_size']}, in proportion"
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
    with FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())


# -- the verb ------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """`approx-attn estimate`; returns the exit code."""
    if {"-h", "--help"} & set(arguments):
        print((config_dir() / "estimate.yaml").read_text(encoding="utf-8"), end="")
        return 0
    return exit_code(lambda: _estimate_and_report(arguments), verbose="verbose=true" in arguments)


def settings(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The keys of `configs/estimate.yaml`, and the words of the training run.

    Raises:
        ConfigError: a word that cannot be read, or an impossible value.
    """
    try:
        overrides = OverridesParser.create().parse_overrides(list(arguments))
    except HydraException as error:
        raise ConfigError(f"an override cannot be read: {' '.join(str(error).split())}") from error
    own = plain(OmegaConf.load(config_dir() / "estimate.yaml"))  # type: ignore[arg-type]
    words = []
    for override, argument in zip(overrides, arguments, strict=True):
        if override.is_sweep_override():
            raise ConfigError(f"{argument}: an estimate is of one run; several values for one key cannot be given.")
        if override.key_or_group in own:
            own[override.key_or_group] = override.value()
        else:
            words.append(argument)
    for key, whole in (
        ("steps", True),
        ("batch_size", True),
        ("tflops", False),
        ("utilization", False),
        ("memory", False),
    ):
        value = own[key]
        if value is None and key not in ("steps", "utilization"):
            continue
        kinds = int if whole else int | float
        if isinstance(value, bool) or not isinstance(value, kinds) or value <= 0:
            raise ConfigError(f"{key} must be a {'whole ' if whole else ''}number above 0, got {value!r}.")
    return own, words


def _estimate_and_report(arguments: Sequence[str]) -> None:
    own, words = settings(arguments)
    memory = own.pop("memory")
    config = compose_config([*words, "progress_bar=false"])
    result = estimate(plain(config), **own)
    console = Console()
    console.print(as_table(result, " ".join(words)))
    if memory is not None:
        print(verdict(result, memory, config.data.batch_size))
    for note in result.notes:
        print(note)


def verdict(result: Estimate, gibibytes: float, batch_size: int) -> str:
    """Whether the run fits into a device, and the largest batch that does."""
    activations = result.training[-1].value
    fixed = sum(figure.value for figure in (*result.memory, *result.training)) - activations
    largest = int((gibibytes * 2**30 - fixed) / max(activations / batch_size, 1.0))
    fits = "fits into" if result.peak_bytes <= gibibytes * 2**30 else "does not fit into"
    batch = f"the largest batch that does has about {largest:,} sequences" if largest > 0 else "no batch does"
    return f"The run {fits} {gibibytes:g} GiB; {batch}."


def as_table(result: Estimate, words: str) -> Table:
    """All figures, with how they came about."""
    table = Table(title=f"Estimate: {words or 'the defaults'}", title_justify="left")
    table.add_column("of one device")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("how")
    for figure in (*result.memory, *result.training, *result.evaluation):
        table.add_row(figure.name, show(figure.value, figure.unit), figure.how)
    table.add_row(
        "[bold]peak memory",
        f"[bold]{show(result.peak_bytes, 'B')}",
        "the sum, of training or evaluation what is more",
        end_section=True,
    )
    for figure in result.time:
        table.add_row(figure.name, show(figure.value, figure.unit), figure.how)
    table.add_row("[bold]time", f"[bold]{show(result.seconds, 's')}", "their sum; start and data preparation not")
    return table


def show(value: float, unit: str) -> str:
    """A number for people."""
    if unit == "B":
        for prefix, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
            if value >= size:
                return f"{value / size:.1f} {prefix}"
        return f"{value:.0f} B"
    if unit == "s":
        if value < 120:
            return f"{value:.1f} s"
        return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"
    if unit == "s/step":
        return f"{1000 * value:.2f} ms"
    return f"{value:.3g}"
