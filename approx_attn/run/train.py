"""One training run, from a configuration to a folder of results, as a plain function.

    config = compose_config(["data=digits", "attention=eigen_row", "attention.keep=0.25", "seed=1"])
    result = train(config)
    result.metrics["test/accuracy"]

Everything that can be wrong is found before anything is written: first what the configuration says, then what the
trainer and the model refuse, then the data. A run's folder holds

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
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf

from approx_attn.attention.calibrated import CalibratedMechanism
from approx_attn.config.instantiate import build, sentence
from approx_attn.conversion.calibration import calibrate
from approx_attn.data.base import DataSpec, SequenceDataModule
from approx_attn.errors import ConfigError
from approx_attn.output import require_folder
from approx_attn.run import checkpoints, distributed, record
from approx_attn.run.callbacks import DivergedError, StepTimer, Validations
from approx_attn.run.checks import check_config, check_model, check_trained
from approx_attn.run.folders import (
    attention_label,
    extend_run,
    extended,
    find_run,
    read_finished,
    refuse_extension,
    run_folder,
    warm_start,
)
from approx_attn.run.signals import was_requeued
from approx_attn.run.stored_metrics import save_predictions
from approx_attn.run.tasks.base import SequenceTask
from approx_attn.run.trainer import build_trainer, deterministic_algorithms_restored, fit_from, quiet, restore_best


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
        trainer = build_trainer(container, folder, callbacks)
        data = build(container["data"], "data", SequenceDataModule)
        check_model(container)
        if not data.has_static_spec:  # the shape of the model is in the data
            make_splits(data)
        task = build_task(container, data.spec)
        if data.has_static_spec:
            make_splits(data)
        warm_start(task, container)
        check_trained(container, task)
        refuse_extension(container, folder)
        if distributed.must_start(trainer):
            folder, resumed = distributed.start(_train_in_process, container, trainer.world_size)
            known = record.read_json(folder / record.RESULT_FILE) or {}
            return TrainResult(folder, known["metrics"], known, resumed=resumed)
        with distributed.joined(trainer):
            folder = distributed.agree(lambda: folder)
            with distributed.first_only(lambda: record.run_lock(folder)):
                # Another process may have begun or finished it while this one read the data or waited for the lock.
                finished = distributed.agree(lambda: read_finished(folder, container))
                if finished is not None:
                    return TrainResult(folder, finished["metrics"], finished, resumed=True)
                if not container["resume"] and distributed.agree(lambda: record.holds_run(folder)):
                    raise ConfigError(f"{folder} was begun by another process meanwhile; resume=true continues it.")
                return _fit_and_test(container, folder, data, task, trainer)


def _train_in_process(config: dict[str, Any]) -> tuple[Path, bool]:
    """`train` in one of several processes: where it wrote, and whether the run had begun before."""
    result = train(config)
    return result.run_dir, result.resumed


def _fit_and_test(
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
    if start.path is None:
        fit_bases(task, data, config)
    compile_model(task, config)
    try:
        fit_from(start, task, data, trainer)
    except Exception as error:
        failure = {**describe_run(config, task, data.spec), "status": "failed", "error": sentence(error, "train")}
        failure["diverged"] = isinstance(error, DivergedError)  # as it would be again
        if distributed.is_first() and not record.is_disk_full(error):
            record.write_json_atomically(folder / record.RESULT_FILE, failure)
        raise
    best = restore_best(task, trainer)
    tested = trainer.test(task, datamodule=data, verbose=False)[0]
    metrics = {key: float(value) for key, value in {**best, **tested}.items()}
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    validations = next(callback for callback in callbacks if isinstance(callback, Validations))
    timer = next((callback for callback in callbacks if isinstance(callback, StepTimer)), None)
    result = {
        **describe_run(config, task, data.spec),
        "status": "finished",
        "metrics": metrics,
        "steps": trainer.global_step,
        "epochs": trainer.current_epoch,
        "validations": validations.count,
        "history": validations.history,
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
        save_predictions(folder, task.predictions)
        record.write_json_atomically(folder / record.RESULT_FILE, result)
    return TrainResult(folder, metrics, result, resumed=resumed, task=task, data=data, trainer=trainer)


# -- the parts -----------------------------------------------------------------------------------------


def check_run(config: DictConfig | Mapping[str, Any], folder: Path | None = None) -> SequenceDataModule:
    """Build everything once without reading data, which refuses all that can be wrong apart from the data.

    Returns:
        The data module, its splits not yet made.

    Raises:
        ConfigError: one sentence that names the key.
    """
    container = check_config(config)
    with quiet(container["verbose"]), deterministic_algorithms_restored():
        build_trainer(container, folder or run_folder(container))
        data = build(container["data"], "data", SequenceDataModule)
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
    """The task of a configuration, its model in the shape of the data and drawn from the seed, its optimizer tried."""
    pl.seed_everything(config["seed"], workers=True, verbose=False)
    task = build(config["task"], "task", SequenceTask, config=config, spec=vars(spec))
    optimizer = task.build_optimizer()
    task.build_scheduler(optimizer, total_steps=1)
    return task


def compile_model(task: SequenceTask, config: Mapping[str, Any]) -> None:
    """Have torch compile the model when it is first called, if the configuration says so; weights keep their names."""
    if config.get("compile"):
        task.model.compile()


def fit_bases(task: SequenceTask, data: SequenceDataModule, config: Mapping[str, Any]) -> None:
    """Fit the bases of a model that was trained before on its first training batches, if it has any."""
    batches = task.model.calibration_batches if task.model.fits_bases else 0
    if batches == 0 or not any(isinstance(mechanism, CalibratedMechanism) for mechanism in task.mechanisms):
        return
    seen = itertools.islice(data.joint_train_batches(), batches * distributed.processes())
    first = [task.inputs(batch) for batch in seen]
    calibrate(task.model, first, progress=config["progress_bar"])


def describe_run(config: dict[str, Any], task: SequenceTask, spec: DataSpec) -> dict[str, Any]:
    """The part of a record that is known before training."""
    parameters = list(task.model.parameters())
    in_attention = {id(p): p.numel() for mechanism in task.mechanisms for p in mechanism.parameters()}
    costs = task.model.costs(spec.max_length, spec.causal)
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
