"""What a partial computation loses in every attention layer of a model, with nothing fine-tuned.

Every mechanism sees the queries, keys and values of the unchanged model, so that errors of one layer do not disturb
the next: of the output, and on request of weights and scores, as far as they can be read off the weights. Bases are
calibrated on one part of the data and measured on another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from approx_attn.attention import (
    AttentionMask,
    AttentionMechanism,
    attention_class,
    build_attention,
)
from approx_attn.attention.base import Cost
from approx_attn.attention.calibrated import BasisMechanism
from approx_attn.attention.eigen.basis_file import Calibration
from approx_attn.attention.exact import ExactAttention, exact_attention_with_weights
from approx_attn.conversion.calibration.fitting import run_model, with_progress
from approx_attn.conversion.calibration.layer_errors import mechanism_for_layer, relative_errors
from approx_attn.conversion.calibration.moments import used_tokens
from approx_attn.conversion.capture import attention_observed


@dataclass(frozen=True)
class LayerErrors:
    """Errors of one mechanism in one layer, means over heads, sequences and real queries.

    Attributes:
        output: ‖Ô − O‖ / ‖O‖.
        total_variation: ½ Σ_j |Â_ij − A_ij| of a query; None if not measured, or if the mechanism returns no weights.
        scores: ‖Ŝ − S‖ / ‖S‖ over centred rows; None likewise, and if the mechanism leaves pairs without a score.
    """

    output: float
    total_variation: float | None = None
    scores: float | None = None


@dataclass
class Reconstruction:
    """Errors of one mechanism on one model.

    Attributes:
        label: what the table calls it.
        options: its name and options.
        layers: by qualified name of the attention module.
        exact_share: share of the pairs whose exact score enters the result.
        score_ratio: multiply-adds of scores and selection relative to exact attention's scores.
    """

    label: str
    options: dict[str, Any]
    layers: dict[str, LayerErrors] = field(default_factory=dict)
    exact_share: float = 0.0
    score_ratio: float = 0.0

    @property
    def error(self) -> float:
        """Error of the output, mean over layers."""
        return sum(layer.output for layer in self.layers.values()) / len(self.layers)


def reconstruct(
    model: nn.Module,
    batches: Iterable[Any],
    mechanisms: Mapping[str, Mapping[str, Any]],
    calibration: Calibration,
    *,
    bases: Mapping[str, Calibration | None] | None = None,
    weights: bool = False,
    progress: bool = True,
) -> list[Reconstruction]:
    """Errors of mechanisms in every attention layer of a model.

    Args:
        model: holds layers that `capture_attention_inputs` sees; stays as it is.
        batches: inputs of the model, as `calibrate` takes them, other than those it took.
        mechanisms: by label, `{"name": ..., **options}`. Those that start from a basis get it from `calibration`.
        calibration: fitted on the same model.
        bases: by label, what mechanisms start from in place of `calibration`; None keeps their random basis.
        weights: measure the errors of weights and scores, too.
        progress: show a progress bar.

    Raises:
        ValueError: an unknown mechanism or option, or one that the model's attention does not fit; no batches.
    """
    measured = ReconstructionMeasurement(mechanisms, calibration, bases, weights)
    with attention_observed(model, measured):
        for batch in with_progress(batches, progress, "measuring"):
            run_model(model, batch)
    return measured.results()


class ReconstructionMeasurement:
    """Callback of a capture: runs every mechanism on every layer's inputs and adds up the errors."""

    def __init__(
        self,
        mechanisms: Mapping[str, Mapping[str, Any]],
        calibration: Calibration,
        bases: Mapping[str, Calibration | None] | None = None,
        weights: bool = False,
    ) -> None:
        self.specs = {label: dict(spec) for label, spec in mechanisms.items()}
        self.calibration, self.bases, self.weights = calibration, dict(bases or {}), weights
        self.layers = {layer.name: i for i, layer in enumerate(calibration.layers)}
        self.built: dict[tuple[str, str], AttentionMechanism] = {}
        self.sums: dict[tuple[str, str], Tensor] = {}  # Σ output errors, heads of sequences
        self.weight_sums: dict[tuple[str, str], Tensor] = {}  # Σ TV, queries, Σ score errors, inputs, rows undefined
        self.costs: dict[str, list[tuple[Cost, Cost]]] = {label: [] for label in self.specs}

    def __call__(
        self, layer: str, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float
    ) -> None:
        built = {label: self.mechanism(label, layer, query, key, value, mask) for label in self.specs}
        inputs = (query, key, value, mask, scale)
        for label, error in zip(self.specs, relative_errors(list(built.values()), *inputs), strict=True):
            _add(self.sums, (label, layer), error.sum(), error.numel())
        if self.weights:
            self._add_weights(layer, built, *inputs)

    def _add_weights(
        self,
        layer: str,
        mechanisms: Mapping[str, AttentionMechanism],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: AttentionMask,
        scale: float,
    ) -> None:
        real, used = used_tokens(mask, query, key)
        key, value = (x.masked_fill(~used[:, None, :, None], 0.0) for x in (key, value))
        _, exact = exact_attention_with_weights(query, key, value, mask, scale, 0.0)
        keep = mask.dense_keep(query.shape[-2], key.shape[-2], query.device)
        open_pairs = torch.ones((), dtype=torch.bool, device=query.device) if keep is None else keep
        open_pairs = (open_pairs & real[:, None, :, None]).expand(exact.shape)
        for label, mechanism in mechanisms.items():
            if not mechanism.capabilities.returns_weights:
                continue
            _, weights = mechanism(query, key, value, mask, scale=scale, need_weights=True)
            variation = total_variation(weights, exact).masked_fill(~real[:, None], 0.0)
            errors, undefined = score_errors(weights, exact, open_pairs)
            queries = real.sum() * weights.shape[1]
            sums = (variation.sum(), queries, errors.sum(), errors.numel(), undefined.sum())
            _add(self.weight_sums, (label, layer), *sums)

    def mechanism(
        self, label: str, layer: str, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask
    ) -> AttentionMechanism:
        """The mechanism of a label in a layer, built in the shape of the layer's first inputs."""
        if (label, layer) not in self.built:
            basis = self.bases.get(label, self.calibration)
            inputs = (query, key, value, mask)
            mechanism = mechanism_for_layer(self.specs[label], layer, self.calibration, *inputs, basis)
            self.built[label, layer] = mechanism
            lengths = (query.shape[-2], key.shape[-2])
            exact = ExactAttention(mechanism.shape).cost(*lengths, causal=mask.causal)
            self.costs[label].append((mechanism.cost(*lengths, causal=mask.causal), exact))
        return self.built[label, layer]

    def results(self) -> list[Reconstruction]:
        """One per mechanism, over the layers in the order of the calibration."""
        if not self.built:
            raise ValueError("reconstruct got no batches, or no mechanisms to measure on them.")
        rows = []
        for label, spec in self.specs.items():
            own, exact = (sum(costs[1:], start=costs[0]) for costs in zip(*self.costs[label], strict=True))
            layers = {layer: self._errors(label, layer) for layer in self.layers if (label, layer) in self.sums}
            ratio = own.score_multiply_adds / exact.score_multiply_adds
            rows.append(Reconstruction(label, spec, layers, own.exact_share, ratio))
        return rows

    def _errors(self, label: str, layer: str) -> LayerErrors:
        total, count = self.sums[label, layer].tolist()
        if (label, layer) not in self.weight_sums:
            return LayerErrors(total / count)
        variation, queries, scores, inputs, undefined = self.weight_sums[label, layer].tolist()
        return LayerErrors(total / count, variation / queries, scores / inputs if undefined == 0 else None)


