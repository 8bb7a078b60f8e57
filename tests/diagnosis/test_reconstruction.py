"""Errors of scores, weights and output of partial computations."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from approx_attn.attention import build_attention
from approx_attn.conversion.calibration import calibrate
from approx_attn.conversion.capture import capture_attention_inputs
from approx_attn.diagnosis.analysis.figures import error_curves
from approx_attn.diagnosis.reconstruction import reconstruct, score_errors, standard_mechanisms, total_variation

SHAPE = {"num_heads": 2, "head_dim": 8}


def test_scores_are_read_off_weights() -> None:
    """Softmax of scores plus any row offset gives back the scores' error; a dropped pair is counted."""
    generator = torch.Generator().manual_seed(0)
    scores, estimate = torch.randn(2, 1, 3, 4, 6, generator=generator).double().unbind(0)
    keep = torch.rand(1, 3, 4, 6, generator=generator) < 0.8
    keep[..., 0] = True

    def weights(x: torch.Tensor) -> torch.Tensor:
        return x.masked_fill(~keep, float("-inf")).softmax(-1)

    def centred(x: torch.Tensor) -> torch.Tensor:
        kept = torch.where(keep, x, torch.nan)
        return (x - kept.nanmean(-1, keepdim=True))[keep]

    offset = torch.randn(1, 3, 4, 1, generator=generator)
    errors, missing = score_errors(weights(estimate + offset), weights(scores), keep)
    for head in range(3):
        only = torch.zeros_like(keep)
        only[:, head] = True
        chosen = only[keep]
        expected = (centred(estimate) - centred(scores))[chosen].norm() / centred(scores)[chosen].norm()
        assert float(errors[0, head]) == pytest.approx(float(expected), rel=1e-9)
    assert missing.tolist() == [[0, 0, 0]]
    dropped = weights(estimate).clone()
    dropped[0, 1, 2, 0] = 0.0
    assert score_errors(dropped, weights(scores), keep)[1].tolist() == [[0, 1, 0]]


def test_total_variation() -> None:
    a, b = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.0, 0.5, 0.5]])
    assert total_variation(a, b).tolist() == [0.5]
    assert total_variation(a, a).tolist() == [0.0]


def test_errors_on_a_model_equal_the_definition() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 16, batch_first=True), 2, enable_nested_tensor=False
    ).eval()
    first, second = torch.randn(6, 12, 16), torch.randn(2, 12, 16)
    calibration = calibrate(model, [first], statistics=["content", "absolute"], progress=False)
    mechanisms = {
        "whole": {"name": "topk", "keep": 1.0},
        "topk keep=0.25": {"name": "topk", "keep": 0.25},
        "estimate": {"name": "eigen_topk", "rank": 2, "keep": 0.25},
        "blocks": {"name": "mra", "keep": 0.25},
    }
    rows = reconstruct(model, [second], mechanisms, calibration, weights=True, progress=False)
    by = {(row.label, layer): errors for row in rows for layer, errors in row.layers.items()}
    assert rows[1].exact_share == pytest.approx(0.25)
    captured = {}
    with torch.no_grad(), capture_attention_inputs(model, lambda name, *inputs: captured.__setitem__(name, inputs)):
        model(second)
    for name, (query, key, value, mask, scale) in captured.items():
        exact = build_attention("exact", **SHAPE)(query, key, value, mask, scale=scale, need_weights=True)
        partial = build_attention("topk", keep=0.25, max_length=12, **SHAPE)(
            query, key, value, mask, scale=scale, need_weights=True
        )
        row = by["topk keep=0.25", name]
        difference = (partial[0] - exact[0]).flatten(2).norm(dim=-1) / exact[0].flatten(2).norm(dim=-1)
        assert row.output == pytest.approx(float(difference.mean()), rel=1e-4)
        assert row.total_variation == pytest.approx(float((partial[1] - exact[1]).abs().sum(-1).mean() / 2), rel=1e-4)
        assert row.scores is None
        whole, estimate = by["whole", name], by["estimate", name]
        assert whole.output == pytest.approx(0.0, abs=1e-5)
        assert whole.scores == pytest.approx(0.0, abs=1e-4)
        assert estimate.scores is not None
        assert 0.0 < estimate.scores < 1.0
        assert by["blocks", name].total_variation is None


def test_compared_mechanisms_cover_the_pair_selections() -> None:
    table = standard_mechanisms([0.5, 0.25], 4, ("strided", "random", "greedy"))
    names = {spec["name"] for spec in table.values()}
    assert {"eigen_topk", "eigen_row", "topk", "sliding_window"} <= names
    selections = {spec["selection"] for spec in table.values() if spec["name"] == "eigen_row"}
    assert selections == {"strided", "random", "greedy"}


def test_budgets_under_the_curves_do_not_overlap() -> None:
    near = [(1 / (3 * n + offset), 0.2) for n in range(1, 12) for offset in (0.0, 0.2)]
    figure = error_curves({"output": {"a": near}, "weights": {"a": near}})
    figure.draw_without_rendering()
    for axis in figure.axes:
        boxes = [label.get_window_extent() for label in axis.get_xticklabels()]
        assert len(boxes) > 2
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
