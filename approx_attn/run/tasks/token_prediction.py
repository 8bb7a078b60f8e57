"""One label per token, at the positions that have one: language modelling, recall."""

from __future__ import annotations

import torch
from torch import Tensor

from approx_attn.data import IGNORE
from approx_attn.run import distributed
from approx_attn.run.tasks.base import SequenceTask


class TokenPredictionTask(SequenceTask):
    """Cross-entropy and accuracy over labelled positions; arguments as `SequenceTask`."""

    kind = "token_prediction"

    def flat(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(b, n, classes) and (b, n) to the labelled positions: (items, classes) and (items,)."""
        labelled = labels != IGNORE  # (b, n)
        return logits[labelled], labels[labelled]

    def joint_count(self, count: int) -> float:
        if not distributed.is_joined():
            return count
        total = torch.tensor(float(count), device=self.device)
        torch.distributed.all_reduce(total)
        return float(total) / torch.distributed.get_world_size()
