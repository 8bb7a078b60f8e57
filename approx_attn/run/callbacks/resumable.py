"""Keeps a checkpoint from which a stopped run goes on as if it had not been stopped."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch.utils.hooks import RemovableHandle

from approx_attn.run import checkpoints
from approx_attn.run.signals import signals_to_watch

Handler = Callable[[int, FrameType | None], Any] | int | None


class Resumable(pl.Callback):
    """Ends training at the end of a step when a signal asks for it, with a checkpoint of just that step.

    SIGTERM, Ctrl-C and, in a job of Slurm, SIGUSR1 and SIGUSR2 end `Trainer.fit` with Lightning's
    `SIGTERMException` after `checkpoints/last.ckpt` has been written; a second Ctrl-C ends it at once. For runs that
    are killed without warning a checkpoint is written every few minutes in the middle of an epoch too.

    A checkpoint is only made where nothing hangs over: after an optimizer step, never among gradients that
    are still being accumulated. Validation is broken off, and done again as a whole by the resumed run.

    Args:
        minutes: between checkpoints in the middle of an epoch; None: none.

    Attributes:
        stopped_by: the signal that asked; None if none did.
    """

    def __init__(self, minutes: float | None = 10.0) -> None:
        if minutes is not None and (isinstance(minutes, bool) or not minutes >= 0):
            raise ValueError(f"callbacks.resumable.minutes must be a number of at least 0 or null, got {minutes!r}.")
        self.minutes = minutes
        self.stopped_by: int | None = None
        self.previous_handlers: dict[int, Handler] = {}
        self._saved_at = 0.0
        self._stopping = False
        self._hook: RemovableHandle | None = None

    # -- signals -----------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # The trainer puts its own handlers in place after this, and these back when it is done.
        self.previous_handlers = {signum: signal.getsignal(signum) for signum in signals_to_watch()}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stopped_by, self._stopping = None, False
        self._saved_at = time.monotonic()
        # Lightning's handler talks to the other processes from within, between any two of their messages.
        self._handle_signals_with(self._note)
        # A run that early stopping had ended before it was killed is not to train on.
        stoppers = [callback for callback in trainer.callbacks if isinstance(callback, EarlyStopping)]  # type: ignore[attr-defined]
        if any(stopper.wait_count >= max(stopper.patience, 1) or stopper.stopped_epoch > 0 for stopper in stoppers):
            trainer.should_stop = True

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Nothing is lost with a test, but Lightning would go on with it, and with what comes after.
        self.restore_signals()

    def restore_signals(self) -> None:
        """Put back the handlers that were there before training."""
        self._handle_signals_with(None)

    def _handle_signals_with(self, handler: Handler) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # signals belong to the main thread
        for signum, previous in self.previous_handlers.items():
            signal.signal(signum, previous if handler is None else handler)  # type: ignore[arg-type]

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.stopped_by == signum == signal.SIGINT:
            raise KeyboardInterrupt
        if self.stopped_by is None:
            self.stopped_by = signum
            again = " (again: at once)" if signum == signal.SIGINT else ""
            print(f"\n{signal.Signals(signum).name}: stopping after this step{again}", file=sys.stderr, flush=True)

    def _asked_to_stop(self, trainer: pl.Trainer) -> bool:
        """Whether any process has been asked; all get the same answer."""
        asked = self.stopped_by is not None
        return asked if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(asked, all=False)

    # -- training ----------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch:
            return
        if self._asked_to_stop(trainer):
            self._stopping = True
            # Lightning raises its SIGTERMException when the step has been logged.
            trainer._signal_connector.received_sigterm = True
        elif self._is_due(trainer, batch_idx):
            self._save(trainer)

    def _is_due(self, trainer: pl.Trainer, batch_idx: int) -> bool:
        """Whether it is time for a checkpoint, and nothing is still to be done in this step."""
        late = self.minutes is not None and time.monotonic() - self._saved_at >= 60 * self.minutes
        if trainer.world_size > 1:
            late = trainer.strategy.reduce_boolean_decision(late, all=False)
        if not late or trainer.is_last_batch:
            return False
        counted = batch_idx if trainer.check_val_every_n_epoch is not None else trainer.fit_loop.total_batch_idx
        validates = trainer.enable_validation and (counted + 1) % (trainer.val_check_batch or 1) == 0
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        logs = every > 1 and trainer.global_step % every == 0
        return not validates and not logs

    # -- validation --------------------------------------------------------------------------------

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Inside the forward pass Lightning's counters say "in the middle of an evaluation", which it knows how to
        # resume; in the hooks around it they say "evaluated" already.
        self._hook = pl_module.register_forward_pre_hook(self._break_off)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._stopping = self._asked_to_stop(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._remove_hook()

    def _break_off(self, module: pl.LightningModule, inputs: Any) -> None:
        if self._stopping:
            # The resumed run is to evaluate all batches, not those that are left: their figures are one mean.
            module.trainer.fit_loop.epoch_loop.val_loop.batch_progress.reset_on_run()
            raise SIGTERMException

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    # -- the checkpoint ----------------------------------------------------------------------------

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._remove_hook()
        if isinstance(exception, SIGTERMException):  # raised between steps; anything else may have left half of one
            self._save(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._saved_at = time.monotonic()

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / checkpoints.FOLDER / checkpoints.LAST)
