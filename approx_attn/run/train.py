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
    test_predictions.npz    predicted class, its probability and the true class of every scored test item
    result.json             the record, written last: a run with it has ended well
    .approx-attn-run        says that the folder is a run's; `approx-attn runs` deletes none without
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf

from approx_attn.attention import AttentionMechanism
from approx_attn.attention.registry import SHAPE_ARGUMENTS
from approx_attn.command import require_finite, run_command
from approx_attn.config.compose import plain
from approx_attn.config.instantiate import (
    build,
    check_arguments,
    require_plain_name,
    sentence,
    suggestion,
    target_class,
)
from approx_attn.conversion.calibration import calibrate
from approx_attn.conversion.calibration.basis_file import has_basis
from approx_attn.data.base import DataSpec, SequenceDataModule
from approx_attn.errors import ConfigError
from approx_attn.metrics import metric_names
from approx_attn.output import require_folder
from approx_attn.run import checkpoints, distributed, record
from approx_attn.run.callbacks import StepTimer, Validations
from approx_attn.run.signals import was_requeued
from approx_attn.run.stored_metrics import PREDICTIONS_FILE, how_to_get, lacking, with_metrics
from approx_attn.run.tasks.base import SequenceTask
from approx_attn.run.trainer import build_trainer, deterministic_algorithms_restored, fit_from, quiet, restore_best

METRICS_FILE = "metrics.csv"

REQUIRED_KEYS = frozenset(
    {"name", "seed", "resume", "progress_bar", "verbose", "paths"}
    | {"attention", "data", "model", "task", "optimizer", "trainer"}
)
OPTIONAL_KEYS = frozenset({"scheduler", "callbacks", "logger", "metrics", "init_from", "extend", "compile"})

# What a run that extends another may change: how long it is.
BUDGET_KEYS = frozenset({"trainer.max_epochs", "trainer.max_steps", "trainer.max_time", "extend"})


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


def train(config: DictConfig | Mapping[str, Any], callbacks: Sequence[pl.Callback] = ()) -> TrainResult:
    """Train, test with the best weights, and write the record.

    Args:
        config: as `compose_config` gives it. With `resume`, or in a job that Slurm started again, a run of the
            same configuration and seed is continued from its last checkpoint, or reported if it had ended.
        callbacks: watch the run beside those of the configuration, in this process only.

    Raises:
        ConfigError: a configuration that cannot be run; nothing has been written.
        DivergedError: the loss became NaN or infinite, or exploded; the record says `failed` and why.
        DiskFullError: no space is left; the run can be continued.
        Stopped: a signal ended the run, which can be continued.
        ProcessError: one of several processes that train together failed.
    """
    container = check_config(config)
    container["resume"] = container["resume"] or was_requeued()
    folder, finished = find_run(container)
    if finished is not None and not distributed.is_started():
        return TrainResult(folder, finished["metrics"], finished, resumed=True)
    require_folder("paths.run_dir" if container["paths"].get("run_dir") else "paths.runs", folder)
    with quiet(container["verbose"]), deterministic_algorithms_restored():
        data = check_run(container, folder)
        make_splits(data)
        pl.seed_everything(container["seed"], workers=True, verbose=False)
        task = build_task(container, data.spec)
        warm_start(task, container)
        check_trained(container, task)
        refuse_extension(container, folder)
        trainer = build_trainer(container, folder)
        if distributed.must_start(trainer):
            folder, resumed = distributed.start(_train_in_process, container, trainer.world_size)
            known = record.read_json(folder / record.RESULT_FILE) or {}
            return TrainResult(folder, known["metrics"], known, resumed=resumed)
        with distributed.joined(trainer):
            folder, _ = distributed.agree(lambda: find_run(container))
            with distributed.first_only(lambda: record.run_lock(folder)):
                # Another process may have finished it while this one waited for the lock.
                finished = distributed.agree(lambda: read_finished(folder, container))
                if finished is not None:
                    return TrainResult(folder, finished["metrics"], finished, resumed=True)
                return _run(container, folder, data, task, build_trainer(container, folder, callbacks))


def _train_in_process(config: dict[str, Any]) -> tuple[Path, bool]:
    """`train` in one of several processes: where it wrote, and whether the run had begun before."""
    result = train(config)
    return result.run_dir, result.resumed


