"""Noise of single positions in rows of scores: factor analysis beside probabilistic PCA, judged on rows not seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from approx_attn.attention.eigen.basis_file import Calibration
from approx_attn.attention.eigen.factor_analysis import log_likelihood
from approx_attn.attention.eigen.position_fit import PositionFit
from approx_attn.attention.mask import AttentionMask
from approx_attn.conversion.calibration.fitting import run_model, with_progress
from approx_attn.conversion.calibration.moments import rows_of_scores
from approx_attn.conversion.capture import attention_observed
from approx_attn.diagnosis.analysis.book import Book
from approx_attn.diagnosis.analysis.figures import heat_map, padded

MODELS = ("ppca", "factor_analysis")


@dataclass(frozen=True)
class GaussianRows:
    """A Gaussian model of the rows of every head: μ (h, P), loadings (h, P, r), noise (h, P)."""

    mean: Tensor
    loadings: Tensor
    noise: Tensor

    @classmethod
    def of(cls, mean: Tensor, basis: Tensor, eigenvalues: Tensor, noise: Tensor) -> GaussianRows:
        """From a fit as `PositionFit.cut` or `PositionFit.factors` gives it."""
        mean, basis, eigenvalues, noise = (part.double() for part in (mean, basis, eigenvalues, noise))
        noise = noise[:, None].expand_as(mean) if noise.dim() == 1 else noise
        return cls(mean, basis * eigenvalues.sqrt()[:, None], noise.clamp_min(1e-12))


@dataclass
class LayerNoise:
    """What was found of one layer.

    Attributes:
        variances: (h, P) of centred scores, by position of the key.
        models: by one of `MODELS`.
        rows: held-out rows of scores.
        likelihood: sum of their log-likelihoods, by model.
    """

    variances: Tensor
    models: dict[str, GaussianRows]
    rows: int
    likelihood: dict[str, float]


def noise_of_positions(
    model: nn.Module, calibration: Calibration, batches: Iterable[Any], *, rank: int, progress: bool = True
) -> dict[str, LayerNoise]:
    """Both models of every layer and the likelihood that they give to rows of other inputs.

    Args:
        model: as it was calibrated; stays as it is.
        calibration: holds `absolute` bases.
        batches: inputs, none of which the bases were fitted to.
        rank: factors.

    Returns:
        By name of the layer, in the order of the calibration.
    """
    found = {layer.name: _fitted(calibration, i, rank) for i, layer in enumerate(calibration.layers)}

    def add(name: str, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float) -> None:
        layer, every = found[name], torch.arange(query.shape[-2], device=query.device)
        scores, keep = (part.cpu() for part in rows_of_scores(query, key, mask, scale, every))
        keep, length = keep.expand_as(scores), scores.shape[-1]
        for kind, gaussian in layer.models.items():
            parts = (gaussian.mean[:, :length], gaussian.loadings[:, :length], gaussian.noise[:, :length])
            layer.likelihood[kind] += float(log_likelihood(scores, keep, *parts).sum())
        layer.rows += int((keep.sum(-1) > 1).sum())

    with attention_observed(model, add):
        for batch in with_progress(batches, progress, "rows not seen"):
            run_model(model, batch)
    return found


def _fitted(calibration: Calibration, layer: int, rank: int) -> LayerNoise:
    prefix = f"{layer}.absolute.head."
    parts = {name.removeprefix(prefix): x for name, x in calibration.tensors.items() if name.startswith(prefix)}
    fit = PositionFit(**{name: part.double() for name, part in parts.items()})
    assert fit.variances is not None
    rank = min(rank, fit.vectors.shape[-1])
    models = {"ppca": GaussianRows.of(*fit.cut(rank)), "factor_analysis": GaussianRows.of(*fit.factors(rank))}
    return LayerNoise(fit.variances, models, 0, dict.fromkeys(MODELS, 0.0))


def add_noise(book: Book, found: Mapping[str, LayerNoise], labels: Mapping[str, str], rank: int) -> None:
    """Is the noise of scores the same at all positions?"""
    section = book.section("Noise of single positions")
    section.text(
        f"Rows of scores are modelled as an offset, a mean row, {rank} factors and noise. Probabilistic PCA has one "
        "variance of the noise for all positions of the key, factor analysis one for each; both are fitted by maximum "
        "likelihood to every head. The log-likelihood is that of rows of inputs that were not fitted to, in nats, "
        "without their offset, which softmax ignores."
    )
    rows = [_row(labels.get(name, name), layer) for name, layer in found.items()]
    by_position = [row for name, layer in found.items() for row in _positions(labels.get(name, name), layer)]
    ratios = [
        (layer.models["factor_analysis"].noise / layer.models["ppca"].noise).mean(0).tolist()
        for layer in found.values()
    ]
    positions = [str(position) for position in range(max(map(len, ratios)))]
    section.figure(
        "noise",
        heat_map(
            padded(ratios),
            ("layer", [labels.get(name, name) for name in found]),
            ("key position", positions),
            scale="noise / shared noise",
        ),
        "Noise of a position relative to the shared one, mean over heads.",
    )
    section.table(
        "noise",
        rows,
        "Log-likelihood per held-out row; gain: factor analysis less probabilistic PCA. Noise: the shared variance, "
        "and the lowest, middle and highest of the positions, means over heads.",
    )
    book.keep("noise_by_position", by_position)


def _row(label: str, layer: LayerNoise) -> dict[str, Any]:
    own = layer.models["factor_analysis"].noise
    likelihood = {kind: total / max(layer.rows, 1) for kind, total in layer.likelihood.items()}
    return {
        "layer": label,
        "rows": layer.rows,
        **{f"likelihood_{kind}": value for kind, value in likelihood.items()},
        "gain": likelihood["factor_analysis"] - likelihood["ppca"],
        "shared_noise": float(layer.models["ppca"].noise[:, 0].mean()),
        "lowest_noise": float(own.amin(-1).mean()),
        "middle_noise": float(own.median(-1).values.mean()),
        "highest_noise": float(own.amax(-1).mean()),
    }


def _positions(label: str, layer: LayerNoise) -> Sequence[dict[str, Any]]:
    heads, positions = layer.variances.shape
    return [
        {
            "layer": label,
            "head": head,
            "position": position,
            "variance": float(layer.variances[head, position]),
            **{f"noise_{kind}": float(each.noise[head, position]) for kind, each in layer.models.items()},
        }
        for head in range(heads)
        for position in range(positions)
    ]
