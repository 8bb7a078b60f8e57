"""Spectra and principal axes of all layers of one pass, and tables of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from approx_attn.diagnosis.analysis.collect import Statistics
from approx_attn.diagnosis.analysis.moments import pooled_matrix_spectrum, spectra_of_sums
from approx_attn.diagnosis.analysis.overlap import overlap_matrix, pairs_above_diagonal
from approx_attn.diagnosis.analysis.spectrum import Spectrum

KINDS = ("centred", "raw")
SHARES = (0.9, 0.95, 0.99)
POOLED_MATRICES = 512  # matrices over all layers whose inner products are formed
ALL = "all"


@dataclass
class Spectra:
    """Spectra of one kind of sample, by kind of centring.

    Attributes:
        heads: kind to layer label to one spectrum per head.
        layers: kind to layer label to the spectrum of its heads together.
        model: kind to the spectrum of all layers together; kinds are missing where there is one layer only, or layers
            differ in length.
    """

    heads: dict[str, dict[str, list[Spectrum]]]
    layers: dict[str, dict[str, Spectrum]]
    model: dict[str, Spectrum]

    def table(self, sample: str, data: str, ranks: Sequence[int]) -> list[dict[str, Any]]:
        """One row per kind, layer and head, pools under "all"."""
        rows = []
        for kind, by_layer in self.layers.items():
            for label, spectrum in by_layer.items():
                for head, of_head in enumerate(self.heads[kind][label]):
                    rows.append(spectrum_row(of_head, sample, data, kind, label, str(head), ranks))
                rows.append(spectrum_row(spectrum, sample, data, kind, label, ALL, ranks))
            if kind in self.model:
                rows.append(spectrum_row(self.model[kind], sample, data, kind, ALL, ALL, ranks))
        return rows

    def eigenvalues(self, sample: str, data: str) -> list[dict[str, Any]]:
        """One row per kind, layer and component, heads pooled."""
        return [
            {
                "data": data,
                "sample": sample,
                "kind": kind,
                "layer": label,
                "component": component + 1,
                "eigenvalue": float(value),
                "explained": float(explained),
            }
            for kind, layers in self.layers.items()
            for label, spectrum in layers.items()
            for component, (value, explained) in enumerate(zip(spectrum.eigenvalues, spectrum.explained, strict=True))
        ]


def spectrum_row(
    spectrum: Spectrum, sample: str, data: str, kind: str, layer: str, head: str, ranks: Sequence[int]
) -> dict[str, Any]:
    """A spectrum in figures."""
    row: dict[str, Any] = {"data": data, "sample": sample, "kind": kind, "layer": layer, "head": head}
    row |= {"samples": spectrum.samples, "dimensions": spectrum.dimensions, "effective_rank": spectrum.effective_rank}
    row |= {f"components_{share:.0%}": spectrum.components_for(share) for share in SHARES}
    return row | {f"r={rank}": spectrum.explained_by(rank) for rank in ranks}


def row_spectra(statistics: Statistics) -> Spectra:
    """Spectra of single rows: per head, per layer, and of the whole model."""
    found = Spectra({}, {}, {})
    for kind in KINDS:
        moments = {layer.label: layer.rows[kind] for layer in statistics.layers}
        found.heads[kind] = {label: part.spectra("head") for label, part in moments.items()}
        found.layers[kind] = {label: part.spectra("layer")[0] for label, part in moments.items()}
        if len(moments) > 1 and len({part.total.shape[-1] for part in moments.values()}) == 1:
            sums = [sum(parts) for parts in zip(*(part.pooled_sums() for part in moments.values()), strict=True)]
            samples = sum(part.seen_rows for part in moments.values())
            (found.model[kind],) = spectra_of_sums(sums, centred=kind == "centred", samples=samples)  # type: ignore[arg-type]
    return found


def matrix_spectra(statistics: Statistics) -> Spectra:
    """Spectra of whole score matrices, from the sample that was kept."""
    found = Spectra({}, {}, {})
    samples = {layer.label: layer.matrices for layer in statistics.layers if layer.matrices is not None}
    for kind in KINDS:
        of_kind = {label: sample.spectra(kind == "centred") for label, sample in samples.items()}
        found.heads[kind] = {label: heads for label, (heads, _) in of_kind.items()}
        found.layers[kind] = {label: pooled for label, (_, pooled) in of_kind.items()}
        if len(samples) > 1:
            pooled = pooled_matrix_spectrum(list(samples.values()), kind == "centred", POOLED_MATRICES)
            if pooled is not None:
                found.model[kind] = pooled
    return found


@dataclass
class Eigenspaces:
    """Principal axes of centred rows, and overlaps between layers and heads that have equally many keys.

    Args:
        layers: layer label to its spectrum, heads pooled.
        heads: layer label to spectra per head.
    """

    layers: dict[str, Spectrum]
    heads: dict[str, list[Spectrum]]

    @cached_property
    def comparable(self) -> list[str]:
        """Labels of the layers with the commonest number of keys."""
        sizes = {label: len(vectors_of(spectrum)) for label, spectrum in self.layers.items()}
        commonest = max(set(sizes.values()), key=list(sizes.values()).count)
        return [label for label, size in sizes.items() if size == commonest]

    @property
    def dimensions(self) -> int:
        """Directions that centred rows of these layers vary in."""
        return self.layers[self.comparable[0]].dimensions

    def layer_bases(self) -> list[np.ndarray]:
        return [vectors_of(self.layers[label]) for label in self.comparable]

    def head_bases(self) -> list[np.ndarray]:
        return [vectors_of(spectrum) for label in self.comparable for spectrum in self.heads[label]]

    def between_layers(self, rank: int) -> np.ndarray:
        """(layers, layers) overlaps."""
        return overlap_matrix(self.layer_bases(), rank)

    def between_heads(self, rank: int) -> np.ndarray:
        """(heads of all layers, heads of all layers) overlaps."""
        return overlap_matrix(self.head_bases(), rank)

    def head_pairs(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """(overlaps of heads of one layer, overlaps of heads of different layers)."""
        matrix = self.between_heads(rank)
        owner = np.array([i for i, label in enumerate(self.comparable) for _ in self.heads[label]])
        same = pairs_above_diagonal(owner[:, None] == owner[None, :]).astype(bool)
        values = pairs_above_diagonal(matrix)
        return values[same], values[~same]


def eigenspaces(spectra: Spectra) -> Eigenspaces:
    """The principal axes of centred rows."""
    return Eigenspaces(spectra.layers["centred"], spectra.heads["centred"])


def vectors_of(spectrum: Spectrum) -> np.ndarray:
    """(p, k) principal axes."""
    assert spectrum.vectors is not None
    return spectrum.vectors
