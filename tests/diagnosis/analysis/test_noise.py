"""Noise of single positions: planted in the rows of a layer, and found."""

import math

import torch
from torch import Tensor, nn

import approx_attn
from approx_attn.conversion.calibration import calibrate
from approx_attn.diagnosis.analysis.noise import noise_of_positions

P = 8


class Rows(nn.Module):
    """A layer whose scores are its inputs: queries are rows of scores, keys are unit vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = approx_attn.MultiheadAttention(P, 1, bias=False, batch_first=True)
        with torch.no_grad():
            self.layer.in_proj_weight.copy_(torch.eye(P).repeat(3, 1))

    def forward(self, rows: Tensor) -> Tensor:
        keys = torch.eye(P).expand(len(rows), -1, -1)
        return self.layer(rows * math.sqrt(P), keys, keys, need_weights=False)[0]


def draw(noise: Tensor, seed: int) -> list[Tensor]:
    """Batches of rows: an offset, one factor that rises with the position, and noise of these variances."""
    generator = torch.Generator().manual_seed(seed)
    shape = (4, 625, P)
    slope = torch.linspace(-1, 1, P) * torch.randn(*shape, 1, generator=generator)
    offset = 2 * torch.randn(*shape, 1, generator=generator)
    return list(offset + slope + torch.randn(*shape, P, generator=generator) * noise.sqrt())


def found(noise: Tensor):
    model = Rows()
    calibration = calibrate(model, draw(noise, 1), statistics=["absolute"], rows=None, progress=False)
    return noise_of_positions(model, calibration, draw(noise, 2)[:1], rank=1, progress=False)["layer"]


def test_planted_noise_is_found_and_makes_other_rows_likelier():
    planted = torch.tensor([0.1, 0.1, 1.0, 0.1, 0.5, 0.1, 2.0, 0.2])
    layer = found(planted)
    assert layer.rows == 625 * P
    torch.testing.assert_close(layer.models["factor_analysis"].noise[0].float(), planted, rtol=0.1, atol=0.02)
    assert layer.likelihood["factor_analysis"] - layer.likelihood["ppca"] > layer.rows


def test_nothing_is_gained_where_the_noise_is_shared():
    layer = found(torch.full((P,), 0.3))
    torch.testing.assert_close(layer.models["ppca"].noise[0], torch.full((P,), 0.3).double(), rtol=0.05, atol=0)
    assert abs(layer.likelihood["factor_analysis"] - layer.likelihood["ppca"]) < 0.01 * layer.rows
