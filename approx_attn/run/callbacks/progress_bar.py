"""The progress bar: loss, accuracy and examples per second."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.callbacks.progress.rich_progress import ProcessingSpeedColumn
from rich.progress import BarColumn
from rich.table import Column


class ProgressBar(RichProgressBar):
    """Lightning's rich bar on one line, with short names, and the training speed in examples per second.

    Args:
        refresh_rate: batches between updates.
        leave: keep the bar of every epoch on the screen.
    """

    update_seconds = 0.2  # reading a metric waits for the device, so the bar reads them a few times a second

    def __init__(self, refresh_rate: int = 1, leave: bool = False) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=leave)
        self._shown: dict[str, Any] = {}
        self._read_at = 0.0
        self._examples = 0.0
        self._seconds = 0.0
        self._batch_started = 0.0

    def configure_columns(self, trainer: pl.Trainer) -> list[Any]:
        columns = [c for c in super().configure_columns(trainer) if not isinstance(c, ProcessingSpeedColumn)]
        for column in columns:
            if isinstance(column, BarColumn):
                column.bar_width = 8  # the figures need the place
        return columns

    def _init_progress(self, trainer: pl.Trainer) -> None:
        super()._init_progress(trainer)
        if self._metric_component is not None:  # cut at the edge of the terminal, not wrapped
            self._metric_component._table_column = Column(no_wrap=True, overflow="ellipsis")

    def _get_train_description(self, current_epoch: int) -> str:
        of = f"/{self.trainer.max_epochs}" if (self.trainer.max_epochs or -1) > 0 else ""
        return f"Epoch {current_epoch + 1}{of}".ljust(len(self.validation_description))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch_started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # A running mean that forgets: the speed now, not since the start.
        self._examples = 0.98 * self._examples + len(batch["labels"]) * trainer.world_size
        self._seconds = 0.98 * self._seconds + time.perf_counter() - self._batch_started
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        now = time.monotonic()
        if now - self._read_at >= self.update_seconds or not self._shown:
            self._read_at = now
            metrics = super().get_metrics(trainer, pl_module)
            metrics.pop("v_num", None)
            short = {key: key.removeprefix("train/").replace("/", " ").replace("accuracy", "acc") for key in metrics}
            self._shown = {short[key]: value for key, value in metrics.items()}
            self._shown["examples/s"] = f"{self._examples / max(self._seconds, 1e-9):,.0f}"
        return self._shown
