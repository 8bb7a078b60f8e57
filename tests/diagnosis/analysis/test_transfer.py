"""Bases from elsewhere: where each is from, what comes with it, and the part of the report that measures it."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import nn

import approx_attn
from approx_attn.conversion.calibration import Calibration, PositionFit, calibrate
from approx_attn.diagnosis.analysis.command import main
from approx_attn.diagnosis.analysis.transfer import along, sources, transfer_errors
from helpers import save_tiny_bert

H, D, N = 2, 4, 8


class Model(nn.Module):
    """Two attention layers over token embeddings."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(20, H * D)
        self.position = nn.Parameter(torch.randn(N, H * D))
        self.layers = nn.ModuleList(approx_attn.MultiheadAttention(H * D, H, batch_first=True) for _ in range(2))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.position
        for layer in self.layers:
            x = x + 3.0 * layer(x, x, x, need_weights=False)[0]
        return x


def tokens(seed: int) -> list[torch.Tensor]:
    return list(torch.randint(20, (4, 16, N), generator=torch.Generator().manual_seed(seed)))


def fitted(model: nn.Module) -> Calibration:
    return calibrate(model, tokens(0), statistics=["absolute", "matrix"], max_rank=4, rows=None, progress=False)


def test_variances_along_other_directions_are_those_of_the_fitted_covariance() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors, directions = (
        torch.linalg.qr(torch.randn(N, 3, generator=generator, dtype=torch.float64)).Q for _ in range(2)
    )
    values = torch.tensor([[3.0, 2.0, 1.0]], dtype=torch.float64)
    total, free = torch.tensor([7.0], dtype=torch.float64), torch.tensor([float(N)], dtype=torch.float64)
    fit = PositionFit(torch.zeros(1, N), vectors[None], values, total, free)
    covariance = vectors @ values[0].diag() @ vectors.mT + 1.0 / (N - 3) * (torch.eye(N) - vectors @ vectors.mT)
    moved = along(fit, directions)
    torch.testing.assert_close(moved.eigenvalues[0], (directions * (covariance @ directions)).sum(0))
    assert torch.equal(moved.vectors[0], directions)
    torch.testing.assert_close(along(fit, vectors).eigenvalues, values)


def test_the_other_layer_and_the_other_model_bring_all_that_was_fitted_there() -> None:
    own, other = fitted(Model(0)), fitted(Model(1))
    found = sources(own, other, rank=3, seed=0)
    (layer,), (model,) = found["another layer"], found["another model"]
    for kind in ("absolute", "matrix"):
        for part in ("mean", "vectors", "eigenvalues"):
            name = f"{kind}.layer.{part}"
            assert torch.equal(layer.tensors[f"0.{name}"], own.tensors[f"1.{name}"])
            assert torch.equal(layer.tensors[f"1.{name}"], own.tensors[f"0.{name}"])
            assert torch.equal(model.tensors[f"0.{name}"], other.tensors[f"0.{name}"])
        for source in ("cosines", "random"):
            (basis,) = found[source]
            vectors = basis.tensors[f"0.{kind}.layer.vectors"][0].double()
            torch.testing.assert_close(vectors.mT @ vectors, torch.eye(3).double(), atol=1e-5, rtol=0.0)
            rows = vectors.unflatten(0, (-1, N)).sum(1)  # softmax ignores what is constant in a row
            torch.testing.assert_close(rows, torch.zeros_like(rows), atol=1e-5, rtol=0.0)
            assert torch.equal(basis.tensors[f"0.{kind}.layer.mean"], own.tensors[f"0.{kind}.layer.mean"])


def test_the_own_basis_is_the_best_and_errors_are_those_of_the_mechanism() -> None:
    model = Model(0)
    own = fitted(model)
    found = transfer_errors(model, tokens(1), own, fitted(Model(1)), budgets=[0.5], rank=4, seed=0, progress=False)
    errors = {(row["mechanism"], row["basis"], row["layer"]): row["error"] for row in found}
    assert len(errors) == 2 * 5 * 2
    for mechanism in ("eigen_row", "eigen_matrix"):
        own_error = errors[mechanism, "own", "layers.0"]
        assert own_error < errors[mechanism, "another model", "layers.0"]
        assert own_error < errors[mechanism, "random", "layers.0"]


@pytest.mark.parametrize(("heads", "refused"), [(2, False), (4, True)])
def test_the_report_tells_errors_by_source_or_why_not(tmp_path: Path, heads: int, refused: bool) -> None:
    pytest.importorskip("transformers")
    words = ["the", "a", "cat", "dog", "sat", "ran", ".", ",", "on", "mat"]
    save_tiny_bert(tmp_path / "one", words, initializer_range=0.3, num_attention_heads=2)
    save_tiny_bert(tmp_path / "two", words, seed=1, initializer_range=0.3, num_attention_heads=heads)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(words), (400,), generator=generator)
    (tmp_path / "text.txt").write_text(" ".join(words[i] for i in drawn))
    given = {"model": tmp_path / "one", "other_model": tmp_path / "two", "data": tmp_path / "text.txt", "length": 12}
    given |= {"parts": "[transfer]", "sequences": 6, "calibration_sequences": 6, "test_sequences": 4, "rank": 2}
    given |= {"keep": "[0.5,0.25]", "output": tmp_path / "out", "progress_bar": "false"}
    assert main([f"{key}={value}" for key, value in given.items()]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert ("bases cannot be exchanged" in page) == refused
    if not refused:
        with (tmp_path / "out" / "tables" / "transfer.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["mechanism"] for row in rows] == ["eigen_row", "eigen_matrix"] * 2
        assert all(0.0 < float(row[source]) < 2.0 for row in rows for source in list(rows[0])[2:])
        assert (tmp_path / "out" / "figures" / "transfer.png").is_file()
