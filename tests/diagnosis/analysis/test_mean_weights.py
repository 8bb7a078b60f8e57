"""Weights and their mean over inputs: a head that reads positions alone beside one that reads the content alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from approx_attn.diagnosis.analysis.mean_weights import mean_weights

LENGTH = 8


class TwoHeads(nn.Module):
    """Head 0 compares the first four features, head 1 the last four."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        with torch.no_grad():
            self.attention.in_proj_weight[:16] = torch.eye(8).repeat(2, 1)

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, key_padding_mask=padding)[0]


def batches(count: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Positions, the same in every sequence, and a content; every second sequence is shorter."""
    positions = 2.0 * torch.randn(LENGTH, 4, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    padding = torch.zeros(16, LENGTH, dtype=torch.bool)
    padding[::2, 6:] = True
    found = []
    for _ in range(count):
        content = 2.0 * torch.randn(16, LENGTH, 4, generator=generator)
        found.append((torch.cat([positions.expand(16, -1, -1), content], dim=-1), padding))
    return found


def test_the_mean_explains_weights_of_positions_and_not_those_of_the_content() -> None:
    torch.manual_seed(0)
    of_positions, of_content = mean_weights(
        TwoHeads(), batches(8, 1), batches(4, 2), {"attention": LENGTH}, progress=False
    )
    assert (of_positions["head"], of_content["head"]) == (0, 1)
    # A shorter sequence has its weights over fewer keys, so their mean over both kinds is renormalised to each.
    assert of_positions["explained"] > 0.95
    assert of_positions["mean"] < 0.15
    assert of_positions["mean"] < of_positions["mean_by_offset"] < of_positions["uniform"]
    assert of_content["explained"] < of_positions["explained"] - 0.3
    assert of_content["mean"] > 0.3


def test_a_single_mean_of_sequences_alike_is_exact() -> None:
    same = batches(1, 1)
    same[0][0][:] = same[0][0][:1]
    same[0][1][:] = False
    for row in mean_weights(TwoHeads(), same, same, {"attention": LENGTH}, progress=False):
        assert row["explained"] == pytest.approx(1.0, abs=1e-6)
        assert row["mean"] == pytest.approx(0.0, abs=1e-5)
