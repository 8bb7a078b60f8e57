"""What a partial computation loses: error of scores, weights and output against the share of pairs computed.

Mechanisms see the queries, keys and values of the unchanged model, as in
`approx_attn.conversion.calibration.reconstruct`, which gives the error of the output; this module adds what can only
be read off the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from approx_attn.attention.eigen.basis_file import Calibration
from approx_attn.attention.exact import exact_attention_with_weights
from approx_attn.attention.mask import AttentionMask
from approx_attn.attention.registry import attention_class
from approx_attn.conversion.calibration.fitting import run_model, with_progress
from approx_attn.conversion.calibration.moments import used_tokens
from approx_attn.conversion.calibration.reconstruction import ReconstructionMeasurement, standard_mechanisms
from approx_attn.conversion.capture import capture_attention_inputs

SELECTIONS = ("strided", "random", "greedy")


@dataclass(frozen=True)
class ReconstructionError:
    """Errors of one mechanism in one layer, means over heads, sequences and real queries.

    Attributes:
        label: mechanism and options.
        mechanism: registry name.
        layer: qualified name of the attention module.
        exact_share: share of the pairs whose exact score enters the result.
        score_ratio: multiply-adds of scores and selection relative to exact attention's scores.
        output: ‖Ô − O‖ / ‖O‖.
        total_variation: ½ Σ_j |Â_ij − A_ij| of a query; None if the mechanism does not return weights.
        scores: ‖Ŝ − S‖ / ‖S‖ over centred rows; None if the mechanism leaves pairs without a score.
    """

    label: str
    mechanism: str
    layer: str
    exact_share: float
    score_ratio: float
    output: float
    total_variation: float | None
    scores: float | None


def reconstruction_errors(
    model: nn.Module,
    batches: Iterable[Any],
    mechanisms: Mapping[str, Mapping[str, Any]],
    calibration: Calibration,
    *,
    progress: bool = True,
) -> list[ReconstructionError]:
    """Errors of mechanisms in every attention layer of a model.

    Args:
        model: holds layers that `capture_attention_inputs` sees; stays as it is.
        batches: inputs of the model that the calibration has not seen.
        mechanisms: by label, `{"name": ..., **options}`. Those that start from a basis get it from `calibration`.
        calibration: fitted on the same model.
        progress: show a progress bar.

    Raises:
        ValueError: an unknown mechanism or option, or one that the model's attention does not fit.
    """
    measured = _WeightMeasurement(mechanisms, calibration)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), capture_attention_inputs(model, measured):
            for batch in with_progress(batches, progress, "measuring"):
                run_model(model, batch)
    finally:
        model.train(was_training)
    return measured.errors()


class _WeightMeasurement(ReconstructionMeasurement):
    """Beside the output's error, the error of weights and scores."""

    def __init__(self, mechanisms: Mapping[str, Mapping[str, Any]], calibration: Calibration) -> None:
        super().__init__(mechanisms, calibration)
        self.weight_sums: dict[tuple[str, str], Tensor] = {}  # Σ TV, queries, Σ score errors, inputs, rows undefined

    def __call__(
        self, layer: str, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float
    ) -> None:
        super().__call__(layer, query, key, value, mask, scale)
        real, used = used_tokens(mask, query, key)
        key, value = (x.masked_fill(~used[:, None, :, None], 0.0) for x in (key, value))
        _, exact = exact_attention_with_weights(query, key, value, mask, scale, 0.0)
        n_q, n_k = query.shape[-2], key.shape[-2]
        keep = mask.dense_keep(n_q, n_k, query.device)
        open_pairs = torch.ones((), dtype=torch.bool, device=query.device) if keep is None else keep
        open_pairs = (open_pairs & real[:, None, :, None]).expand(exact.shape)
        for label, spec in self.specs.items():
            if not attention_class(str(spec["name"])).capabilities.returns_weights:
                continue
            mechanism = self._mechanism(label, layer, query, key, value, mask)
            _, weights = mechanism(query, key, value, mask, scale=scale, need_weights=True)
            assert weights is not None
            variation = total_variation(weights, exact).masked_fill(~real[:, None], 0.0)
            errors, undefined = score_errors(weights, exact, open_pairs)
            sums = torch.stack(
                [
                    variation.sum().double(),
                    real.sum().double() * weights.shape[1],
                    errors.sum().double(),
                    torch.tensor(float(errors.numel()), dtype=torch.float64, device=errors.device),
                    undefined.sum().double(),
                ]
            ).cpu()
            self.weight_sums[label, layer] = self.weight_sums.get((label, layer), 0.0) + sums

    def errors(self) -> list[ReconstructionError]:
        rows = []
        for result in self.results():
            for layer, output in result.errors.items():
                sums = self.weight_sums.get((result.label, layer))
                variation = scores = None
                if sums is not None:
                    variation = float(sums[0] / sums[1])
                    scores = float(sums[2] / sums[3]) if sums[4] == 0 else None
                name = str(result.options["name"])
                rows.append(
                    ReconstructionError(
                        result.label, name, layer, result.exact_share, result.score_ratio, output, variation, scores
                    )
                )
        return rows


def total_variation(a: Tensor, b: Tensor) -> Tensor:
    """(..., n) distributions to (...): half the sum of absolute differences, between 0 and 1."""
    return (a - b).abs().sum(-1) / 2


def score_errors(weights: Tensor, exact: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Relative error of the scores behind two sets of weights, row offsets taken out.

    log A is the score less a constant of the row, which softmax ignores, so centred rows of log A are centred
    rows of scores. Where a mechanism gives an open pair no weight it has no score there.

    Args:
        weights, exact: (b, h, n_q, n_k), after softmax.
        keep: (b, h, n_q, n_k) bool, open pairs of real queries.

    Returns:
        (b, h) errors ‖Ŝ − S‖ / ‖S‖, and (b, h) the number of open pairs without a score.
    """
    # Exact weights below the smallest normal number say nothing precise about their scores.
    keep = keep & (exact > torch.finfo(exact.dtype).tiny)
    missing = keep & (weights <= 0)
    estimate, truth = (_centred_logarithm(x, keep & ~missing) for x in (weights, exact))
    error = (estimate - truth).flatten(2).norm(dim=-1) / truth.flatten(2).norm(dim=-1).clamp_min(1e-12)
    return error, missing.sum((-2, -1))


def _centred_logarithm(weights: Tensor, keep: Tensor) -> Tensor:
    scores = weights.double().masked_fill(~keep, 1.0).log()
    mean = scores.sum(-1, keepdim=True) / keep.sum(-1, keepdim=True).clamp_min(1)
    return (scores - mean).masked_fill(~keep, 0.0)


def compared_mechanisms(budgets: Iterable[float], rank: int) -> dict[str, dict[str, Any]]:
    """Mechanisms and pair selections at some shares of exact pairs, by label: the project's, top-k and window."""
    table: dict[str, dict[str, Any]] = {}
    for keep in budgets:
        table |= standard_mechanisms([keep], rank)
        at = f"{keep:.4g}"
        del table[f"eigen_row keep={at}"]
        for selection in SELECTIONS:
            label = f"eigen_row keep={at} selection={selection}"
            table[label] = {"name": "eigen_row", "keep": keep, "selection": selection}
    return table
