"""What is wrong with the values of a configuration, said before anything is built, read or written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig

from approx_attn.attention import AttentionMechanism
from approx_attn.attention.registry import SHAPE_ARGUMENTS
from approx_attn.config.compose import plain
from approx_attn.config.instantiate import check_arguments, require_plain_name, sentence, target_class
from approx_attn.config.trust import refuse_plugins
from approx_attn.data.base import SequenceDataModule
from approx_attn.errors import ConfigError, suggestion
from approx_attn.metrics import metric_names
from approx_attn.models.base import SequenceModel
from approx_attn.run import record
from approx_attn.run.tasks.base import SequenceTask

REQUIRED_KEYS = frozenset(
    {"name", "seed", "resume", "progress_bar", "verbose", "paths"}
    | {"attention", "data", "model", "task", "optimizer", "trainer"}
)
OPTIONAL_KEYS = frozenset({"scheduler", "callbacks", "logger", "metrics", "init_from", "extend", "compile"})


def check_config(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as plain containers, with everything refused that can be without the data.

    Raises:
        ConfigError: one sentence that names the key.
    """
    container = plain(config)
    refuse_plugins(container, "a configuration")
    for key in container:
        if key not in REQUIRED_KEYS | OPTIONAL_KEYS:
            raise ConfigError(f"{key} is not a key{suggestion(key, REQUIRED_KEYS | OPTIONAL_KEYS)}")
    for key in sorted(REQUIRED_KEYS):
        if container.get(key) is None:
            raise ConfigError(f"{key} must be set.")
    require_plain_name("name", container["name"])
    seed = container["seed"]
    if not _is_whole(seed) or not 0 <= seed < 2**32:
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
    _check_budget(container)
    target_class(container["model"], "model", SequenceModel)
    check_arguments(container["attention"], "attention", AttentionMechanism, SHAPE_ARGUMENTS)
    return container


def check_model(config: Mapping[str, Any]) -> None:
    """What can be refused of a model before the data are read, such as a path at which there is none.

    Raises:
        ConfigError: one sentence that names the key.
    """
    model: type[SequenceModel] = target_class(config["model"], "model", SequenceModel)
    try:
        model.check_options(config["model"])
    except ValueError as error:
        raise ConfigError(sentence(error, "model")) from error


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


def _check_budget(config: Mapping[str, Any]) -> None:
    """Numbers that the optimizer and the trainer would refuse late, or not at all."""
    trainer = config["trainer"]
    rate = config["optimizer"].get("lr")
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
        raise ConfigError(f"optimizer.lr must be a number above 0, got {rate!r}.")
    epochs = trainer.get("max_epochs")
    if not _is_whole(epochs) or epochs < -1:
        raise ConfigError(
            f"trainer.max_epochs must be a whole number, 0 to test without training or -1 for no limit, got {epochs!r}."
        )
    accumulated = trainer.get("accumulate_grad_batches", 1)
    if not _is_whole(accumulated) or accumulated < 1:
        raise ConfigError(f"trainer.accumulate_grad_batches must be a whole number above 0, got {accumulated!r}.")
    interval = trainer.get("val_check_interval")
    if isinstance(interval, int | float) and not ((interval >= 1 and isinstance(interval, int)) or 0 < interval <= 1):
        raise ConfigError(
            f"trainer.val_check_interval must be a share of an epoch above 0 or a number of steps, got {interval!r}."
        )
    every = trainer.get("check_val_every_n_epoch", 1)
    if every is not None and (not _is_whole(every) or every < 1):
        raise ConfigError(f"trainer.check_val_every_n_epoch must be a whole number above 0 or null, got {every!r}.")
    if epochs == -1 and trainer.get("max_steps", -1) == -1 and not trainer.get("max_time"):
        raise ConfigError("trainer.max_epochs=-1 needs trainer.max_steps or trainer.max_time, else a run never ends.")


def check_trained(config: Mapping[str, Any], task: SequenceTask) -> None:
    """Refuse to test a model that has parts that nothing has trained.

    Raises:
        ConfigError: no training is asked for, and the model is not wholly one that was trained before.
    """
    trainer = config["trainer"]
    budget = next((key for key in ("max_epochs", "max_steps", "limit_train_batches") if trainer.get(key) == 0), None)
    if budget is None:
        return
    new = task.model.new_parameters
    if new is None or new:
        source = "init_from" if config.get("init_from") else "model.path"
        which = f"; {source} has no fitting {new[0]}" if new else ", and this model starts at random"
        raise ConfigError(f"trainer.{budget}=0 tests a model that was trained before{which}.")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
