"""Stops a run whose loss is no longer a number, or grows without end."""

from __future__ import annotations

import math
from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch import Tensor

from approx_attn.run.tasks.base import SequenceTask


class DivergedError(RuntimeError):
    """The loss became infinite or NaN, or exploded."""


class FiniteLoss(pl.Callback):
    """Raises `DivergedError` with the step, the mechanism and the likely cause.

    Args:
        every_n_steps: how often to look; on an accelerator every look waits for the device. The first step
            without a finite loss is named all the same.
        factor: a loss this many times the first one (or 1, if that was less) counts as exploded ...
        patience: ... when so many looks in a row find it so.
    """

    def __init__(self, every_n_steps: int = 10, factor: float = 10.0, patience: int = 5) -> None:
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not factor > 1.0:
            raise ValueError(f"callbacks.finite_loss.factor must be a number above 1, got {factor!r}.")
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise ValueError(f"callbacks.finite_loss.patience must be a whole number of at least 1, got {patience!r}.")
        self.every_n_steps = max(int(every_n_steps), 1)
        self.factor = float(factor)
        self.patience = patience
        self.first: float | None = None
        self.high = 0
        self._bad_step: Tensor | None = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if outputs is None:
            return
        loss: Tensor = outputs["loss"].detach()
        self._note(loss, trainer.global_step)
        # The last step is looked at too: short runs would end before the first look.
        if trainer.global_step % self.every_n_steps == 0 or trainer.is_last_batch:
            self._look(trainer, pl_module, loss)

    def _note(self, loss: Tensor, step: int) -> None:
        """Remember the first step without a finite loss, on the device and without waiting for it."""
        never = torch.iinfo(torch.int64).max
        if self._bad_step is None:
            self._bad_step = torch.full((), never, dtype=torch.int64, device=loss.device)
        self._bad_step = torch.where(torch.isfinite(loss), self._bad_step, self._bad_step.clamp(max=step))

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        value = float(loss)
        assert self._bad_step is not None
        bad_step = int(self._bad_step)
        if bad_step <= trainer.global_step:
            found = f"the loss is {value if not math.isfinite(value) else 'not finite'} at step {bad_step}"
            raise DivergedError(self._message(trainer, pl_module, found, bad_step))
        if self.first is None:
            self.first = value
        self.high = self.high + 1 if value > self.factor * max(self.first, 1.0) else 0
        if self.high >= self.patience:
            found = f"the loss is {value:.3g} at step {trainer.global_step}, up from {self.first:.3g} at first,"
            raise DivergedError(self._message(trainer, pl_module, found, trainer.global_step))

    def _message(self, trainer: pl.Trainer, pl_module: pl.LightningModule, found: str, step: int) -> str:
        names = sorted({mechanism.name for mechanism in cast(SequenceTask, pl_module).mechanisms})
        group = trainer.optimizers[0].param_groups[0]
        rate = group.get("initial_lr", group["lr"])  # that of the configuration, wherever the schedule stands
        return (
            f"{found} with attention={'+'.join(names) or '?'} (learning rate {rate:.2g}, precision "
            f"{trainer.precision}); {_likely_cause(str(trainer.precision), step)}."
        )

    def state_dict(self) -> dict[str, Any]:
        return {"first": self.first, "high": self.high}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.first, self.high = state_dict["first"], state_dict["high"]


def _likely_cause(precision: str, step: int) -> str:
    if precision.startswith("16"):
        return "the likely cause is the small range of float16: use trainer.precision=bf16-mixed or 32"
    if step <= 1:
        return (
            "no step had been made yet, so the likely cause is the data, the initial weights or an option of the "
            "mechanism, not the learning rate"
        )
    return (
        "the likely cause is a learning rate too high for this mechanism: lower optimizer.lr, set "
        "trainer.gradient_clip_val, or use trainer.precision=32"
    )
