"""Randomness as a function of (seed, step), so that a resumed run draws what an uninterrupted one draws."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch


class SeedSteps(pl.Callback):
    """Seeds torch before every training step and every evaluation.

    A run that is killed and resumed then drops the same units and samples the same pairs as one that was
    not, at whatever step the checkpoint was made and however often anything else drew in between. And it sees
    the same data: a loader that was in the middle of an epoch goes on there.

    Args:
        seed: of the run. Processes of a distributed run draw apart from one another.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._loader_states: list[dict[str, int]] = []

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        loop = checkpoint["loops"]["fit_loop"]
        self._loader_states = loop["state_dict"].get("combined_loader", [])
        progress = loop["epoch_progress"]["total"]
        if progress["completed"] != progress["processed"] and loop["epoch_loop.batch_progress"]["is_last_batch"]:
            # The epoch is over; in a run that is counted in steps Lightning would go through its end again, and only
            # this method of its loop says otherwise.
            trainer.fit_loop._iteration_based_training = lambda: False  # type: ignore[method-assign]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning tells loaders where to go on when it makes them, but a schedule that asks for the number of steps
        # has them made before the checkpoint is read.
        loader: Any = trainer.train_dataloader
        for state in self._loader_states:
            loader.load_state_dict(state)
        self._loader_states = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._seed(trainer, 1 + trainer.fit_loop.epoch_loop.total_batch_idx)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seed(trainer, 0)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seed(trainer, 0)

    def _seed(self, trainer: pl.Trainer, step: int) -> None:
        # Odd factors keep (seed, step, process) apart modulo 2^63.
        mixed = self.seed * 0x9E3779B97F4A7C15 + step * 0xC2B2AE3D27D4EB4F + trainer.global_rank * 0x165667B19E3779F9
        torch.manual_seed(mixed % 2**63)
