"""The verb `approx-attn estimate`."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf

from approx_attn.command import run_plain
from approx_attn.config.compose import compose_config, config_dir, parse_overrides, plain
from approx_attn.diagnosis.estimation.duration import computed_time, measured_time
from approx_attn.diagnosis.estimation.figures import Estimate, as_table, verdict
from approx_attn.diagnosis.estimation.memory import estimate_memory
from approx_attn.errors import ConfigError
from approx_attn.output import print_table
from approx_attn.run import train as training
from approx_attn.run.trainer import build_trainer, deterministic_algorithms_restored, quiet


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
    container = on_this_machine(training.check_config(config))
    with quiet(), deterministic_algorithms_restored(), tempfile.TemporaryDirectory() as nowhere:
        data = training.check_run(container, Path(nowhere))
        training.make_splits(data)
        pl.seed_everything(container["seed"], workers=True, verbose=False)
        task = training.build_task(container, data.spec)
        world = build_trainer(container, Path(nowhere)).world_size
        single = on_one_device(config, batch_size)
        result = Estimate()
        estimate_memory(result, container, task, data, world)
        if tflops is None:
            result.time = measured_time(single, container, data, world, steps, Path(nowhere))
        else:
            result.time = computed_time(container, task, data, world, tflops * 1e12 * utilization)
            result.notes.append(
                "Time is at least that: it is of operations alone, and small models are bound by starting them."
            )
    if world > 1:
        result.notes.append("Messages between devices are not in the time.")
    if (container.get("callbacks") or {}).get("early_stopping"):
        result.notes.append("Early stopping may end the run sooner.")
    return result


def on_this_machine(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of any machine as one that can be built on this one, its processes on the CPU if need be."""
    own = copy.deepcopy(dict(config))
    devices = own["trainer"].get("devices")
    if not torch.cuda.is_available() or (isinstance(devices, int) and devices > torch.cuda.device_count()):
        own["trainer"]["accelerator"] = "cpu"
    return own


def on_one_device(config: Mapping[str, Any], batch_size: int | None) -> dict[str, Any]:
    """The configuration on one device, with a batch that it bears."""
    own = copy.deepcopy(dict(config))
    own["trainer"].update(devices=1, num_nodes=1, strategy="auto")
    own = on_this_machine(own)
    if batch_size is not None:
        own["data"]["batch_size"] = batch_size
    return own


# -- the verb ------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """`approx-attn estimate`; returns the exit code."""
    return run_plain("estimate", lambda: _estimate_and_report(arguments), arguments)


def split_words(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The keys of `configs/estimate.yaml`, and the words of the training run.

    Raises:
        ConfigError: a word that cannot be read, or an impossible value.
    """
    overrides = parse_overrides(arguments)
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
    if own["utilization"] > 1:
        raise ConfigError(f"utilization must be a share above 0 and up to 1, got {own['utilization']!r}.")
    return own, words


def _estimate_and_report(arguments: Sequence[str]) -> None:
    own, words = split_words(arguments)
    memory = own.pop("memory")
    config = compose_config([*words, "progress_bar=false"])
    result = estimate(plain(config), **own)
    print_table(as_table(result, " ".join(words)))
    if memory is not None:
        print(verdict(result, memory, config.data.batch_size))
    for note in result.notes:
        print(note)
