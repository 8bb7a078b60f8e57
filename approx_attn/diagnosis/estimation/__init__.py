"""Memory and time of a training run, before it is started.

Memory is parameters, gradients and optimizer state, which are counted, and what a step holds besides (activations,
working arrays), which is measured at two smaller batches and extrapolated: it is linear in the batch. Time is steps
that are made by the trainer here, with loading, logging and checkpoints, or operations that are counted here and
divided by the speed of another device. The table says of every figure how it came about.
"""

from approx_attn.diagnosis.estimation.command import estimate
from approx_attn.diagnosis.estimation.figures import Estimate, Figure

__all__ = ["Estimate", "Figure", "estimate"]
