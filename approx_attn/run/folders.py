"""Where a run writes, and what it starts from: nothing, its own checkpoint, a run that it extends, or other weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from approx_attn.attention import AttentionMechanism
from approx_attn.attention.calibrated import CalibratedMechanism
from approx_attn.config.instantiate import target_class
from approx_attn.errors import ConfigError
from approx_attn.metrics import metric_names
from approx_attn.run import checkpoints, record
from approx_attn.run.stored_metrics import with_metrics
from approx_attn.run.tasks.base import SequenceTask

METRICS_FILE = "metrics.csv"

# What a run that extends another may change: how long it is.
BUDGET_KEYS = frozenset({"trainer.max_epochs", "trainer.max_steps", "trainer.max_time", "extend"})


def run_folder(config: Mapping[str, Any]) -> Path:
    """`paths.run_dir`, or the place below `paths.runs` that the configuration and seed decide."""
    paths = config["paths"]
    if paths.get("run_dir"):
        return Path(paths["run_dir"])
    return record.run_folder(paths["runs"], config, data=str(config["name"]), attention=attention_label(config))


def attention_label(config: Mapping[str, Any]) -> str:
    """The name of the mechanism of a configuration."""
    return target_class(config["attention"], "attention", AttentionMechanism).name  # type: ignore[attr-defined]


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
    _refuse_another_run(fresh, config)
    return fresh, read_finished(fresh, config)


def read_finished(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of a run that has ended well, with the metrics of a configuration as far as its predictions go."""
    result = record.read_result(folder)
    if result is None or result.get("status") != "finished":
        return None
    return with_metrics(result, folder, metric_names(config.get("metrics")))


def _refuse_another_run(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse to take the run in a folder for that of a configuration if anything that decides it differs."""
    stored = record.stored_config(folder)
    found = [] if stored is None else record.differences(stored, config)
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        longer = "; extend trains a finished run longer" if {key for key, _, _ in found} <= BUDGET_KEYS else ""
        raise ConfigError(f"resume=true cannot continue {folder}, which is another run: {_told(found)}{more}{longer}.")


def _told(found: list[tuple[str, Any, Any]]) -> str:
    """The first of the keys in which two runs differ."""
    return ", ".join(f"{key} {was!r} there and {asked!r} here" for key, was, asked in found[:3])


# -- from a finished run, to train it longer -----------------------------------------------------------


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
        raise ConfigError(f"extend={str(source)!r} is a run with other settings than its length: {_told(found)}.")
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


# -- from the weights of another -----------------------------------------------------------------------


def warm_start(task: SequenceTask, config: Mapping[str, Any]) -> None:
    """Put the weights of the checkpoint `init_from`, if one is named, in place of those drawn; nothing else of it.

    A mechanism whose own weights are not all there, as in a checkpoint of other attention, stays as drawn; its bases
    are then fitted before training. Parameters that the model wants drawn anew (`redrawn_parameters`) stay, too.

    Raises:
        ConfigError: the file cannot be read, or not all other weights fit; the first that do not are named.
    """
    if not config.get("init_from"):
        return
    path = config["init_from"]["path"]
    try:
        weights = checkpoints.saved_weights(path)
    except ValueError as error:
        raise ConfigError(f"init_from={path!r} {error}.") from error
    own = task.state_dict()
    weights = {**weights, **{name: own[name] for name in (f"model.{each}" for each in task.model.redrawn_parameters)}}
    names = [name for name in dict.fromkeys([*own, *weights]) if _shape(weights, name) != _shape(own, name)]
    drawn = {
        f"{name}.": mechanism
        for name, mechanism in task.named_modules()
        if isinstance(mechanism, AttentionMechanism) and any(each.startswith(f"{name}.") for each in names)
    }
    misfits = [
        f"{name} is {_shape(weights, name)} there and {_shape(own, name)} here"
        for name in names
        if not name.startswith(tuple(drawn))
    ]
    if misfits:
        more = f" and {len(misfits) - 3} more" if len(misfits) > 3 else ""
        raise ConfigError(f"init_from={path!r} does not fit this model: {', '.join(misfits[:3])}{more}.")
    task.load_state_dict({name: (own if name.startswith(tuple(drawn)) else weights)[name] for name in own})
    task.model.fits_bases = bool(drawn)
    task.model.new_parameters = [
        prefix + name
        for prefix, mechanism in drawn.items()
        if not isinstance(mechanism, CalibratedMechanism)
        for name, _ in mechanism.named_parameters()
    ]


def _shape(weights: Mapping[str, Any], name: str) -> str:
    return str(tuple(weights[name].shape)) if name in weights else "missing"