def _add(sums: dict[tuple[str, str], Tensor], key: tuple[str, str], *parts: Tensor | int) -> None:
    added = torch.tensor([float(part) for part in parts], dtype=torch.float64)
    sums[key] = sums[key] + added if key in sums else added


# -- errors of one call --------------------------------------------------------------------------------


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


# -- what is measured ----------------------------------------------------------------------------------


def standard_mechanisms(
    budgets: Iterable[float], rank: int, selections: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """The mechanisms of the project and its nearest relatives at some shares of exact pairs, by label.

    Args:
        budgets: the shares.
        rank: dimensions of their estimates.
        selections: `eigen_row` is listed with each of these; without any, with its greedy one alone.
    """
    topk, cluster = {"name": "eigen_topk", "rank": rank}, {"name": "eigen_cluster", "rank": rank}
    by_words: dict[str, dict[str, Any]] = {
        "eigen_topk": topk,
        "eigen_topk select=estimate": topk | {"select": "estimate"},
        "eigen_topk rest=mean": topk | {"rest": "mean"},
        "eigen_topk rest=drop": topk | {"rest": "drop", "select": "estimate"},
        "eigen_cluster": cluster,
        "eigen_cluster order=2": cluster | {"order": 2},
        "eigen_row": {"name": "eigen_row", "selection": "greedy"},
        "low_rank_topk": {"name": "low_rank_topk", "rank": rank, "basis": "input"},
        **{name: {"name": name} for name in ("topk", "sliding_window", "mra")},
    }
    if selections:
        del by_words["eigen_row"]
    by_words |= {f"eigen_row selection={each}": {"name": "eigen_row", "selection": each} for each in selections}
    table = {}
    for keep in budgets:
        for words, spec in by_words.items():
            name, _, options = words.partition(" ")
            table[f"{name} keep={keep:.4g} {options}".rstrip()] = {**spec, "keep": keep}
    return table


def statistics_for(mechanisms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The kinds of bases to fit before mechanisms are measured; those of matrices only where one starts from them."""
    classes = [attention_class(str(spec["name"])) for spec in mechanisms.values()]
    kinds = {cls.basis_kind for cls in classes if issubclass(cls, BasisMechanism)}
    return ["content", "absolute", *sorted(kinds - {"content", "absolute"})]


def without_refusals(
    mechanisms: Mapping[str, Mapping[str, Any]], calibration: Calibration
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The mechanisms that take the masks of a model, and the labels of those that refuse causal ones."""
    taken = {label: dict(spec) for label, spec in mechanisms.items()}
    causal = next((layer for layer in calibration.layers if layer.causal), None)
    if causal is None:
        return taken, []
    refused = []
    for label, spec in mechanisms.items():
        try:
            build_attention(
                **spec,
                num_heads=causal.num_heads,
                num_key_value_heads=causal.num_key_value_heads,
                head_dim=causal.head_dim,
                max_length=causal.length,
                causal=True,
            )
        except ValueError:
            refused.append(label)
            del taken[label]
    return taken, refused
