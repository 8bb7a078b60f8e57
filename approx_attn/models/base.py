"""What training asks of every model."""

from __future__ import annotations

from typing import Any

from torch import nn

from approx_attn.attention import AttentionMechanism
from approx_attn.models.transformer import attention_mechanisms


class SequenceModel(nn.Module):
    """Base of all models: called with what batches hold, it gives logits.

    Its arguments are options of `config.model`; those of `vocab_size`, `num_classes`, `max_length`, `two_towers`,
    `causal` and `pad_id` that it takes are given from the `DataSpec`. Called with `tokens` (b, n) int64, and `keep`
    (b, n) bool where something is padded, or with what else the data have, it returns logits: (b, classes), or
    (b, n, vocabulary) for token prediction.

    Attributes:
        calibration_batches: training batches on which bases are fitted before training.
        new_parameters: parameters that no earlier training gave; None: all of them.
    """

    calibration_batches: int = 0
    new_parameters: list[str] | None = None

    @property
    def mechanisms(self) -> list[AttentionMechanism]:
        """One mechanism per attention layer, in the order of the layers."""
        return attention_mechanisms(self)

    @property
    def attention_length(self) -> int | None:
        """Queries of the longest attention, where they do not depend on the input; None: the length of the data."""
        return None

    @property
    def rebuild_options(self) -> dict[str, Any]:
        """What a checkpoint has to say about the model beside its configuration."""
        return {}
