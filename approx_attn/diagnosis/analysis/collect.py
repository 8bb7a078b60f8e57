"""One pass of a live model over data: every statistic of the analysis at once, in memory that does not grow."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from approx_attn.attention.exact import exact_attention_with_weights
from approx_attn.attention.mask import AttentionMask
from approx_attn.conversion.calibration.fitting import run_model, with_progress
from approx_attn.conversion.calibration.moments import used_tokens
from approx_attn.conversion.capture import attention_observed
from approx_attn.conversion.layers import CROSS_ATTENTION, DECODER
from approx_attn.diagnosis.analysis.moments import MatrixSample, RowMoments
from approx_attn.diagnosis.analysis.norms import NormMoments
from approx_attn.diagnosis.analysis.projections import find_output_projections
from approx_attn.diagnosis.analysis.tokens import CATEGORIES, TokenCategories
from approx_attn.errors import require_count, require_one_of

PARTS = ("rows", "matrices", "norms")
Categories = Callable[[str, Any, int, int], Tensor]


@dataclass
class LayerStatistics:
    """What was seen of one attention layer.

    Attributes:
        name: qualified name of the attention module.
        label: short name for tables and figures.
        heads: query heads.
        key_value_heads: key heads.
        head_dim: features of a query.
        length: longest input, in keys.
        rows: moments of single rows by `raw` and `centred`.
        matrices: a sample of whole matrices.
        norms: sums of weights and norms; None where W_O was not found.
        needs: `approx_attn.attention.Capabilities` that a mechanism in this place must have.
    """

    name: str
    heads: int
    key_value_heads: int
    head_dim: int
    label: str = ""
    length: int = 0
    rows: dict[str, RowMoments] = field(default_factory=dict)
    matrices: MatrixSample | None = None
    norms: NormMoments | None = None
    needs: set[str] = field(default_factory=set)


@dataclass
class Statistics:
    """What one pass has seen: layers in the order of the model's modules, and the number of sequences."""

    layers: list[LayerStatistics]
    sequences: int


def collect(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    parts: Sequence[str] = PARTS,
    rows: int | None = None,
    matrices: int = 32,
    categories: Categories | None = None,
    progress: bool = True,
    description: str = "analysing",
    seed: int = 0,
) -> Statistics:
    """Run a model once over data and gather statistics of all its attention layers.

    Args:
        model: holds layers that `approx_attn.conversion.capture_attention_inputs` sees. Stays as it is.
        batches: inputs of the model: mappings (keyword arguments), tuples or lists (arguments), or tensors.
        parts: which of `rows`, `matrices`, `norms`.
        rows: queries per batch whose rows are taken where the shortcut of `RowMoments` does not apply; all if None.
        matrices: sequences whose whole score matrices are kept.
        categories: (layer name, batch, batch size, length) to (b, n_k) indices into `CATEGORIES`.
        progress: show a progress bar with the time left.
        description: what the bar says.
        seed: of the draw of rows.

    Raises:
        ValueError: an unknown part, no batches, or a model without attention layers that can be seen.
    """
    for part in parts:
        require_one_of("parts", part, PARTS)
    collector = _Collector(parts, rows, require_count("matrices", matrices), categories or TokenCategories(), seed)
    sequences = 0
    for index, batch in enumerate(with_progress(batches, progress, description)):
        if index == 0 and "norms" in parts:
            collector.projections = find_output_projections(model, batch)
        collector.batch = batch
        with attention_observed(model, collector):
            sequences += run_model(model, batch)
    if sequences == 0:
        raise ValueError("the analysis got no batches.")
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    layers = sorted(collector.layers.values(), key=lambda layer: order.get(layer.name, len(order)))
    for layer, label in zip(layers, layer_labels([layer.name for layer in layers]), strict=True):
        layer.label = label
    return Statistics(layers, sequences)


@dataclass
class _Collector:
    """Callback of a capture: hands the inputs of every layer to its statistics; arguments as those of `collect`."""

    parts: Sequence[str]
    rows: int | None
    matrices: int
    categories: Categories
    seed: int
    batch: Any = None
    projections: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, LayerStatistics] = field(default_factory=dict)

    def __call__(
        self, layer: str, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float
    ) -> None:
        if query.shape[0] != key.shape[0]:  # learned queries: one row stands for the whole batch
            query = query.expand(key.shape[0], -1, -1, -1)
        statistics = self._layer(layer, query, key)
        statistics.length = max(statistics.length, key.shape[-2])
        statistics.needs |= needed_capabilities(query, key, mask)
        for moments in statistics.rows.values():
            moments.update(query, key, mask, scale)
        if statistics.matrices is not None:
            statistics.matrices.update(query, key, mask, scale)
        if statistics.norms is not None:
            self._add_norms(statistics.norms, layer, query, key, value, mask, scale)

    def _layer(self, name: str, query: Tensor, key: Tensor) -> LayerStatistics:
        if name not in self.layers:
            layer = LayerStatistics(name, query.shape[1], key.shape[1], query.shape[-1])
            if "rows" in self.parts:
                layer.rows = {
                    kind: RowMoments(centred=kind == "centred", rows=self.rows, seed=self.seed)
                    for kind in ("raw", "centred")
                }
            if "matrices" in self.parts:
                layer.matrices = MatrixSample(self.matrices)
            if name in self.projections:
                layer.norms = NormMoments(CATEGORIES)
            self.layers[name] = layer
        return self.layers[name]

    def _add_norms(
        self,
        norms: NormMoments,
        layer: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: AttentionMask,
        scale: float,
    ) -> None:
        real, used = used_tokens(mask, query, key)
        key, value = (x.masked_fill(~used[:, None, :, None], 0.0) for x in (key, value))
        _, weights = exact_attention_with_weights(query, key, value, mask, scale, 0.0)
        keep = real[:, None, :, None] & used[:, None, None, :]  # (b, 1, n_q, n_k)
        dense = mask.dense_keep(query.shape[-2], key.shape[-2], query.device)
        if dense is not None:
            keep = keep & dense
        category = self.categories(layer, self.batch, key.shape[0], key.shape[-2]).to(query.device)
        norms.update(weights, value, self.projections[layer], category, keep)


def needed_capabilities(query: Tensor, key: Tensor, mask: AttentionMask) -> set[str]:
    """What a mechanism must be able to do to stand in for one attention call."""
    asked = {
        "causal": mask.causal,
        "cross": query.shape[-2] != key.shape[-2],
        "padding_mask": mask.key_keep is not None,
        "arbitrary_mask": not mask.is_structured,
        "window": mask.window is not None,
        "softcap": mask.softcap is not None,
        "sinks": mask.sinks is not None,
    }
    return {capability for capability, wanted in asked.items() if wanted}


def layer_labels(names: Sequence[str]) -> list[str]:
    """Short labels in order: "0", "1", … or, where there are several kinds, "encoder 0", "decoder 0", "cross 0"."""
    kinds = [_kind(name) for name in names]
    several = len(set(kinds)) > 1
    counts: dict[str, Iterator[int]] = {kind: iter(range(len(names))) for kind in set(kinds)}
    return [f"{kind} {next(counts[kind])}" if several else str(next(counts[kind])) for kind in kinds]


def _kind(name: str) -> str:
    if CROSS_ATTENTION.search(name):
        return "cross"
    if DECODER.search(name):
        return "decoder"
    return "encoder" if re.search("encoder", name, re.IGNORECASE) else ""
