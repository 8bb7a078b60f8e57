"""How much of a model's attention weights is their mean over inputs, and what that mean alone costs.

Weights that depend on positions alone are their own mean; those that depend on the content are not. Per layer and head,
on sequences that had no part in the mean Ā (U: uniform weights over the keys that a query may use, E: over sequences):

    share explained = 1 − E‖A − Ā‖² / E‖A − U‖²,    error of the output = E ‖Ā·V − A·V‖ / ‖A·V‖

Source: the weights of a trained model can be almost the same for all inputs (Rende and Viteritti, *Are queries and keys
always relevant? A case study on Transformer wave functions*, arXiv 2405.18874).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from approx_attn.attention import AttentionMask, AttentionMechanism, AttentionShape, build_attention
from approx_attn.attention.baselines.mean import MeanAttention
from approx_attn.attention.baselines.positional import ALIGNMENTS
from approx_attn.attention.exact import exact_attention_with_weights
from approx_attn.conversion.calibration.fitting import run_model, with_progress
from approx_attn.conversion.calibration.layer_errors import output_errors
from approx_attn.conversion.calibration.moments import used_tokens
from approx_attn.conversion.capture import attention_observed
from approx_attn.diagnosis.analysis.book import Book
from approx_attn.diagnosis.analysis.figures import heat_map, padded

UNIFORM = "uniform"
RIVALS = (UNIFORM, *ALIGNMENTS)  # uniform weights, and means by pair of positions and by offset

Rows = list[dict[str, Any]]


def mean_weights(
    model: nn.Module,
    first: Sequence[Any],
    second: Iterable[Any],
    lengths: Mapping[str, int],
    *,
    progress: bool = True,
) -> Rows:
    """Means of the weights of every head, taken on some inputs of a model and measured on others.

    Args:
        model: holds layers that `capture_attention_inputs` sees; stays as it is.
        first, second: inputs of the model to take the mean of, and to measure on.
        lengths: longest input of each layer, in keys, by qualified name.
        progress: show progress bars.

    Returns:
        A row per layer and head: `layer` (qualified name), `head`, `explained` with means by pair of positions and
        `explained_by_offset`; errors of the output with `uniform`, `mean` and `mean_by_offset` weights.
    """
    measurement = _Measurement(lengths)
    with attention_observed(model, measurement.observe):
        for batch in with_progress(first, progress, "averaging weights"):
            run_model(model, batch)
    measurement.fit()
    with attention_observed(model, measurement.measure):
        for batch in with_progress(second, progress, "measuring means"):
            run_model(model, batch)
    return measurement.rows()


class _Measurement:
    """Callbacks of two captures: one observes weights, one adds up what their means leave."""

    def __init__(self, lengths: Mapping[str, int]) -> None:
        self.lengths = lengths
        self.built: dict[str, dict[str, AttentionMechanism]] = {}  # by layer and rival
        self.squares: dict[str, Tensor] = {}  # layer -> (rivals, h) Σ‖A − Â‖²
        self.errors: dict[str, Tensor] = {}  # layer -> (rivals, h) Σ‖Ô − O‖/‖O‖ over sequences
        self.sequences: dict[str, int] = {}

    def observe(self, layer: str, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float) -> None:
        if layer not in self.built:
            shape = AttentionShape.of(query, key, value, max_length=self.lengths[layer], causal=mask.causal)
            means = {kind: build_attention("mean", shape, alignment=kind).eval() for kind in ALIGNMENTS}
            self.built[layer] = {UNIFORM: build_attention(UNIFORM, shape).eval(), **means}
        for mechanism in self.built[layer].values():
            if isinstance(mechanism, MeanAttention):
                mechanism.observe(query, key, mask, scale=scale)

    def fit(self) -> None:
        for mechanisms in self.built.values():
            for mechanism in mechanisms.values():
                if isinstance(mechanism, MeanAttention):
                    mechanism.fit()

    def measure(self, layer: str, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float) -> None:
        mechanisms = [self.built[layer][rival] for rival in RIVALS]
        real, used = used_tokens(mask, query, key)
        key, value = (x.masked_fill(~used[:, None, :, None], 0.0) for x in (key, value))
        inputs = (query, key, value, mask)
        _, exact = exact_attention_with_weights(*inputs, scale, 0.0)
        squares, errors = [], []
        for mechanism in mechanisms:
            _, weights = mechanism(*inputs, scale=scale, need_weights=True)
            assert weights is not None
            squares.append(((weights - exact).double().square().sum(-1) * real[:, None]).sum((0, 2)))
        for error, norm in output_errors(mechanisms, *inputs, scale):
            errors.append((error / norm).double().sum(0))
        for sums, found in ((self.squares, squares), (self.errors, errors)):
            sums[layer] = sums.get(layer, torch.zeros(())) + torch.stack(found).cpu()
        self.sequences[layer] = self.sequences.get(layer, 0) + len(query)

    def rows(self) -> Rows:
        rows = []
        for layer, squares in self.squares.items():
            explained = 1.0 - squares[1:] / squares[0].clamp_min(1e-12)  # (alignments, h)
            errors = self.errors[layer] / self.sequences[layer]
            for head in range(squares.shape[1]):
                row: dict[str, Any] = {"layer": layer, "head": head}
                row |= dict(zip(("explained", "explained_by_offset"), explained[:, head].tolist(), strict=True))
                row |= dict(zip(("uniform", "mean", "mean_by_offset"), errors[:, head].tolist(), strict=True))
                rows.append(row)
        return rows


def add_mean_weights(book: Book, found: Rows, labels: Mapping[str, str]) -> None:
    """Are queries and keys needed?"""
    section = book.section("Weights and their mean over inputs")
    section.text(
        "Weights that depend on positions alone are the same for every input, so their mean explains them wholly. "
        "Share explained: 1 − E‖A − Ā‖² / E‖A − U‖², Ā the mean of sequences that are not among those measured, U "
        "uniform weights; below zero where the mean is no better than uniform weights. Errors of the output: "
        "‖Ô − O‖/‖O‖ with weights in place of the exact ones, nothing trained."
    )
    by_layer: dict[str, Rows] = {}
    for row in found:
        by_layer.setdefault(labels.get(row["layer"], row["layer"]), []).append(row)
    figures = [key for key in found[0] if key not in ("layer", "head")]
    means = [
        {"layer": layer, **{key: sum(row[key] for row in rows) / len(rows) for key in figures}}
        for layer, rows in by_layer.items()
    ]
    heads = [str(head) for head in range(max(map(len, by_layer.values())))]
    section.figure(
        "mean_weights",
        heat_map(
            padded([[row["explained"] for row in rows] for rows in by_layer.values()]),
            ("layer", list(by_layer)),
            ("head", heads),
            scale="share of weights explained by their mean",
            limits=(0.0, 1.0),
        ),
        "Share of the attention weights, around uniform ones, that their mean by pair of positions explains.",
    )
    section.table(
        "mean_weights",
        means,
        "Means over heads. explained, mean: weights averaged by pair of positions; by offset: by offset of key and "
        "query. uniform, mean, mean by offset: errors of the output. By head in tables/mean_weights_by_head.csv.",
    )
    book.keep("mean_weights_by_head", [{**row, "layer": labels.get(row["layer"], row["layer"])} for row in found])
