"""Alignment error of cross-attention: do weights, or the norms of what they add, say which word translates which?

After Kobayashi, Kuribayashi, Yokoi and Inui, *Attention is Not Only a Weight*, EMNLP 2020 (arXiv 2004.10102, §5). A
target word is linked to the source token with the largest weight α_ij or the largest norm ‖α_ij f(x_j)‖, for every
head; for a layer by the mean of α over heads and by ‖Σ_h α_ij f(x_j)‖. Words linked to the end mark get no link. Links
A are compared with sure and possible gold links S ⊆ P by the alignment error rate of Och and Ney (2003),

    AER = 1 − (|A ∩ S| + |A ∩ P|) / (|A| + |S|).

At the position where a decoder reads a word it predicts the next one, so there are two settings: the row of the
position that predicts the word (output; the paper's AWO), or of the one that reads it (input; AWI).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from approx_attn.attention.base import repeat_heads
from approx_attn.attention.exact import exact_attention_with_weights
from approx_attn.attention.mask import AttentionMask
from approx_attn.conversion.calibration.fitting import run_model
from approx_attn.conversion.calibration.moments import used_tokens
from approx_attn.conversion.capture import attention_observed
from approx_attn.conversion.layers import CROSS_ATTENTION
from approx_attn.diagnosis.analysis.norms import head_products, summed_norms, transformed_norms
from approx_attn.diagnosis.analysis.projections import find_output_projections

SETTINGS = ("output", "input")
MEASURES = ("weight", "norm")


@dataclass(frozen=True)
class GoldAlignment:
    """What is known of a batch of sentence pairs, of m target and n source tokens.

    Attributes:
        sure: (b, m, n) bool; True where the target word that position i predicts translates source word j.
        possible: (b, m, n) bool, at least `sure`.
        target_words: (b, m) bool, False where the prediction is the end mark or padding.
        source_words: (b, n) bool, likewise.
    """

    sure: Tensor
    possible: Tensor
    target_words: Tensor
    source_words: Tensor


@dataclass
class AlignmentCounts:
    """Streaming counts of links of one layer.

    Attributes:
        links: |A| by setting and measure, (h + 1,): of every head, then of the layer.
        sure_links, possible_links: |A ∩ S| and |A ∩ P|, likewise.
        sure: |S|.
    """

    links: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    sure_links: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    possible_links: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    sure: int = 0

    def update(self, weights: Tensor, products: Tensor, gold: GoldAlignment) -> None:
        """Add a batch.

        Args:
            weights: (b, h, m, n) of cross-attention; row i reads target word i − 1 and predicts word i.
            products: (b, n, h, h), from `head_products`.
            gold: of the batch.
        """
        norms = weights * transformed_norms(products)[:, :, None]
        measured = {
            "weight": torch.cat([weights, weights.mean(1, keepdim=True)], 1),  # (b, h + 1, m, n)
            "norm": torch.cat([norms, summed_norms(weights, products)[:, None]], 1),
        }
        self.sure += int(gold.sure.sum())
        for measure, matrix in measured.items():
            for setting in SETTINGS:
                # Word i is read one row below the one that predicts it. The row that wraps around is no word's.
                best = (matrix if setting == "output" else matrix.roll(-1, dims=2)).argmax(-1)  # (b, h + 1, m)
                self._count((setting, measure), best, gold)

    def _count(self, key: tuple[str, str], best: Tensor, gold: GoldAlignment) -> None:
        def at_best(known: Tensor) -> Tensor:
            """(b, m, n) bool at the linked source tokens, (b, h + 1, m)."""
            return known[:, None].expand(-1, best.shape[1], -1, -1).gather(-1, best[..., None])[..., 0]

        words = gold.target_words[:, :, None] & gold.source_words[:, None]
        linked = at_best(words)
        for counts, known in (
            (self.links, linked),
            (self.sure_links, linked & at_best(gold.sure)),
            (self.possible_links, linked & at_best(gold.possible)),
        ):
            counts[key] = counts.get(key, 0) + known.sum((0, 2))

    def error_rate(self, setting: str, measure: str) -> Tensor:
        """(h + 1,) AER of every head, then of the layer."""
        key = (setting, measure)
        return 1 - (self.sure_links[key] + self.possible_links[key]).double() / (self.links[key] + self.sure)


@dataclass(frozen=True)
class AlignmentErrors:
    """Counts by name of the cross-attention layer, in the order of the layers, and what one link per word can reach.

    Attributes:
        layers: by qualified name.
        sentences: how many pairs were seen.
        least: AER where every target word that has sure links gets one of them and no other word gets any.
    """

    layers: dict[str, AlignmentCounts]
    sentences: int
    least: float


def alignment_errors(
    model: nn.Module, batches: Iterable[tuple[Mapping[str, Tensor], GoldAlignment]]
) -> AlignmentErrors:
    """Run a translation model over sentence pairs and compare its cross-attention with their gold alignments.

    Args:
        model: holds cross-attention layers that `approx_attn.conversion.capture_attention_inputs` sees, whose names say
            so. Mechanisms in them do not matter: the weights are those of exact attention.
        batches: the model's inputs, with the true target, and what is known of them.

    Raises:
        ValueError: a model without such layers.
    """
    counter = _Counter()
    sentences = aligned = sure = 0
    for inputs, gold in batches:
        counter.projections = counter.projections or find_output_projections(model, inputs)
        counter.gold = gold
        with attention_observed(model, counter):
            sentences += run_model(model, inputs)
        aligned += int(gold.sure.any(-1).sum())
        sure += int(gold.sure.sum())
    if not counter.layers:
        raise ValueError(f"{type(model).__name__} has no cross-attention layer whose output projection was found.")
    return AlignmentErrors(counter.layers, sentences, least=1 - 2 * aligned / (aligned + sure))


@dataclass
class _Counter:
    """Callback of a capture: counts the links of every cross-attention layer against the gold of the batch."""

    projections: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, AlignmentCounts] = field(default_factory=dict)
    gold: GoldAlignment | None = None

    def __call__(
        self, layer: str, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float
    ) -> None:
        if CROSS_ATTENTION.search(layer) is None or layer not in self.projections:
            return
        assert self.gold is not None
        _, used = used_tokens(mask, query, key)
        key, value = (x.masked_fill(~used[:, None, :, None], 0.0) for x in (key, value))
        _, weights = exact_attention_with_weights(query, key, value, mask, scale, 0.0)
        value = repeat_heads(value, weights.shape[1])
        products = head_products(value, self.projections[layer].to(value.dtype))
        self.layers.setdefault(layer, AlignmentCounts()).update(weights, products, self.gold)
