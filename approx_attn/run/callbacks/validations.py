"""Keeps what validations found, and says before the first step if there will be none."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytorch_lightning as pl

log = logging.getLogger(__name__)

DIGITS = 6  # of a figure of the history


class Validations(pl.Callback):
    """Counts the validations of a run and keeps their figures; warns at its start if it ends before the first.

    Attributes:
        count: validations so far, those before a resumption among them.
        history: figure, such as `val/loss` -> [optimizer steps made, figure] of every validation; one number per
            class is left out. None where a resumed run did not keep those before.
    """

    def __init__(self) -> None:
        self.count = 0
        self.history: dict[str, list[list[float]]] | None = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        reason = None if self.count or not trainer.is_global_zero else why_none(trainer)
        if reason is not None:
            log.warning("%s, so there is no validation; no val/ figure stops the run or chooses its weights.", reason)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.count += 1
        if self.history is None:
            return
        for key, value in trainer.callback_metrics.items():
            if key.startswith("val/") and key.count("/") == 1:
                self.history.setdefault(key, []).append([trainer.global_step, float(f"{float(value):.{DIGITS}g}")])

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count, self.history = state_dict["count"], state_dict.get("history")


def why_none(trainer: pl.Trainer) -> str | None:
    """Why a trainer that has its data comes to no validation, in words of its options; None if it comes to one."""
    if not trainer.enable_validation:
        return f"trainer.limit_val_batches={trainer.limit_val_batches} leaves nothing to validate on"
    per_epoch, within = trainer.num_training_batches, trainer.val_check_batch
    if within is None:  # by the clock
        return None
    every = trainer.check_val_every_n_epoch
    first = within if every is None else (every - 1) * per_epoch + min(within, per_epoch)
    if trainer.max_epochs not in (None, -1) and trainer.max_epochs * per_epoch < first:  # type: ignore[operator]
        return f"trainer.max_epochs={trainer.max_epochs} ends before the first validation, after batch {first:.0f}"
    steps = math.ceil(per_epoch / trainer.accumulate_grad_batches)  # of an epoch
    epochs, rest = divmod(trainer.max_steps, max(steps, 1))
    if trainer.max_steps != -1 and epochs * per_epoch + rest * trainer.accumulate_grad_batches < first:
        return f"trainer.max_steps={trainer.max_steps} ends before the first validation, after batch {first:.0f}"
    return None
