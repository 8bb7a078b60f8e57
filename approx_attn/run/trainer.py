"""The trainer of a run: what watches it, where it writes, and how it ends.

`build_trainer` makes Lightning's trainer from a configuration, `fit_from` trains from where the run stands, to the
end or until a signal asks to stop, and `restore_best` puts the weights in place that are tested. What the trainer
does to the whole process meanwhile, `quiet` and `deterministic_algorithms_restored` keep within bounds.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException

from approx_attn.config.instantiate import build, refuse_paths_outside, require_plain_name, sentence, target_class
from approx_attn.data.base import SequenceDataModule
from approx_attn.errors import ConfigError, Stopped
from approx_attn.metrics import METRICS, metric_direction, metric_names
from approx_attn.run import checkpoints, distributed, record
from approx_attn.run.callbacks import ProgressBar, Resumable, SeedSteps, Validations
from approx_attn.run.loggers import RunCSVLogger
from approx_attn.run.signals import requeue
from approx_attn.run.tasks.base import SequenceTask

LOGGER_PACKAGES = {"WandbLogger": "approx-attn[wandb]", "RunMLFlowLogger": "approx-attn[mlflow]"}


def build_trainer(config: Mapping[str, Any], folder: Path, watching: Sequence[pl.Callback] = ()) -> pl.Trainer:
    """Lightning's trainer with the callbacks and loggers of a configuration, writing to `folder`.

    `watching`: further callbacks.
    """
    shown: list[pl.Callback] = [ProgressBar()] if config["progress_bar"] else []
    callbacks = [*shown, SeedSteps(config["seed"]), Validations(), *build_callbacks(config, folder), *watching]
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
        cls = target_class(node, key, pl.Callback)
        watched = monitored(config)
        if node.get("monitor") not in (None, *watched):
            raise ConfigError(f"{key}.monitor must be one of {', '.join(watched)}, got {node['monitor']!r}.")
        refuse_paths_outside(node, key)
        if node.get("filename") is not None:  # {figure:format} becomes a number
            require_plain_name(f"{key}.filename", re.sub(r"\{.*?\}", "_", str(node["filename"])))
        if "dirpath" in inspect.signature(cls).parameters:
            given["dirpath"] = folder / checkpoints.FOLDER
        if issubclass(cls, ModelCheckpoint):
            given["enable_version_counter"] = False
        if issubclass(cls, EarlyStopping):
            given["strict"] = False  # a run that ends before its first validation ends well
        if node.get("monitor") is not None and "mode" in inspect.signature(cls).parameters:
            given["mode"] = _mode_of(node, key)
            node = {name: value for name, value in node.items() if name != "mode"}
        callbacks.append(build(node, key, pl.Callback, **given))
    return callbacks


def _mode_of(node: Mapping[str, Any], key: str) -> str:
    """The direction of the figure that a callback watches; saying another is an error."""
    mode = metric_direction(str(node["monitor"]))
    if node.get("mode") not in (None, mode):
        raise ConfigError(f"{key}.mode must be {mode} or null with monitor={node['monitor']}, got {node['mode']!r}.")
    return mode


def monitored(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The figures that callbacks may watch: loss, accuracy, and the metrics asked for that are one number."""
    asked = (METRICS[name] for name in metric_names(config.get("metrics")))
    return (
        *SequenceTask.figures,
        *(f"val/{metric.name}" for metric in asked if metric.compute and not metric.per_class),
    )


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
        with record.disk_full_named(trainer.default_root_dir), _full_disks_told_once():
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
    """End a run that a signal stopped in the way that the sender of the signal expects."""
    previous = resumable.previous_handlers.get(signum) if resumable is not None else None
    if callable(previous) and previous is not signal.default_int_handler:
        try:
            previous(signum, None)  # such as that of submitit, which starts the job again
        except Exception as error:  # another way of ending the process
            cause = error
    elif signum in (signal.SIGUSR1, signal.SIGUSR2) and trainer.is_global_zero:
        requeue()
    raise Stopped(
        signum,
        f"stopped by {signal.Signals(signum).name} after step {trainer.global_step}; "
        f"the same command with resume=true continues from {trainer.default_root_dir}.",
        main_process=trainer.is_global_zero,
    ) from cause


def restore_best(task: SequenceTask, trainer: pl.Trainer) -> dict[str, float]:
    """Load the best weights into the task, if a callback kept them; returns what made them the best."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_path:
            checkpoint = torch.load(callback.best_model_path, map_location="cpu", weights_only=True)
            distributed.load_weights(task, checkpoint["state_dict"])
            assert callback.best_model_score is not None
            return {f"best_{callback.monitor}": float(callback.best_model_score), "best_epoch": checkpoint["epoch"]}
    return {}


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
def _full_disks_told_once() -> Iterator[None]:
    """Without the traceback of the thread that writes for TensorBoard; what it raises comes up in the main thread."""
    before = threading.excepthook
    threading.excepthook = lambda args: None if record.is_disk_full(args.exc_value) else before(args)
    try:
        yield
    finally:
        threading.excepthook = before


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
