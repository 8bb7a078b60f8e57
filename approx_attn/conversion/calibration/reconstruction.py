"""How much of a model's attention output a mechanism loses, layer by layer, with nothing fine-tuned.

Every mechanism sees the queries, keys and values of the unchanged model, so that errors of one layer do not
disturb the next. Bases are calibrated on one part of the data and measured on another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from approx_attn.attention import AttentionMask, AttentionMechanism, AttentionShape, build_attention, resolve_attention
from approx_attn.attention.base import Cost
from approx_attn.attention.calibrated import BasisMechanism
from approx_attn.attention.eigen.basis_file import Calibration
from approx_attn.attention.exact import ExactAttention, exact_attention_with_weights
from approx_attn.conversion.calibration.fitting import run_model, with_progress
from approx_attn.conversion.calibration.moments import used_tokens
from approx_attn.conversion.capture import capture_attention_inputs


@dataclass
class Reconstruction:
    """Error of one mechanism on one model.

    Attributes:
        label: what the table calls it.
        options: its name and options.
        errors: by layer, the mean over heads and sequences of ‖Ô − O‖ / ‖O‖ over the real queries.
        exact_share: share of the pairs whose exact score enters the result.
        score_ratio: multiply-adds of scores and selection relative to exact attention's scores.
    """

    label: str
    options: dict[str, Any]
    errors: dict[str, float] = field(default_factory=dict)
    exact_share: float = 0.0
    score_ratio: float = 0.0

    @property
    def error(self) -> float:
        """Mean over layers."""
        return sum(self.errors.values()) / len(self.errors)


def reconstruct(
    model: nn.Module,
    batches: Iterable[Any],
    mechanisms: Mapping[str, Mapping[str, Any]],
    calibration: Calibration,
    *,
    bases: Mapping[str, Calibration | None] | None = None,
    progress: bool = True,
) -> list[Reconstruction]:
    """Relative output error of mechanisms in every attention layer of a model.

    Args:
        model: holds layers that `capture_attention_inputs` sees; stays as it is.
        batches: inputs of the model, as `calibrate` takes them, other than those it took.
        mechanisms: by label, `{"name": ..., **options}`. Those that start from a basis get it from `calibration`.
        calibration: fitted on the same model.
        bases: by label, what mechanisms start from in place of `calibration`; None keeps their random basis.
        progress: show a progress bar.

    Raises:
        ValueError: an unknown mechanism or option, or one that the model's attention does not fit; no batches.
    """
    measured = ReconstructionMeasurement(mechanisms, calibration, bases)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), capture_attention_inputs(model, measured):
            for batch in with_progress(batches, progress, "measuring"):
                run_model(model, batch)
    finally:
        model.train(was_training)
    return measured.results()


class ReconstructionMeasurement:
    """Callback of a capture: runs every mechanism on every layer's inputs and adds up the errors."""

    def __init__(
        self,
        mechanisms: Mapping[str, Mapping[str, Any]],
        calibration: Calibration,
        bases: Mapping[str, Calibration | None] | None = None,
    ) -> None:
        self.specs = {label: dict(spec) for label, spec in mechanisms.items()}
        self.calibration, self.bases = calibration, dict(bases or {})
        self.layers = {layer.name: i for i, layer in enumerate(calibration.layers)}
        self.built: dict[tuple[str, str], AttentionMechanism] = {}
        self.sums: dict[tuple[str, str], Tensor] = {}
        self.costs: dict[str, list[tuple[Cost, Cost]]] = {label: [] for label in self.specs}

    def __call__(
        self, layer: str, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float
    ) -> None:
        built = [self._mechanism(label, layer, query, key, value, mask) for label in self.specs]
        for label, error in zip(self.specs, relative_errors(built, query, key, value, mask, scale), strict=True):
            both = torch.stack([error.sum().double().cpu(), torch.tensor(float(error.numel()), dtype=torch.float64)])
            self.sums[label, layer] = self.sums.get((label, layer), torch.zeros(2, dtype=torch.float64)) + both

    def _mechanism(
        self, label: str, layer: str, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask
    ) -> AttentionMechanism:
        if (label, layer) not in self.built:
            index = self.layers[layer]
            max_length = self.calibration.layers[index].length
            shape = AttentionShape.of(query, key, value, max_length=max_length, causal=mask.causal)
            mechanism = resolve_attention(self.specs[label], shape).eval()
            basis = self.bases.get(label, self.calibration)
            if isinstance(mechanism, BasisMechanism) and basis is not None:
                basis.load_into(mechanism, index)
            self.built[label, layer] = mechanism.to(query.device)
            lengths = (query.shape[-2], key.shape[-2])
            exact = ExactAttention(shape).cost(*lengths, causal=mask.causal)
            self.costs[label].append((mechanism.cost(*lengths, causal=mask.causal), exact))
        return self.built[label, layer]

    def results(self) -> list[Reconstruction]:
        if not self.built:
            raise ValueError("reconstruct got no batches, or no mechanisms to measure on them.")
        rows = []
        for label, spec in self.specs.items():
            own, exact = (sum(costs[1:], start=costs[0]) for costs in zip(*self.costs[label], strict=True))
            means = {layer: self.sums[label, layer] for layer in self.layers if (label, layer) in self.sums}
            rows.append(
                Reconstruction(
                    label=label,
                    options=spec,
                    errors={layer: float(total / count) for layer, (total, count) in means.items()},
                    exact_share=own.exact_share,
                    score_ratio=own.score_multiply_adds / exact.score_multiply_adds,
                )
            )
        return rows


