"""Callbacks of training: what is shown, timed and guarded while a model trains."""

from approx_attn.run.callbacks.finite_loss import DivergedError, FiniteLoss
from approx_attn.run.callbacks.progress_bar import ProgressBar
from approx_attn.run.callbacks.resumable import Resumable
from approx_attn.run.callbacks.seed_steps import SeedSteps
from approx_attn.run.callbacks.step_timer import StepTimer
from approx_attn.run.callbacks.validations import Validations

__all__ = ["DivergedError", "FiniteLoss", "ProgressBar", "Resumable", "SeedSteps", "StepTimer", "Validations"]
