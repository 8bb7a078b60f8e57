"""One training run, from a configuration to a folder of results, as a plain function.

    config = compose_config(["data=digits", "attention=eigen_row", "attention.keep=0.25", "seed=1"])
    result = train(config)
    result.metrics["test/accuracy"]

Everything that can be wrong is found before anything is written: the configuration, then the data, then the
model on it. A run's folder holds

    config.yaml             the resolved configuration
    metrics.csv             what was logged while training
    events.out.tfevents.*   the same for TensorBoard
    checkpoints/            best.ckpt (tested), last.ckpt (resumed from) and the one before it
    test_predictions.npz    predicted and true class of every scored test item
    result.json             the record, written last: a run with it has ended well
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
import math
import re
import signal
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException

from approx_attn import checkpoints, distributed
from approx_attn.attention import AttentionMechanism
from approx_attn.attention.registry import SHAPE_ARGUMENTS
from approx_attn.calibration import calibrate
from approx_attn.calibration.basis_file import has_basis
from approx_attn.callbacks import ProgressBar, Resumable, SeedSteps, StepTimer
from approx_attn.command import run_command
from approx_attn.configuration import plain
from approx_attn.data.base import DataSpec, SequenceDataModule
from approx_attn.instantiation import (
    ConfigError,
    build,
    check_arguments,
    refuse_paths_outside,
    require_plain_name,
    sentence,
    suggestion,
    target_class,
)
from approx_attn.loggers import RunCSVLogger
from approx_attn.results import record
from approx_attn.stopping import Stopped, requeue, was_requeued
from approx_attn.tasks.base import SequenceTask

REQUIRED_KEYS = frozenset(
    {"name", "seed", "resume", "progress_bar", "verbose", "paths"}
    | {"attention", "data", "model", "task", "optimizer", "trainer"}
)
LOGGER_PACKAGES = {"WandbLogger": "approx-attn[wandb]", "RunMLFlowLogger": "approx-attn[mlflow]"}
OPTIONAL_KEYS = frozenset({"scheduler", "callbacks", "logger"})


@dataclass
class TrainResult:
    """What a run gave.

    Attributes:
        run_dir: the folder of the run.
        metrics: test figures by name, such as `test/accuracy`.
        record: what `result.json` holds.
        resumed: the run was finished already, or continued from a checkpoint.
        task: the task with the tested weights; None if the run was finished before.
        data: the data module; None likewise.
        trainer: Lightning's trainer; None likewise.
    """

    run_dir: Path
    metrics: dict[str, float]
    record: dict[str, Any]
    resumed: bool = False
    task: SequenceTask | None = field(default=None, repr=False)
    data: SequenceDataModule | None = field(default=None, repr=False)
    trainer: pl.Trainer | None = field(default=None, repr=False)


def train(config: DictConfig | Mapping[str, Any]) -> TrainResult:
    """Train, test with the best weights, and write the record.

    Args:
        config: as `compose_config` gives it. With `resume`, or in a job that Slurm started again, a run of the
            same configuration and seed is continued from its last checkpoint, or reported if it had ended.

    Raises:
        ConfigError: a configuration that cannot be run; nothing has been written.
        DivergedError: the loss became NaN or infinite; the record says `failed` and why.
        DiskFullError: no space is left; the run can be continued.
        Stopped: a signal ended the run, which can be continued.
    """
    container = check_config(config)
    container["resume"] = container["resume"] or was_requeued()
    folder, finished = find_run(container)
    if finished is not None and not distributed.is_started():
        return TrainResult(folder, finished["metrics"], finished, resumed=True)
    with quiet(container["verbose"]), deterministic_algorithms_restored():
        data = check_run(container, folder)
        make_splits(data)
        pl.seed_everything(container["seed"], workers=True, verbose=False)
        task = build_task(container, data.spec)
        check_trained(container, task)
        trainer = build_trainer(container, folder)
        if distributed.must_start(trainer):
            folder, resumed = distributed.start(_train_in_process, container, trainer.world_size)
            known = record.read_json(folder / record.RESULT_FILE) or {}
            return TrainResult(folder, known["metrics"], known, resumed=resumed)
        with distributed.joined(trainer):
            folder, finished = distributed.agree(lambda: find_run(container))
            with distributed.first_only(lambda: record.run_lock(folder)):
                if container["resume"]:  # another process may have finished it while this one waited for the lock
                    _, finished = distributed.agree(lambda: find_run(container))
                if finished is not None:
                    return TrainResult(folder, finished["metrics"], finished, resumed=True)
                return _run(container, folder, data, task, build_trainer(container, folder))


def _train_in_process(config: dict[str, Any]) -> tuple[Path, bool]:
    """`train` in one of several processes: where it wrote, and whether the run had begun before."""
    result = train(config)
    return result.run_dir, result.resumed


def _run(
    config: dict[str, Any], folder: Path, data: SequenceDataModule, task: SequenceTask, trainer: pl.Trainer
) -> TrainResult:
    if distributed.is_first():
        record.remove_unfinished(folder)
        record.write_text_atomically(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
    start = checkpoints.ResumePoint()
    if config["resume"]:
        start = distributed.agree(lambda: checkpoints.find_resume_point(folder))
    resumed = start.path is not None
    started = time.time()
    if not resumed:
        fit_bases(task, data, config)
    try:
        fit_from(start, task, data, trainer)
    except Exception as error:
        failure = {**describe_run(config, task, data.spec), "status": "failed", "error": sentence(error, "train")}
        if distributed.is_first() and not record.is_disk_full(error):
            record.write_json_atomically(folder / record.RESULT_FILE, failure)
        raise
    best = restore_best(task, trainer)
    tested = trainer.test(task, datamodule=data, verbose=False)[0]
    metrics = {key: float(value) for key, value in {**best, **tested}.items()}
    if distributed.is_first():
        save_predictions(folder, task)
    timer = next((c for c in trainer.callbacks if isinstance(c, StepTimer)), None)  # type: ignore[attr-defined]
    result = {
        **describe_run(config, task, data.spec),
        "status": "finished",
        "metrics": metrics,
        "steps": trainer.global_step,
        "epochs": trainer.current_epoch,
        "step_seconds": timer.median if timer else None,
        "seconds": time.time() - started,
        "environment": {
            **record.environment(),
            "device": str(trainer.strategy.root_device),
            "processes": trainer.world_size,
        },
    }
    if distributed.is_first():
        record.write_json_atomically(folder / record.RESULT_FILE, result)
    return TrainResult(folder, metrics, result, resumed=resumed, task=task, data=data, trainer=trainer)


# -- before anything is written ------------------------------------------------------------------------


def check_config(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as plain containers, with everything refused that can be without the data.

    Raises:
        ConfigError: one sentence that names the key.
    """
    container = plain(config)
    for key in container:
        if key not in REQUIRED_KEYS | OPTIONAL_KEYS:
            raise ConfigError(f"{key} is not a key{suggestion(key, REQUIRED_KEYS | OPTIONAL_KEYS)}")
    for key in sorted(REQUIRED_KEYS):
        if container.get(key) is None:
            raise ConfigError(f"{key} must be set.")
    require_plain_name("name", container["name"])
    seed = container["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ConfigError(f"seed must be a whole number from 0 to 4294967295, got {seed!r}.")
    for key in ("resume", "progress_bar", "verbose"):
        if not isinstance(container[key], bool):
            raise ConfigError(f"{key} must be true or false, got {container[key]!r}.")
    check_arguments(container["data"], "data", SequenceDataModule)
    check_arguments(container["task"], "task", SequenceTask, ("config", "spec"))
    check_arguments(container["trainer"], "trainer", pl.Trainer, ("callbacks", "logger", "default_root_dir"))
    check_arguments(container["optimizer"], "optimizer", torch.optim.Optimizer, ("params",))
    _check_numbers(container)
    target_class(container["model"], "model", torch.nn.Module)
    check_arguments(container["attention"], "attention", AttentionMechanism, SHAPE_ARGUMENTS)
    return container


def _check_numbers(config: Mapping[str, Any]) -> None:
    """Numbers that the optimizer and the trainer would refuse late, or not at all."""
    trainer = config["trainer"]
    rate = config["optimizer"].get("lr")
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
        raise ConfigError(f"optimizer.lr must be a number above 0, got {rate!r}.")
    epochs = trainer.get("max_epochs")
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < -1:
        raise ConfigError(
            f"trainer.max_epochs must be a whole number, 0 to test without training or -1 for no limit, got {epochs!r}."
        )
    if epochs == -1 and trainer.get("max_steps", -1) == -1 and not trainer.get("max_time"):
        raise ConfigError("trainer.max_epochs=-1 needs trainer.max_steps or trainer.max_time, else a run never ends.")


def check_run(config: DictConfig | Mapping[str, Any], folder: Path | None = None) -> SequenceDataModule:
    """Build everything once without reading data, which refuses all that can be wrong apart from the data.

    Returns:
        The data module, its splits not yet made.

    Raises:
        ConfigError: one sentence that names the key.
    """
    container = check_config(config)
    with quiet(container["verbose"]), deterministic_algorithms_restored():
        data = build(container["data"], "data", SequenceDataModule)
        build_trainer(container, folder or run_folder(container))
        spec = data.make_spec()
        # Some modules know their vocabulary and classes only once they have read the data.
        known = replace(spec, vocab_size=max(spec.vocab_size, 2), num_classes=max(spec.num_classes, 2))
        build_task(container, known)
    return data


def make_splits(data: SequenceDataModule) -> None:
    """Read or generate the data; what is missing or misnamed there is a `ConfigError`."""
    try:
        data.prepare_data()
        data.setup()
    except (ValueError, OSError, KeyError) as error:
        raise ConfigError(sentence(error, "data")) from error


def build_task(config: dict[str, Any], spec: DataSpec) -> SequenceTask:
    """The task of a configuration, its model in the shape of the data, its optimizer tried."""
    task = build(config["task"], "task", SequenceTask, config=config, spec=vars(spec))
    optimizer = task.build_optimizer()
    task.build_scheduler(optimizer, total_steps=1)
    return task


def check_trained(config: Mapping[str, Any], task: SequenceTask) -> None:
    """Refuse to test a model that has parts that nothing has trained.

    Raises:
        ConfigError: no training is asked for, and the model is not wholly one that was trained before.
    """
    if config["trainer"]["max_epochs"] != 0:
        return
    new = getattr(task.model, "new_parameters", None)
    if new is None or new:
        which = f"; model.path has no fitting {new[0]}" if new else ", and this model starts at random"
        raise ConfigError(f"trainer.max_epochs=0 tests a model that was trained before{which}.")


def fit_bases(task: SequenceTask, data: SequenceDataModule, config: Mapping[str, Any]) -> None:
    """Fit the bases of a pretrained model on its first training batches, if it asks for that and has any."""
    batches = getattr(task.model, "calibration_batches", 0)
    if batches == 0 or not any(starts_from_data(mechanism) for mechanism in task.mechanisms):
        return
    seen = itertools.islice(data.joint_train_batches(), batches * distributed.processes())
    first = [task.inputs(batch) for batch in seen]
    calibrate(task.model, first, progress=config["progress_bar"])


def starts_from_data(mechanism: AttentionMechanism) -> bool:
    """Whether calibration changes a mechanism."""
    return has_basis(mechanism) or hasattr(mechanism, "observe")


def fit_from(start: checkpoints.ResumePoint, task: SequenceTask, data: SequenceDataModule, trainer: pl.Trainer) -> None:
    """Train from a checkpoint, or from the beginning, to the end or until a signal asks to stop.

    Raises:
        Stopped: asked to; the last checkpoint is of the last step, unless the trainer was broken off.
        DiskFullError: no space for a checkpoint or a log.
    """
    for logger in trainer.loggers:
        if isinstance(logger, RunCSVLogger):
            logger.resume_step = start.step
    if isinstance(trainer.strategy.checkpoint_io, checkpoints.AtomicCheckpointIO):
        trainer.strategy.checkpoint_io.damaged |= start.damaged
    resumable = next((c for c in trainer.callbacks if isinstance(c, Resumable)), None)  # type: ignore[attr-defined]
    interruption: BaseException | None = None
    try:
        with record.disk_full_named(trainer.default_root_dir):
            trainer.fit(task, datamodule=data, ckpt_path=start.path, weights_only=True)
    except (SystemExit, KeyboardInterrupt) as error:  # what Lightning makes of SIGTERM and of Ctrl-C
        interruption = error
    except Exception as error:
        # Workers that load data get the signal too, and that they ended is no failure of the run.
        if resumable is None or resumable.stopped_by is None or record.is_disk_full(error):
            raise
        interruption = error
    finally:
        if resumable is not None:
            resumable.restore_signals()
    signum = resumable.stopped_by if resumable is not None else None
    if interruption is not None or signum is not None:
        unnoted = signal.SIGTERM if isinstance(interruption, SIGTERMException) else signal.SIGINT
        raise_stopped(trainer, signum or unnoted, resumable, interruption)


def raise_stopped(
    trainer: pl.Trainer, signum: int, resumable: Resumable | None, cause: BaseException | None
) -> NoReturn:
    """End a run that a signal stopped as whoever sent the signal expects it."""
    previous = resumable.previous_handlers.get(signum) if resumable is not None else None
    if callable(previous) and previous is not signal.default_int_handler:
        previous(signum, None)  # such as that of submitit, which starts the job again
    elif signum in (signal.SIGUSR1, signal.SIGUSR2) and trainer.is_global_zero:
        requeue()
    raise Stopped(
        signum,
        f"stopped by {signal.Signals(signum).name} after step {trainer.global_step}; "
        f"the same command with resume=true continues from {trainer.default_root_dir}.",
        main_process=trainer.is_global_zero,
    ) from cause


def build_trainer(config: Mapping[str, Any], folder: Path) -> pl.Trainer:
    """Lightning's trainer with the callbacks and loggers of a configuration, writing to `folder`."""
    shown: list[pl.Callback] = [ProgressBar()] if config["progress_bar"] else []
    callbacks = [*shown, SeedSteps(config["seed"]), *build_callbacks(config, folder)]
    checkpointing = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    node = {key: value for key, value in config["trainer"].items() if key != "strategy"}
    try:
        return build(
            node,
            "trainer",
            pl.Trainer,
            strategy=distributed.strategy_of(config["trainer"]),
            callbacks=callbacks,
            plugins=[checkpoints.AtomicCheckpointIO()],
            logger=build_loggers(config, folder) or False,
            default_root_dir=folder,
            enable_progress_bar=config["progress_bar"],
            enable_model_summary=False,
            enable_checkpointing=checkpointing,
            num_sanity_val_steps=0,
        )
    except (MisconfigurationException, RuntimeError) as error:
        raise ConfigError(sentence(error, "trainer")) from error


def build_callbacks(config: Mapping[str, Any], folder: Path) -> list[pl.Callback]:
    """The callbacks of `config.callbacks`; checkpoints go below `folder`."""
    callbacks = []
    for name, node in (config.get("callbacks") or {}).items():
        if node is None:
            continue
        key = f"callbacks.{name}"
        given: dict[str, Any] = {}
        target_class(node, key, pl.Callback)
        if node.get("monitor") not in (None, *SequenceTask.figures):
            raise ConfigError(
                f"{key}.monitor must be one of {', '.join(SequenceTask.figures)}, got {node['monitor']!r}."
            )
        cls = target_class(node, key, pl.Callback)
        refuse_paths_outside(node, key)
        if node.get("filename") is not None:  # {figure:format} becomes a number
            require_plain_name(f"{key}.filename", re.sub(r"\{.*?\}", "_", str(node["filename"])))
        if "dirpath" in inspect.signature(cls).parameters:
            given["dirpath"] = folder / checkpoints.FOLDER
        if issubclass(cls, ModelCheckpoint):
            given["enable_version_counter"] = False
        callbacks.append(build(node, key, pl.Callback, **given))
    return callbacks


def build_loggers(config: Mapping[str, Any], folder: Path) -> list[Logger]:
    """The loggers of `config.logger`, writing straight into `folder`."""
    loggers = []
    for name, node in (config.get("logger") or {}).items():
        if node is None:
            continue
        key = f"logger.{name}"
        given: dict[str, Any] = {}
        cls = target_class(node, key, Logger)
        refuse_paths_outside(node, key)
        accepted = inspect.signature(cls).parameters
        if issubclass(cls, CSVLogger | TensorBoardLogger):
            given = {"save_dir": folder, "name": "", "version": ""}
        else:
            given = {name: folder for name in ("save_dir", "dir") if name in accepted}
        try:
            loggers.append(build(node, key, Logger, **given))
        except ImportError as error:
            package = LOGGER_PACKAGES.get(cls.__name__, cls.__name__)
            raise ConfigError(f"{key} needs a package that is not installed: pip install {package}.") from error
    return loggers


# -- the folder ----------------------------------------------------------------------------------------


def find_run(config: Mapping[str, Any]) -> tuple[Path, dict[str, Any] | None]:
    """Where a run writes, and its record if it is to be resumed and has ended well.

    A fresh run never enters a folder in which something ran before: it gets the next free number.
    """
    folder = run_folder(config)
    if config["resume"]:
        return folder, record.read_result(folder) if record.is_finished(folder) else None
    fresh, number = folder, 1
    while (fresh / "config.yaml").exists():
        number += 1
        fresh = folder.with_name(f"{folder.name}-{number}")
    return fresh, None


def run_folder(config: Mapping[str, Any]) -> Path:
    """`paths.run_dir`, or the place below `paths.runs` that the configuration and seed decide."""
    paths = config["paths"]
    if paths.get("run_dir"):
        return Path(paths["run_dir"])
    return record.run_folder(paths["runs"], config, data=str(config["name"]), attention=attention_label(config))


def attention_label(config: Mapping[str, Any]) -> str:
    """The name of the mechanism of a configuration."""
    return target_class(config["attention"], "attention", AttentionMechanism).name  # type: ignore[attr-defined]


def describe_run(config: dict[str, Any], task: SequenceTask, spec: DataSpec) -> dict[str, Any]:
    """The part of a record that is known before training."""
    parameters = list(task.model.parameters())
    in_attention = {id(p): p.numel() for mechanism in task.mechanisms for p in mechanism.parameters()}
    length = getattr(task.model, "attention_length", None) or spec.max_length
    costs = [mechanism.cost(length, causal=spec.causal or mechanism.causal) for mechanism in task.mechanisms]
    return {
        "name": config["name"],
        "attention": attention_label(config),
        "seed": config["seed"],
        "config_hash": record.config_hash(config),
        "config": config,
        "spec": vars(spec),
        "parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "attention_parameters": sum(in_attention.values()),
        "cost": {
            "exact_pairs": sum(cost.exact_pairs for cost in costs),
            "total_pairs": sum(cost.total_pairs for cost in costs),
            "score_multiply_adds": sum(cost.score_multiply_adds for cost in costs),
            "value_multiply_adds": sum(cost.value_multiply_adds for cost in costs),
            "state": sum(cost.state for cost in costs),
        },
    }


def restore_best(task: SequenceTask, trainer: pl.Trainer) -> dict[str, float]:
    """Load the best weights into the task, if a callback kept them; returns what made them the best."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_path:
            checkpoint = torch.load(callback.best_model_path, map_location="cpu", weights_only=True)
            distributed.load_weights(task, checkpoint["state_dict"])
            assert callback.best_model_score is not None
            return {f"best_{callback.monitor}": float(callback.best_model_score), "best_epoch": checkpoint["epoch"]}
    return {}


def save_predictions(folder: Path, task: SequenceTask) -> None:
    """`test_predictions.npz` with the arrays `prediction` and `label`, one entry per scored test item."""
    if task.predictions is None:
        return
    arrays: dict[str, Any] = {key: value.numpy().astype(np.int32) for key, value in task.predictions.items()}
    with record.open_atomically(folder / "test_predictions.npz") as file:
        np.savez_compressed(file, **arrays)


# -- surroundings --------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet(verbose: bool = False) -> Iterator[None]:
    """Without the trainer's own messages about hardware, workers and tips; errors and this package's stay."""
    if verbose:
        yield
        return
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning|lightning_fabric|torch)\.")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def deterministic_algorithms_restored() -> Iterator[None]:
    """The trainer sets PyTorch's switch for the whole process; put it back for what runs next."""
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


# -- the verb ------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """`approx-attn train`: run what the command line says and print where the results are."""
    return run_command("train", _train_and_report, arguments, check=check_run)


def _train_and_report(config: DictConfig) -> None:
    result = train(config)
    figures = ", ".join(
        f"{key} {result.metrics[key]:.4f}" for key in ("test/accuracy", "test/loss") if key in result.metrics
    )
    known = "finished before" if result.task is None else ("continued" if result.resumed else "trained")
    label = f"{result.record['name']} · {result.record['attention']} · seed {result.record['seed']}"
    print(f"{label}: {known}, {figures}\n  {result.run_dir}")