def relative_errors(
    mechanisms: Sequence[AttentionMechanism],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    scale: float,
) -> Iterator[Tensor]:
    """(b, h) of each mechanism in turn: ‖Ô − O‖ / ‖O‖ over the real queries, O the output of exact attention."""
    if mask.key_keep is not None:
        padded = ~mask.key_keep[:, None, :, None]
        key, value = key.masked_fill(padded, 0.0), value.masked_fill(padded, 0.0)
    exact, _ = exact_attention_with_weights(query, key, value, mask, scale, 0.0)
    real = used_tokens(mask, query, key)[0][:, None, :, None]  # (b, 1, n_q, 1)
    norm = exact.masked_fill(~real, 0.0).flatten(2).norm(dim=-1).clamp_min(1e-12)  # (b, h)
    for mechanism in mechanisms:
        output, _ = mechanism(query, key, value, mask, scale=scale)
        yield (output - exact).masked_fill(~real, 0.0).flatten(2).norm(dim=-1) / norm


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


def standard_mechanisms(budgets: Iterable[float], rank: int) -> dict[str, dict[str, Any]]:
    """The mechanisms of the project and its nearest relatives at some shares of exact pairs, by label."""
    table: dict[str, dict[str, Any]] = {}
    for keep in budgets:
        at = f"{keep:.4g}"
        table |= {
            f"eigen_topk keep={at}": {"name": "eigen_topk", "rank": rank, "keep": keep},
            f"eigen_topk keep={at} select=estimate": {
                "name": "eigen_topk",
                "rank": rank,
                "keep": keep,
                "select": "estimate",
            },
            f"eigen_topk keep={at} rest=mean": {"name": "eigen_topk", "rank": rank, "keep": keep, "rest": "mean"},
            f"eigen_topk keep={at} rest=drop": {
                "name": "eigen_topk",
                "rank": rank,
                "keep": keep,
                "rest": "drop",
                "select": "estimate",
            },
            f"eigen_cluster keep={at}": {"name": "eigen_cluster", "rank": rank, "keep": keep},
            f"eigen_cluster keep={at} order=2": {"name": "eigen_cluster", "rank": rank, "keep": keep, "order": 2},
            f"eigen_row keep={at}": {"name": "eigen_row", "keep": keep, "selection": "greedy"},
            f"low_rank_topk keep={at}": {"name": "low_rank_topk", "rank": rank, "keep": keep, "basis": "input"},
            f"topk keep={at}": {"name": "topk", "keep": keep},
            f"sliding_window keep={at}": {"name": "sliding_window", "keep": keep},
            f"mra keep={at}": {"name": "mra", "keep": keep},
        }
    return table
