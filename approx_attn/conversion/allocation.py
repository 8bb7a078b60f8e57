"""Budgets from a target: what every attention layer and head may compute exactly, from errors measured on inputs."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from approx_attn.attention import AttentionMask, AttentionMechanism, AttentionShape, attention_class
from approx_attn.attention.calibrated import BasisMechanism
from approx_attn.attention.eigen.basis_file import Calibration
from approx_attn.attention.registry import attention_options
from approx_attn.conversion.budgets import Allocation, LayerBudget, shape_of
from approx_attn.conversion.calibration.fitting import calibrate, model_output, run_model, with_progress
from approx_attn.conversion.calibration.layer_errors import mechanism_for_layer, output_errors
from approx_attn.conversion.calibration.moments import STATISTICS
from approx_attn.conversion.capture import attention_observed
from approx_attn.conversion.convert import attention_spec, convert
from approx_attn.conversion.installing import find_layers

KEEPS = (1 / 64, 1 / 32, 3 / 64, 1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2)
"""Shares of exact pairs that are tried where the mechanism is given without `keep`."""

EXACT = {"name": "exact"}


def allocate(
    model: nn.Module,
    batches: Iterable[Any],
    attention: str | Mapping[str, Any] | partial | Sequence[str | Mapping[str, Any]] = "eigen_topk",
    *,
    target_error: float | None = None,
    mean_share: float | None = None,
    progress: bool = True,
) -> Allocation:
    """Choose the mechanism and budget of every attention layer of a model, and of every head where it takes those.

    Measured on the model's own inputs is ‖Ô − O‖ / ‖O‖ of the output of each layer's attention, at `KEEPS`. With
    `target_error` every layer gets the fewest exact pairs at which its error is at most that. With `mean_share` pairs
    go where they take most from Σ_l (w_l e_l)², the squared errors e_l of the layers, each times the effect w_l of the
    layer on the output of the model (logits, or the mean-pooled hidden states of an encoder without a head, measured
    with that layer alone converted), until they are that share of all pairs.
    Layers that no budget serves are left exact. Memory holds one batch.

    Args:
        model: a trained model that `convert` takes, not converted; stays as it is.
        batches: inputs of the model, as `calibrate` takes them. Bases are fitted to them as well.
        attention: a mechanism with a `keep`, as `convert` takes it, or several, of which each layer gets the best.
        target_error: largest error of a layer, such as 0.05.
        mean_share: share of the pairs of all layers and heads that is computed exactly, such as 0.125.
        progress: show progress bars.

    Returns:
        Budgets for `convert(model, budgets=...)`.

    Raises:
        ValueError: no target or two, a target that cannot be reached, a converted model, or a mechanism without `keep`
            or that no calibration fits; no batches.

    Example:
        >>> budgets = allocate(model, batches, "eigen_topk", mean_share=0.125)
        >>> convert(model, budgets=budgets, calibration=batches)
    """
    _require_target(target_error, mean_share)
    several = isinstance(attention, Sequence) and not isinstance(attention, str)
    specs = [_spec(entry) for entry in (attention if several else [attention])]  # type: ignore[union-attr]
    batches, found = list(batches), find_layers(model)
    if any(isinstance(m, AttentionMechanism) and m.name != "exact" for m in model.modules()):
        raise ValueError(f"allocate needs the model as it was, this {type(model).__name__} is converted: revert it.")
    kinds = {cls.basis_kind for spec in specs if issubclass(cls := attention_class(spec["name"]), BasisMechanism)}
    statistics = [kind for kind in STATISTICS if kind in kinds] or ["content"]
    fitted = calibrate(model, batches, statistics=statistics, progress=progress)
    candidates = [spec | {"keep": keep} for spec in specs for keep in _keeps(spec)]
    measured = _Measurement(candidates, fitted)
    with attention_observed(model, measured):
        for batch in with_progress(batches, progress, "measuring"):
            run_model(model, batch)
    curves = {layer: measured.curve(layer) for layer in measured.squares}
    if target_error is not None:
        chosen, effects = _reach_error(curves, target_error), dict.fromkeys(curves, 1.0)
    else:
        assert mean_share is not None
        effects = _effects(model, batches, measured, mean_share, progress)
        chosen = _spend_share(curves, effects, mean_share)
    layers = {layer.name: LayerBudget(dict(EXACT)) for layer in found}
    layers |= {name: curve.budget(chosen[name], effects[name]) for name, curve in curves.items()}
    return Allocation(layers, type(model).__name__)


def _require_target(target_error: float | None, mean_share: float | None) -> None:
    given = {"target_error": target_error, "mean_share": mean_share}
    if sum(value is not None for value in given.values()) != 1:
        raise ValueError(f"one of target_error and mean_share must be given, got {target_error} and {mean_share}.")
    for key, value in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1):
            raise ValueError(f"{key} must be a number above 0 and at most 1, got {value!r}.")


def _spec(entry: Any) -> dict[str, Any]:
    spec = attention_spec(entry, {})
    cls = attention_class(spec["name"])
    if "keep" not in attention_options(spec["name"]):
        raise ValueError(f"attention={spec['name']} has no keep to allocate.")
    if cls.capabilities.needs_calibration and not issubclass(cls, BasisMechanism):
        raise ValueError(f"attention={spec['name']} cannot be allocated: it starts from no basis that is fitted here.")
    return spec


def _keeps(spec: Mapping[str, Any]) -> Sequence[Any]:
    return [spec["keep"]] if "keep" in spec else KEEPS


# -- errors of every candidate in every layer ----------------------------------------------------------


class _Measurement:
    """Callback of a capture: squared errors of all candidates in the layers of a model, by head.

    Args:
        candidates: mechanisms `{"name": ..., "keep": ..., **options}`.
        fitted: what they start from.
    """

    def __init__(self, candidates: Sequence[Mapping[str, Any]], fitted: Calibration) -> None:
        self.candidates, self.fitted = candidates, fitted
        self.mechanisms: dict[str, list[AttentionMechanism]] = {}
        self.squares: dict[str, Tensor] = {}  # (candidates, h): Σ ‖Ô − O‖²
        self.norms: dict[str, Tensor] = {}  # (h,): Σ ‖O‖²
        self.longest: dict[str, tuple[int, int, bool]] = {}

    def __call__(
        self, layer: str, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float
    ) -> None:
        inputs = (query, key, value, mask)
        if layer not in self.mechanisms:
            start = partial(mechanism_for_layer, layer=layer, calibration=self.fitted, basis=self.fitted)
            self.mechanisms[layer] = [
                start(spec, query=query, key=key, value=value, mask=mask) for spec in self.candidates
            ]
            self.squares[layer] = torch.zeros(len(self.candidates), query.shape[1], dtype=torch.float64)
            self.norms[layer] = torch.zeros(query.shape[1], dtype=torch.float64)
        for i, (error, norm) in enumerate(output_errors(self.mechanisms[layer], *inputs, scale)):
            self.squares[layer][i] += error.double().square().sum(0).cpu()
            if i == 0:
                self.norms[layer] += norm.double().square().sum(0).cpu()
        size = (query.shape[-2], key.shape[-2], mask.causal)
        self.longest[layer] = max(self.longest.get(layer, size), size)

    def curve(self, layer: str) -> LayerCurve:
        """What the budgets of a layer can be, and what they lose."""
        n_q, n_k, causal = self.longest[layer]
        costs = [mechanism.cost(n_q, n_k, causal=causal) for mechanism in self.mechanisms[layer]]
        shape = self.mechanisms[layer][0].shape
        pairs = np.array([cost.exact_pairs / shape.num_heads for cost in costs])
        squares, norms = self.squares[layer].numpy(), self.norms[layer].numpy()
        return LayerCurve(self.candidates, shape, squares, norms, pairs, costs[0].total_pairs / shape.num_heads)


class Point(NamedTuple):
    """One choice for a layer.

    Attributes:
        pairs: exact pairs of all heads.
        square: ‖Ô − O‖² / ‖O‖² of all heads together.
        heads: the candidate of every head, in order; empty for exact attention.
    """

    pairs: float
    square: float
    heads: tuple[int, ...] = ()


@dataclass(frozen=True)
class LayerCurve:
    """What the budgets of a layer can be, and what they lose.

    Attributes:
        candidates: mechanisms with their budgets.
        shape: of the layer.
        squares: (candidates, h), Σ ‖Ô − O‖².
        norms: (h,), Σ ‖O‖².
        pairs: (candidates,), exact pairs of a head.
        total: pairs of a head.
    """

    candidates: Sequence[Mapping[str, Any]]
    shape: AttentionShape
    squares: np.ndarray
    norms: np.ndarray
    pairs: np.ndarray
    total: float

    def points(self) -> list[Point]:
        """The choices, exact attention the last."""
        options = [{key: value for key, value in spec.items() if key != "keep"} for spec in self.candidates]
        found: list[Point] = []
        for spec in [spec for i, spec in enumerate(options) if spec not in options[:i]]:
            same = np.array([i for i, other in enumerate(options) if other == spec])
            same = same[np.argsort(self.pairs[same], kind="stable")]
            by_head = attention_class(spec["name"]).capabilities.head_budgets
            found += self._paths(same) if by_head else [self._point([i] * self.shape.num_heads) for i in same]
        return [*found, Point(self.total * self.shape.num_heads, 0.0)]

    def _paths(self, candidates: np.ndarray) -> list[Point]:
        """From the least budget of every head, step by step the one that takes off most error per pair."""
        squares, pairs = self.squares[candidates], self.pairs[candidates]
        heads = np.arange(self.shape.num_heads)
        at = np.zeros(len(heads), dtype=int)
        found = []
        while True:
            found.append(self._point(candidates[at]))
            more = pairs[:, None] - pairs[at]  # (candidates, h)
            gain = np.where(more > 0, (squares[at, heads] - squares) / np.maximum(more, 1e-9), 0.0)
            step, head = np.unravel_index(gain.argmax(), gain.shape)
            if gain[step, head] <= 0.0:
                return found
            at[head] = step

    def _point(self, heads: Sequence[int] | np.ndarray) -> Point:
        square = self.squares[heads, np.arange(len(heads))].sum() / max(self.norms.sum(), 1e-24)
        return Point(float(self.pairs[heads].sum()), float(square), tuple(int(i) for i in heads))

    def budget(self, point: Point, effect: float) -> LayerBudget:
        """What a layer gets that this choice was made for."""
        h, shape = self.shape.num_heads, shape_of(self.shape)
        total = round(self.total * h)
        if not point.heads:
            return LayerBudget(dict(EXACT), shape, 0.0, (0.0,) * h, (1.0,) * h, total, effect)
        chosen = list(point.heads)
        keeps = [self.candidates[i]["keep"] for i in chosen]
        one = all(keep == keeps[0] for keep in keeps)
        errors = np.sqrt(self.squares[chosen, np.arange(h)] / np.maximum(self.norms, 1e-24))
        return LayerBudget(
            attention={**self.candidates[chosen[0]], "keep": keeps[0] if one else keeps},
            shape=shape,
            error=point.square**0.5,
            head_errors=tuple(errors.tolist()),
            head_shares=tuple((self.pairs[chosen] / self.total).tolist()),
            total_pairs=total,
            effect=effect,
        )


# -- choosing ------------------------------------------------------------------------------------------


def _reach_error(curves: Mapping[str, LayerCurve], target: float) -> dict[str, Point]:
    """For every layer the fewest pairs at which its error is at most the target."""
    points = {layer: curve.points() for layer, curve in curves.items()}
    chosen = {
        layer: min((p for p in each if p.square <= target**2), key=lambda p: p.pairs) for layer, each in points.items()
    }
    if not any(point.heads for point in chosen.values()):
        least = min(min(p.square for p in each if p.heads) for each in points.values())
        raise ValueError(f"target_error={target:g} is reached in no layer: the least error of one is {least**0.5:.3g}.")
    return chosen


def _spend_share(curves: Mapping[str, LayerCurve], effects: Mapping[str, float], mean_share: float) -> dict[str, Point]:
    """From the fewest pairs everywhere, step by step the layer that takes off most error of the model per pair."""
    points = {layer: sorted(curve.points(), key=lambda p: p.pairs) for layer, curve in curves.items()}
    pairs = {layer: np.array([p.pairs for p in each]) for layer, each in points.items()}
    squares = {layer: effects[layer] ** 2 * np.array([p.square for p in each]) for layer, each in points.items()}
    at = dict.fromkeys(curves, 0)
    total = sum(curve.total * curve.shape.num_heads for curve in curves.values())
    left = mean_share * total - sum(each[0] for each in pairs.values())
    if left < -1e-9 * total:
        least = sum(each[0] for each in pairs.values()) / total
        raise ValueError(
            f"mean_share={mean_share:g} cannot be reached: the least budgets are {least:.3g} of the pairs."
        )
    while True:
        best, chosen = 0.0, None
        for layer, now in at.items():
            more = pairs[layer] - pairs[layer][now]
            gain = (squares[layer][now] - squares[layer]) / np.maximum(more, 1e-9)
            gain[(more <= 0) | (more > left + 1e-9 * total)] = 0.0
            step = int(gain.argmax())
            if gain[step] > best:
                best, chosen = float(gain[step]), (layer, step)
        if chosen is None:
            return {layer: points[layer][now] for layer, now in at.items()}
        layer, step = chosen
        left -= pairs[layer][step] - pairs[layer][at[layer]]
        at[layer] = step


def _effects(
    model: nn.Module, batches: Sequence[Any], measured: _Measurement, mean_share: float, progress: bool
) -> dict[str, float]:
    """Relative error of the model's output per error of each layer alone, at the candidate nearest to the share."""
    curves = {layer: measured.curve(layer) for layer in measured.squares}
    shares = sum(curve.pairs / curve.total for curve in curves.values()) / len(curves)
    probe = int(np.abs(shares - mean_share).argmin())
    spec = measured.candidates[probe]
    one_by_one = {}
    for layer in measured.fitted.layers:
        converted = convert(
            sharing_copy(model), spec, layers=layer.name, calibration=None, example=batches[0], max_length=layer.length
        )
        measured.fitted.load_into_model(converted)
        one_by_one[layer.name] = converted.eval()
    is_causal = any(layer.causal for layer in measured.fitted.layers)
    moved, norm = dict.fromkeys(one_by_one, 0.0), 0.0
    with torch.no_grad():
        for batch in with_progress(batches, progress, "effects of layers"):
            output = _output(model, batch, is_causal)
            norm += float(output.square().sum())
            for name, converted in one_by_one.items():
                moved[name] += float((_output(converted, batch, is_causal) - output).square().sum())
    local = {layer: curve.squares[probe].sum() / max(curve.norms.sum(), 1e-24) for layer, curve in curves.items()}
    return {layer: float((moved[layer] / norm / max(local[layer], 1e-24)) ** 0.5) for layer in curves}


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode of a model's modules with the same parameters and buffers, to be converted."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}).eval()


def _output(model: nn.Module, batch: Any, is_causal: bool) -> Tensor:
    """What a model is for, as float64: logits, or the mean of the last hidden states of an encoder without a head."""
    result = model_output(model, batch)
    is_embedding = hasattr(result, "last_hidden_state") and not is_causal
    result = result if isinstance(result, Tensor) else result[0]
    keep = batch.get("attention_mask", batch.get("keep")) if isinstance(batch, Mapping) else None
    if not isinstance(keep, Tensor) or result.dim() != 3 or keep.shape != result.shape[:2]:
        keep = torch.ones(result.shape[:2])
    weights = keep.to(result.device).double()[(...,) + (None,) * (result.dim() - 2)]  # padding counts for nothing
    weighted = result.double() * weights
    return weighted.sum(1) / weights.sum(1).clamp_min(1.0) if is_embedding else weighted
