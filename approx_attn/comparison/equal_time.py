"""Comparisons at equal time: as many steps for every mechanism as take it the time of the reference's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from approx_attn.comparison.aggregate import StepMeasurement
from approx_attn.comparison.plan import Comparison
from approx_attn.errors import ConfigError


@dataclass(frozen=True)
class Length:
    """How long a run trains if nothing ends it early.

    Attributes:
        steps: of the optimizer.
        batches: that these take.
        validations: on the way; None where they go by the clock.
    """

    steps: int
    batches: int
    validations: int | None


def at_equal_time(
    comparison: Comparison, measured: Mapping[str, StepMeasurement], batches_per_epoch: int
) -> Comparison:
    """The comparison with as many steps for each mechanism as take the time of the reference's steps.

        steps = round(steps of the reference · seconds of its step / seconds of the mechanism's step)

    The schedule is scaled with them, and there are as many validations, so that the best checkpoint is the best of
    as many. The reference's runs stay what they are at equal steps.

    Args:
        comparison: at equal steps.
        measured: a training step of every mechanism.
        batches_per_epoch: of the training data.

    Raises:
        ConfigError: the reference makes no step.
    """
    reference = comparison.reference
    config = comparison.config
    whole, base = length(config["trainer"], batches_per_epoch), measured[reference].seconds
    if whole.steps == 0:
        raise ConfigError("equal=time needs a reference that trains, got one that makes no step.")
    runs = {}
    for label, by_seed in comparison.runs.items():
        steps = max(round(whole.steps * base / measured[label].seconds), 1)
        settings = {} if label == reference else scaled(config, whole, steps, batches_per_epoch)
        runs[label] = {seed: run.having(settings) for seed, run in by_seed.items()}
    accumulated = config["trainer"].get("accumulate_grad_batches", 1)
    terms = replace(comparison.terms, equal="time", steps=whole.steps, seconds=whole.steps * base * accumulated)
    return replace(comparison, runs=runs, terms=terms)


def length(trainer: Mapping[str, Any], batches_per_epoch: int) -> Length:
    """How long the trainer of a configuration trains."""
    epoch, accumulated = _epoch(trainer, batches_per_epoch), trainer.get("accumulate_grad_batches", 1)
    per_epoch = math.ceil(epoch / accumulated)  # the last step of an epoch takes what is left
    epochs, most = trainer["max_epochs"], trainer.get("max_steps", -1)
    steps = min(epochs * per_epoch if epochs != -1 else math.inf, most if most != -1 else math.inf)
    assert steps < math.inf  # a configuration without an end is refused
    whole, rest = divmod(int(steps), max(per_epoch, 1))
    rest *= accumulated
    batches = whole * epoch + rest
    interval = trainer.get("val_check_interval") or 1.0
    every = trainer.get("check_val_every_n_epoch", 1)
    if not isinstance(interval, int | float):
        return Length(int(steps), batches, None)
    within = max(int(epoch * interval), 1) if isinstance(interval, float) else interval
    if every is None:
        return Length(int(steps), batches, batches // within)
    in_last = rest // within if (whole + 1) % every == 0 else 0
    return Length(int(steps), batches, whole // every * (epoch // within) + in_last)


def scaled(config: Mapping[str, Any], whole: Length, steps: int, batches_per_epoch: int) -> dict[str, Any]:
    """The settings of a run of another number of steps: its end, its validations, and a warm-up counted in steps.

    Args:
        config: of a run of length `whole`.
        whole: that length.
        steps: the other number.
        batches_per_epoch: of the training data.
    """
    settings: dict[str, Any] = {"trainer.max_epochs": -1, "trainer.max_steps": steps}
    if whole.validations:
        batches = length({**config["trainer"], "max_epochs": -1, "max_steps": steps}, batches_per_epoch).batches
        settings["trainer.val_check_interval"] = max(batches // whole.validations, 1)
        settings["trainer.check_val_every_n_epoch"] = None
    warmup = (config.get("scheduler") or {}).get("warmup", 0)
    if isinstance(warmup, int | float) and warmup >= 1:
        settings["scheduler.warmup"] = max(round(warmup * steps / whole.steps), 1)
    return settings


def _epoch(trainer: Mapping[str, Any], batches_per_epoch: int) -> int:
    """Batches of an epoch as `trainer.limit_train_batches` leaves them: a number, or a share."""
    limit = trainer.get("limit_train_batches", 1.0)
    return min(limit, batches_per_epoch) if isinstance(limit, int) else int(batches_per_epoch * (limit or 1.0))
