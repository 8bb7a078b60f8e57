"""Seconds per training step."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections import deque
from typing import Any

import pytorch_lightning as pl
import torch

FIRST_STEPS = 5  # timed before the duration of training is estimated
LONG = 15 * 60  # seconds of training that are worth a word


class StepTimer(pl.Callback):
    """Median seconds of a training step: forward, backward, optimizer; data loading and evaluation left out.

    Says after the first steps how long training will take, if that is long.

    Args:
        warm_up: first steps after a start that are not counted (allocator, compilation, caches).
        window: most recent steps that are kept.
    """

    def __init__(self, warm_up: int = 5, window: int = 2000) -> None:
        self.warm_up = warm_up
        self.seconds: deque[float] = deque(maxlen=window)
        self._seen = 0
        self._start = 0.0

    @property
    def median(self) -> float | None:
        """Median seconds, or None before any counted step."""
        return statistics.median(self.seconds) if self.seconds else None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        _wait_for(pl_module.device)
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        _wait_for(pl_module.device)
        self._seen += 1
        if self._seen > self.warm_up:
            self.seconds.append(time.perf_counter() - self._start)
        if self._seen == self.warm_up + FIRST_STEPS and trainer.is_global_zero:
            self._say_how_long(trainer, pl_module.device)

    def _say_how_long(self, trainer: pl.Trainer, device: torch.device) -> None:
        batches = trainer.estimated_stepping_batches * trainer.accumulate_grad_batches
        left = batches - trainer.fit_loop.total_batch_idx
        seconds = left * (self.median or 0.0)
        if LONG <= seconds < math.inf:
            steps = f"{left:,.0f} steps of {self.median:.2g} s on {device}, evaluation not counted"
            print(f"training will take about {seconds / 3600:.1f} h: {steps}", file=sys.stderr, flush=True)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": list(self.seconds)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds.extend(state_dict["seconds"])


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
