"""Sections of the report on eigenspaces: each puts its text, figures and tables into a book."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from approx_attn.diagnosis.analysis.book import Book, BookSection
from approx_attn.diagnosis.analysis.collect import Statistics
from approx_attn.diagnosis.analysis.eigenspaces import ALL, Eigenspaces, Spectra, eigenspaces, vectors_of
from approx_attn.diagnosis.analysis.figures import (
    eigenvector_lines,
    explained_variance,
    grouped_bars,
    heat_map,
    overlap_by_rank,
    padded,
)
from approx_attn.diagnosis.analysis.overlap import (
    overlap_matrix,
    pairs_above_diagonal,
    random_overlap,
    subspace_overlap,
)

REAL, RANDOM = "data", "random tokens"
HEADLINE_RANK = 8
Ranks = Sequence[int]


def add_layers(book: Book, statistics: Statistics) -> None:
    """What was looked at."""
    rows = [
        {
            "layer": layer.label,
            "module": layer.name,
            "heads": layer.heads,
            "key_heads": layer.key_value_heads,
            "head_dim": layer.head_dim,
            "keys": layer.length,
        }
        for layer in statistics.layers
    ]
    book.section("Layers").table(
        "layers",
        rows,
        f"Attention layers of the model, {statistics.sequences} sequences. Layers are called by these names below.",
    )


def add_row_spectra(book: Book, spectra: Spectra, random: Spectra | None, ranks: Ranks) -> None:
    """How many dimensions do single rows of scores have?"""
    section = book.section("Spectrum of single score rows")
    section.text(
        "A row holds the scores s·q·k of one query with all keys. Softmax ignores a constant added to a row, so "
        "centred rows, each less its own mean, are what counts for the output; raw rows are shown beside them. "
        "Principal components are of the rows less their mean row. Position biases that a model adds to its scores are "
        "left out; where a mask closes pairs, every covariance is over the rows that have both keys. "
        "The rows of one head on one sequence span no more than head_dim dimensions, so where scores follow the "
        "content rather than the position, few sequences make a layer look lower-dimensional than it is."
    )
    kinds = {f"{kind} rows": spectra.layers[kind] for kind in ("centred", "raw")}
    section.figure(
        "row_spectrum",
        explained_variance(kinds, "score rows"),
        "Share of the variance of single score rows in the first components, heads of a layer pooled. "
        "Dotted: 90, 95 and 99%.",
    )
    rows = spectra.table("row", REAL, ranks)
    if random is not None:
        rows += random.table("row", RANDOM, ranks)
    book.keep("row_spectrum", rows)
    book.keep(
        "row_eigenvalues",
        spectra.eigenvalues("row", REAL) + ([] if random is None else random.eigenvalues("row", RANDOM)),
    )
    columns = [key for key in rows[0] if key not in ("data", "sample", "head", "kind", "dimensions")]
    pooled = [row for row in rows if row["head"] == ALL and row["data"] == REAL]
    for kind in ("centred", "raw"):
        section.text(f"{kind.capitalize()} rows, heads pooled:")
        section.table(
            f"row_spectrum_{kind}",
            [row for row in pooled if row["kind"] == kind],
            "r = k: share of the variance in the first k components. Effective rank: exp of the entropy of the "
            "normalised eigenvalues. samples: rows seen.",
            shown=columns,
        )
    labels = list(spectra.layers["centred"])
    section.figure(
        "effective_rank",
        heat_map(
            padded([[s.effective_rank for s in spectra.heads["centred"][label]] for label in labels]),
            ("layer", labels),
            ("head", [str(head) for head in range(max(map(len, spectra.heads["centred"].values())))]),
            scale="effective rank of centred rows",
        ),
        "Effective rank of centred score rows by layer and head.",
    )
    if all(vectors_of(spectrum).shape[1] >= 4 for spectrum in spectra.layers["centred"].values()):
        section.figure(
            "eigenvectors",
            eigenvector_lines({label: vectors_of(s) for label, s in spectra.layers["centred"].items()}),
            "The three leading principal axes of centred rows over key positions, heads pooled.",
        )


def add_matrix_spectra(book: Book, spectra: Spectra, ranks: Ranks) -> None:
    """How many dimensions do whole score matrices have?"""
    section = book.section("Spectrum of whole score matrices")
    counts = sorted({spectrum.samples for spectrum in spectra.layers["centred"].values()})
    section.text(
        f"A sample is one whole n × n matrix of scores, a vector of n² entries. The spectrum is exact for the "
        f"{', '.join(map(str, counts))} matrices of a layer that were kept, through their inner products; it cannot "
        "have more components than that less one, so ranks close to the number of samples are lower bounds."
    )
    kinds = {f"{kind} rows": spectra.layers[kind] for kind in ("centred", "raw")}
    section.figure(
        "matrix_spectrum",
        explained_variance(kinds, "score matrices"),
        "Share of the variance of whole score matrices in the first components, heads of a layer pooled.",
    )
    rows = spectra.table("matrix", REAL, ranks)
    book.keep("matrix_spectrum", rows)
    section.table(
        "matrix_spectrum_pooled",
        [row for row in rows if row["head"] == ALL],
        "Heads pooled. samples: matrices seen. Per head in tables/matrix_spectrum.csv.",
        shown=[key for key in rows[0] if key not in ("data", "sample", "head", "dimensions")],
    )


def add_overlap(book: Book, spectra: Spectra, random: Spectra | None, ranks: Ranks, seed: int) -> None:
    """Do layers and heads share an eigenspace?"""
    section = book.section("Overlap of eigenspaces")
    spaces = eigenspaces(spectra)
    ranks = [rank for rank in ranks if rank <= spaces.dimensions]
    rank = headline_rank(ranks)
    baselines = {r: random_overlap(spaces.dimensions, r, seed=seed) for r in ranks}
    section.text(
        "Overlap is the mean squared cosine of the principal angles between the spans of the leading components of "
        "centred rows: 1 for the same subspace, 0 for orthogonal ones. Independent random subspaces of rank r in "
        f"{spaces.dimensions} dimensions have r/{spaces.dimensions} on average: {baselines[rank].mean:.3f} ± "
        f"{baselines[rank].std:.3f} at r = {rank}. Above that, something is shared."
    )
    random_spaces = None if random is None else eigenspaces(random)
    lines: dict[str, dict[int, Sequence[float]]] = {}
    rows: list[dict[str, Any]] = []
    for r in ranks:
        within, across = spaces.head_pairs(r)
        groups = {
            "two layers": pairs_above_diagonal(spaces.between_layers(r)),
            "two heads of a layer": within,
            "heads of two layers": across,
        }
        if random_spaces is not None:
            groups["two layers, random tokens"] = pairs_above_diagonal(random_spaces.between_layers(r))
        for name, values in groups.items():
            if len(values):
                lines.setdefault(name, {})[r] = values.tolist()
                rows.append(_overlap_row(r, name, values, baselines[r]))
    if rows:
        section.figure(
            "overlap_by_rank",
            overlap_by_rank(lines, [baselines[r] for r in ranks]),
            "Overlap against rank: mean over pairs, band over the middle half of the pairs, and the random baseline.",
        )
        section.table("overlap", rows, "Overlap over all pairs, and of random subspaces.")
    _add_overlap_maps(book, section, spaces, rank)


def _add_overlap_maps(book: Book, section: BookSection, spaces: Eigenspaces, rank: int) -> None:
    labels = spaces.comparable
    if len(labels) > 1:
        section.figure(
            "overlap_layers",
            heat_map(
                spaces.between_layers(rank),
                ("layer", labels),
                ("layer", labels),
                scale=f"overlap, r = {rank}",
                limits=(0.0, 1.0),
            ),
            f"Overlap of the {rank} leading components between layers, heads pooled.",
        )
    names = [f"{label}.{head}" for label in labels for head in range(len(spaces.heads[label]))]
    starts = np.cumsum([len(spaces.heads[label]) for label in labels])[:-1]
    matrix = spaces.between_heads(rank)
    section.figure(
        "overlap_heads",
        heat_map(
            matrix,
            ("layer.head", names),
            ("layer.head", names),
            scale=f"overlap, r = {rank}",
            limits=(0.0, 1.0),
            boundaries=[int(start) for start in starts],
        ),
        f"Overlap of the {rank} leading components between heads; lines between layers.",
    )
    book.keep(
        "overlap_heads",
        [
            {"rank": rank, "head_a": a, "head_b": b, "overlap": float(matrix[i, j])}
            for i, a in enumerate(names)
            for j, b in enumerate(names)
            if i < j
        ],
    )


def add_random_tokens(book: Book, spectra: Spectra, random: Spectra, ranks: Ranks, seed: int) -> None:
    """Does the structure come from the data, or from the architecture and its positions?"""
    section = book.section("Data beside random tokens")
    ranks = [rank for rank in ranks if rank <= eigenspaces(spectra).dimensions]
    rank = headline_rank(ranks)
    section.text(
        "The same model on windows of the same length whose ordinary tokens were drawn at random, special tokens left "
        "in place. Structure that stays comes from positions, special tokens and weights; what goes comes from the "
        f"text. Overlap compares a layer's eigenspace on the data with its eigenspace on random tokens, r = {rank}."
    )
    rows: list[dict[str, Any]] = []
    for label, real in spectra.layers["centred"].items():
        other = random.layers["centred"][label]
        if vectors_of(real).shape != vectors_of(other).shape:
            continue
        baseline = random_overlap(real.dimensions, rank, seed=seed)
        overlap = subspace_overlap(vectors_of(real), vectors_of(other), rank)
        rows.append(
            {
                "layer": label,
                "effective_rank_data": real.effective_rank,
                "effective_rank_random": other.effective_rank,
                f"r={rank}_data": real.explained_by(rank),
                f"r={rank}_random": other.explained_by(rank),
                "variance_data": real.variance / real.dimensions,
                "variance_random": other.variance / other.dimensions,
                "overlap": overlap,
                "random_subspaces": baseline.mean,
                "random_std": baseline.std,
            }
        )
    if not rows:
        return
    labels = [row["layer"] for row in rows]
    section.figure(
        "random_tokens",
        grouped_bars(
            labels,
            {
                f"variance in {rank} components, data": [row[f"r={rank}_data"] for row in rows],
                f"variance in {rank} components, random tokens": [row[f"r={rank}_random"] for row in rows],
                "overlap of the two eigenspaces": [row["overlap"] for row in rows],
            },
            x_title="layer",
            y_title="share",
            top=1.02,
            dashed={"overlap of random subspaces": rows[0]["random_subspaces"]},
        ),
        f"Explained variance of {rank} components on the data and on random tokens, and how far the two eigenspaces "
        "agree.",
    )
    section.table(
        "random_tokens",
        rows,
        "Centred rows, heads pooled. Variance: mean variance of a single score.",
        shown=[key for key in rows[0] if key != "random_std"],
    )


def add_two_models(
    book: Book, spectra: Spectra, other: Spectra, names: tuple[str, str], ranks: Ranks, seed: int
) -> None:
    """Do two models share an eigenspace?"""
    section = book.section("Two models")
    first, second = eigenspaces(spectra), eigenspaces(other)
    if len(first.layer_bases()[0]) != len(second.layer_bases()[0]):
        section.text("The two models have attention of different lengths, so their eigenspaces cannot be compared.")
        return
    ranks = [rank for rank in ranks if rank <= first.dimensions]
    rank = headline_rank(ranks)
    rows = []
    for r in ranks:
        matrix = overlap_matrix(first.layer_bases(), r, second.layer_bases())
        rows.append(
            _overlap_row(r, "layers of two models", matrix.ravel(), random_overlap(first.dimensions, r, seed=seed))
        )
    section.text(f"Eigenspaces of centred rows of {names[0]} (rows) and {names[1]} (columns) at the same length.")
    section.figure(
        "overlap_models",
        heat_map(
            overlap_matrix(first.layer_bases(), rank, second.layer_bases()),
            (f"layer of {short_name(names[0])}", first.comparable),
            (f"layer of {short_name(names[1])}", second.comparable),
            scale=f"overlap, r = {rank}",
            limits=(0.0, 1.0),
        ),
        f"Overlap of the {rank} leading components between the layers of two models.",
    )
    section.table("overlap_models", rows, "Overlap over all pairs of layers, and of random subspaces.")


def _overlap_row(rank: int, pairs: str, values: np.ndarray, baseline: Any) -> dict[str, Any]:
    return {
        "rank": rank,
        "pairs": pairs,
        "mean": float(values.mean()),
        "lowest": float(values.min()),
        "highest": float(values.max()),
        "random_mean": baseline.mean,
        "random_std": baseline.std,
    }


def headline_rank(ranks: Ranks) -> int:
    """The rank at which maps are drawn."""
    return min(ranks, key=lambda rank: abs(rank - HEADLINE_RANK))


def short_name(name: str) -> str:
    """A hub id, or the last two parts of a path."""
    return "/".join(name.rstrip("/").split("/")[-2:])
