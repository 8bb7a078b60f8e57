"""Test a checkpoint; the checkpoint alone says which model on which data.

metrics = evaluate("runs/digits/exact/…-seed1/checkpoints/best.ckpt")

Another mechanism can take the place of the one it was trained with, fitted to training data and otherwise untrained.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from approx_attn.attention import attention_class
from approx_attn.attention.calibrated import CalibratedMechanism
from approx_attn.config.instantiate import build, sentence
from approx_attn.config.trust import refuse_plugins
from approx_attn.conversion.convert import attention_spec
from approx_attn.conversion.convert import convert as convert_model
from approx_attn.data.base import SequenceDataModule
from approx_attn.errors import ConfigError, require_count
from approx_attn.metrics import metric_names
from approx_attn.run import checkpoints
from approx_attn.run.callbacks import ProgressBar, SeedSteps
from approx_attn.run.tasks.base import SequenceTask
from approx_attn.run.train import make_splits
from approx_attn.run.trainer import quiet

SPLITS = ("val", "test")


def load_task(checkpoint: str | Path) -> SequenceTask:
    """The task in a checkpoint, in evaluation mode on the CPU.

    Only tensors and plain containers are read from the file, and only classes of this package are built
    from them.

    Raises:
        ConfigError: no such file, or not a checkpoint of this project.
    """
    path = Path(checkpoint)
    if not path.is_file():
        raise ConfigError(f"checkpoint={str(path)!r} is not a file.")
    damage = checkpoints.damage(path)
    if damage is not None:
        raise ConfigError(f"checkpoint={str(path)!r} cannot be read: it {damage}.")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        parameters = saved["hyper_parameters"]
        config, spec, weights = parameters["config"], parameters["spec"], saved["state_dict"]
    except Exception as error:  # damaged files fail in many ways
        raise ConfigError(f"checkpoint={str(path)!r} cannot be read: {sentence(error, 'checkpoint')}") from error
    refuse_plugins(config, f"checkpoint={str(path)!r}")
    # Bases that were fitted beforehand are among the weights, so their file is not needed any more.
    task = build(config["task"], "task", SequenceTask, config=config, spec=spec)
    try:
        task.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigError(f"checkpoint={str(path)!r} does not fit its own model: {error}") from error
    return task.eval()


def evaluate(
    checkpoint: str | Path,
    *,
    split: str = "test",
    metrics: Sequence[str] | None = None,
    convert: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    trainer: Mapping[str, Any] | None = None,
    progress_bar: bool = False,
    verbose: bool = False,
) -> dict[str, float]:
    """Loss, accuracy and other metrics of a checkpoint on the split it was tested on, or on another.

    Args:
        checkpoint: a file that training wrote.
        split: `test` or `val`.
        metrics: names of `approx_attn.metrics.METRICS`; None for those of its run.
        convert: what is put into the trained model before, as `approx_attn.convert` takes it: `attention` (a mechanism,
            or `{"name": ..., **options}`), `layers` and `feed_forward`, and the number of `calibration_sequences` of
            the training data, 256 unless given, that a mechanism with something to calibrate is fitted to. None, or
            nothing in it, tests the model as it was trained.
        data: options of the data module that replace the stored ones, such as a path or a batch size.
        trainer: options of Lightning's trainer that replace the stored accelerator and precision. One device tests.

    Returns:
        Figures by name, such as `test/accuracy`.

    Raises:
        ConfigError: an unreadable checkpoint, or an impossible option.
    """
    if split not in SPLITS:
        raise ConfigError(f"split must be one of {', '.join(SPLITS)}, got {split!r}.")
    with quiet(verbose), tempfile.TemporaryDirectory() as nowhere:
        task = load_task(checkpoint)
        if metrics is not None:
            task.use_metrics(metric_names(metrics))
        config = dict(task.config)
        # Where a stranger's checkpoint would have data written is not for it to say.
        stored = {key: value for key, value in config["data"].items() if key != "cache_dir"}
        module = build({**stored, **(data or {})}, "data", SequenceDataModule)
        make_splits(module)
        if convert and (convert.get("attention") is not None or convert.get("feed_forward") is not None):
            _convert(task, module, **convert)
        kept = {key: config["trainer"][key] for key in ("_target_", "accelerator", "precision")}
        kept["devices"] = 1  # however many trained it: no item is padded, and no process is to be started
        runner = build(
            {**kept, "limit_test_batches": config["trainer"].get("limit_test_batches", 1.0), **(trainer or {})},
            "trainer",
            pl.Trainer,
            callbacks=[SeedSteps(config["seed"]), *([ProgressBar()] if progress_bar else [])],
            logger=False,
            enable_progress_bar=progress_bar,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=nowhere,
        )
        if runner.world_size > 1:
            raise ConfigError(f"trainer.devices must be 1 to evaluate, got {runner.world_size} processes.")
        loaders = {"test": module.test_dataloader, "val": module.val_dataloader}
        figures = runner.test(task, dataloaders=loaders[split](), verbose=False)[0]
    return {key.replace("test/", f"{split}/"): float(value) for key, value in figures.items()}


def _convert(
    task: SequenceTask,
    module: SequenceDataModule,
    attention: str | Mapping[str, Any] | None = None,
    layers: str | Sequence[str] | None = None,
    feed_forward: Mapping[str, Any] | None = None,
    calibration_sequences: int = 256,
) -> None:
    """Put a mechanism into a trained model, and top-k units into its feed-forward blocks."""
    try:
        wanted = require_count("convert.calibration_sequences", calibration_sequences)
        batches: list[dict[str, Any]] = []
        seen = 0
        for batch in module.train_dataloader():
            batches.append(task.inputs(batch))
            seen += len(batch["labels"])
            if seen >= wanted:
                break
        spec = attention_spec("exact" if attention is None else attention, {})
        fitted = issubclass(attention_class(spec["name"]), CalibratedMechanism)
        given: dict[str, Any] = {"calibration": batches} if fitted else {}
        given |= {"example": batches[0], "max_length": task.spec["max_length"]}
        convert_model(task.model, spec, layers=layers, feed_forward=feed_forward, **given)
    except ValueError as error:
        raise ConfigError(sentence(error, "convert")) from error
