"""Learning rate over a run: a linear warm-up, then one way or another down."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

DECAYS = ("linear", "cosine", "constant")


class WarmupSchedule(LambdaLR):
    """Multiplies the optimizer's learning rate by a factor that depends on the share of steps done.

    The factor rises linearly to 1 over the first `warmup` of the steps and then falls to `final`.

    Args:
        optimizer: whose learning rate is the peak.
        total_steps: optimizer steps of the whole run.
        warmup: share of the steps (below 1), or their number (1 or more).
        decay: `linear` (a one-cycle schedule), `cosine` or `constant`.
        final: factor at the last step, 0 to 1.

    Raises:
        ValueError: an impossible value; the message names its key.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        *,
        warmup: float = 0.1,
        decay: str = "cosine",
        final: float = 0.0,
    ) -> None:
        check_schedule(warmup, decay, final)
        self.total_steps = max(int(total_steps), 1)
        self.warmup_steps = min(warmup if warmup >= 1 else warmup * self.total_steps, self.total_steps)
        self.decay = decay
        self.final = final
        super().__init__(optimizer, self.factor)

    def factor(self, step: int) -> float:
        """Factor on the learning rate before step number `step`, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)  # never zero: the first step should move
        if self.decay == "constant":
            return 1.0
        share = min((step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1), 1.0)
        fall = share if self.decay == "linear" else 0.5 * (1.0 - math.cos(math.pi * share))
        return 1.0 - (1.0 - self.final) * fall

    def state_dict(self) -> dict:
        """Plain numbers only, so that a checkpoint loads with `weights_only=True`."""
        return {"last_epoch": self.last_epoch, "_step_count": self._step_count, "_last_lr": self._last_lr}

    def load_state_dict(self, state_dict: dict) -> None:
        """Go on at a step; the rate is that of this schedule there, also if the step was made in a shorter one."""
        self.__dict__.update(state_dict)
        self._last_lr = [rate * self.factor(self.last_epoch) for rate in self.base_lrs]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate


def check_schedule(warmup: float, decay: str, final: float) -> None:
    """Refuse impossible values."""
    if isinstance(warmup, bool) or not isinstance(warmup, int | float) or warmup < 0:
        raise ValueError(f"scheduler.warmup must be a share below 1 or a number of steps, got {warmup!r}.")
    if decay not in DECAYS:
        raise ValueError(f"scheduler.decay must be one of {', '.join(DECAYS)}, got {decay!r}.")
    if isinstance(final, bool) or not isinstance(final, int | float) or not 0.0 <= final <= 1.0:
        raise ValueError(f"scheduler.final must be between 0 and 1, got {final!r}.")
