"""One label per sequence, or per pair of sequences."""

from __future__ import annotations

from torch import Tensor

from approx_attn.data import IGNORE
from approx_attn.run.tasks.base import SequenceTask


class ClassificationTask(SequenceTask):
    """Cross-entropy and accuracy over sequences; arguments as `SequenceTask`."""

    kind = "classification"

    def flat(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(b, classes) and (b,); in evaluation without what another process scores."""
        if self.training:
            return logits, labels
        labelled = labels != IGNORE  # (b,)
        return logits[labelled], labels[labelled]