def _run(
    config: dict[str, Any], folder: Path, data: SequenceDataModule, task: SequenceTask, trainer: pl.Trainer
) -> TrainResult:
    if distributed.is_first():
        record.mark_run(folder)
        record.remove_unfinished(folder)
        record.write_text_atomically(folder / record.CONFIG_FILE, OmegaConf.to_yaml(OmegaConf.create(config)))
    start = checkpoints.ResumePoint()
    if config["resume"]:
        start = distributed.agree(lambda: checkpoints.find_resume_point(folder))
    resumed = start.path is not None
    if not resumed and config.get("extend"):
        start = distributed.agree(lambda: extend_run(config, folder))
    started, environment = time.time(), record.environment()
    if start.path is None and not config.get("init_from"):
        fit_bases(task, data, config)
    compile_model(task, config)
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
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    timer = next((callback for callback in callbacks if isinstance(callback, StepTimer)), None)
    result = {
        **describe_run(config, task, data.spec),
        "status": "finished",
        "metrics": metrics,
        "steps": trainer.global_step,
        "epochs": trainer.current_epoch,
        "validations": sum(callback.count for callback in callbacks if isinstance(callback, Validations)),
        "tested_weights": "best" if best else "last",
        "step_seconds": timer.median if timer else None,
        "seconds": time.time() - started,
        "environment": {
            **environment,
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
    metric_names(container.get("metrics"))
    for key in ("resume", "progress_bar", "verbose", "compile"):
        if not isinstance(container.get(key, False), bool):
            raise ConfigError(f"{key} must be true or false, got {container[key]!r}.")
    if container.get("init_from") is not None:
        container["init_from"] = _pinned(container["init_from"])
    check_arguments(container["data"], "data", SequenceDataModule)
    check_arguments(container["task"], "task", SequenceTask, ("config", "spec"))
    check_arguments(container["trainer"], "trainer", pl.Trainer, ("callbacks", "logger", "default_root_dir"))
    check_arguments(container["optimizer"], "optimizer", torch.optim.Optimizer, ("params",))
    _check_numbers(container)
    target_class(container["model"], "model", torch.nn.Module)
    check_arguments(container["attention"], "attention", AttentionMechanism, SHAPE_ARGUMENTS)
    return container


def _pinned(init_from: Any) -> dict[str, str]:
    """`init_from` with the checksum of the file, so that a record says which weights these were."""
    noted = init_from if isinstance(init_from, Mapping) else {"path": init_from}
    path = noted.get("path")
    if not isinstance(path, str) or not Path(path).is_file():
        raise ConfigError(f"init_from must be a checkpoint file or null, got {path!r}.")
    digest = record.file_digest(path)
    if noted.get("sha256", digest) != digest:
        raise ConfigError(f"init_from={path!r} holds other weights than those with the checksum {noted['sha256']!r}.")
    return {"path": path, "sha256": digest}


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
    interval = trainer.get("val_check_interval")
    if isinstance(interval, int | float) and not ((interval >= 1 and isinstance(interval, int)) or 0 < interval <= 1):
        raise ConfigError(
            f"trainer.val_check_interval must be a share of an epoch above 0 or a number of steps, got {interval!r}."
        )
    every = trainer.get("check_val_every_n_epoch", 1)
    if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise ConfigError(f"trainer.check_val_every_n_epoch must be a whole number above 0 or null, got {every!r}.")
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
    trainer = config["trainer"]
    budget = next((key for key in ("max_epochs", "max_steps", "limit_train_batches") if trainer.get(key) == 0), None)
    if budget is None or config.get("init_from"):
        return
    new = getattr(task.model, "new_parameters", None)
    if new is None or new:
        which = f"; model.path has no fitting {new[0]}" if new else ", and this model starts at random"
        raise ConfigError(f"trainer.{budget}=0 tests a model that was trained before{which}.")


def warm_start(task: SequenceTask, config: Mapping[str, Any]) -> None:
    """Put the weights of the checkpoint `init_from`, if one is named, in place of those drawn; nothing else of it.

    Raises:
        ConfigError: the file cannot be read, or not all weights fit; the first that do not are named.
    """
    if not config.get("init_from"):
        return
    path = config["init_from"]["path"]
    try:
        weights = checkpoints.saved_weights(path)
    except ValueError as error:
        raise ConfigError(f"init_from={path!r} {error}.") from error
    own = task.state_dict()
    misfits = [
        f"{name} is {_shape(weights, name)} there and {_shape(own, name)} here"
        for name in [*own, *(name for name in weights if name not in own)]
        if _shape(weights, name) != _shape(own, name)
    ]
    if misfits:
        more = f" and {len(misfits) - 3} more" if len(misfits) > 3 else ""
        raise ConfigError(f"init_from={path!r} does not fit this model: {', '.join(misfits[:3])}{more}.")
    task.load_state_dict(weights)


def _shape(weights: Mapping[str, Any], name: str) -> str:
    return str(tuple(weights[name].shape)) if name in weights else "missing"


def compile_model(task: SequenceTask, config: Mapping[str, Any]) -> None:
    """Have torch compile the model when it is first called, if the configuration says so; weights keep their names."""
    if config.get("compile"):
        task.model.compile()


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


# -- the folder ----------------------------------------------------------------------------------------


def find_run(config: Mapping[str, Any]) -> tuple[Path, dict[str, Any] | None]:
    """Where a run writes, and its record if it is to be resumed and has ended well.

    A fresh run never enters a folder in which something ran before: it gets the next free number.

    Raises:
        ConfigError: the folder holds files that no run has written, or the run to be resumed is another one.
    """
    folder = run_folder(config)
    fresh, number = folder, 1
    while not config["resume"] and record.holds_run(fresh):
        number += 1
        fresh = folder.with_name(f"{folder.name}-{number}")
    if record.is_foreign(fresh):
        raise ConfigError(f"paths.run_dir must be a new folder, an empty one or that of a run, got {str(fresh)!r}.")
    refuse_another_run(fresh, config)
    return fresh, read_finished(fresh, config)


def refuse_another_run(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse to take the run in a folder for that of a configuration if anything that decides it differs.

    Raises:
        ConfigError: names the first keys that differ.
    """
    stored = record.stored_config(folder)
    found = [] if stored is None else record.differences(stored, config)
    if found:
        told = ", ".join(f"{key} {was!r} there and {asked!r} here" for key, was, asked in found[:3])
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        longer = "; extend trains a finished run longer" if {key for key, _, _ in found} <= BUDGET_KEYS else ""
        raise ConfigError(f"resume=true cannot continue {folder}, which is another run: {told}{more}{longer}.")


def refuse_extension(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse to extend what is no finished run of the same configuration, or not to train longer than it.

    Raises:
        ConfigError: one sentence that names the key.
    """
    if not config.get("extend") or (config["resume"] and checkpoints.find_resume_point(folder).path is not None):
        return
    source = Path(str(config["extend"]))
    known, stored = record.read_result(source), record.stored_config(source)
    if known is None or stored is None or known.get("status") != "finished":
        raise ConfigError(f"extend must be the folder of a finished run, got {str(source)!r}.")
    found = [item for item in record.differences(stored, config) if item[0] not in BUDGET_KEYS]
    if found:
        told = ", ".join(f"{key} {was!r} there and {asked!r} here" for key, was, asked in found[:3])
        raise ConfigError(f"extend={str(source)!r} is a run with other settings than its length: {told}.")
    for key, done in (("max_epochs", known["epochs"]), ("max_steps", known["steps"])):
        limit = config["trainer"].get(key, -1)
        if limit is not None and limit != -1 and limit <= done:
            raise ConfigError(f"trainer.{key} must be above the {done} that extend={str(source)!r} made, got {limit}.")
    if checkpoints.find_resume_point(source).path is None:
        raise ConfigError(f"extend={str(source)!r} has no {checkpoints.FOLDER}/{checkpoints.LAST} to go on from.")


def extend_run(config: Mapping[str, Any], folder: Path) -> checkpoints.ResumePoint:
    """Copy what training on needs from the finished run into the folder of the one that extends it."""
    source = Path(config["extend"])
    if (source / METRICS_FILE).is_file():
        with record.open_atomically(folder / METRICS_FILE) as file:
            file.write((source / METRICS_FILE).read_bytes())
    return checkpoints.copy_to_extend(checkpoints.find_resume_point(source), folder)


def extended(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a record says about the run that this one extends; None for a run from the start."""
    if not config.get("extend"):
        return None
    known = record.read_result(config["extend"]) or {}
    return {"run_dir": config["extend"], **{key: known.get(key) for key in ("config_hash", "epochs", "steps")}}


def read_finished(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of a run that has ended well, with the metrics of a configuration as far as its predictions go."""
    if not record.is_finished(folder):
        return None
    return with_metrics(record.read_result(folder) or {}, folder, metric_names(config.get("metrics")))


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
        "init_from": config.get("init_from"),
        "extends": extended(config),
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


def save_predictions(folder: Path, task: SequenceTask) -> None:
    """Arrays `prediction`, `probability` and `label` as a file, one entry per scored test item."""
    if task.predictions is None:
        return
    arrays: dict[str, Any] = {
        key: value.numpy().astype(np.float32 if value.is_floating_point() else np.int32)
        for key, value in task.predictions.items()
    }
    with record.open_atomically(folder / PREDICTIONS_FILE) as file:
        np.savez_compressed(file, **arrays)


# -- the verb ------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """`approx-attn train`: run what the command line says and print where the results are."""
    return run_command("train", _train_and_report, arguments, check=check_run)


def _train_and_report(config: DictConfig) -> None:
    result = train(config)
    asked = metric_names(config.get("metrics"))
    of_asked = (key for key in result.metrics if key.startswith(tuple(f"test/{name}" for name in asked)))
    shown = dict.fromkeys(("test/accuracy", "test/loss", *of_asked))
    figures = ", ".join(f"{key} {result.metrics[key]:.4f}" for key in shown if key in result.metrics)
    begun = "extended" if result.record.get("extends") else "trained"
    known = "finished before" if result.task is None else ("continued" if result.resumed else begun)
    if result.record.get("tested_weights") == "last":
        known = f"{known} (tested: the last weights)"
    label = f"{result.record['name']} · {result.record['attention']} · seed {result.record['seed']}"
    print(f"{label}: {known}, {figures}\n  {result.run_dir}")
    for name in lacking(result.record, asked):
        print(f"  {name}: {how_to_get(name, result.run_dir)}")
    require_finite({key: value for key, value in result.metrics.items() if key.startswith("test/")})
