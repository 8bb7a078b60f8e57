"""Sections of the report on vector norms and reconstruction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from approx_attn.diagnosis.analysis.book import Book, BookSection
from approx_attn.diagnosis.analysis.collect import Statistics
from approx_attn.diagnosis.analysis.figures import error_curves, grouped_bars, heat_map, padded
from approx_attn.diagnosis.analysis.tokens import GROUPS
from approx_attn.diagnosis.analysis.transfer import means_over_layers
from approx_attn.diagnosis.reconstruction import Reconstruction

TRANSFER = "Bases from elsewhere"


def add_norms(book: Book, statistics: Statistics) -> None:
    """What do the weights hide that the norms show?"""
    section = book.section("Weights and vector norms")
    fine = [(layer, layer.norms) for layer in statistics.layers if layer.norms is not None]
    layers = [(layer, norms.grouped(GROUPS)) for layer, norms in fine]
    without = [layer.label for layer in statistics.layers if layer.norms is None]
    section.text(
        "A head adds Σ_j α_ij f(x_j) to the output of query i, with f(x) = (x W_V + b_V) W_O. A large weight α on a "
        "short vector f(x) adds little, so the contribution of a token is ‖αf(x)‖, and of all heads together "
        "‖Σ_h αf(x)‖ (Kobayashi et al., EMNLP 2020). Shares are of the sum over all pairs; “tokens” is the share of "
        "the pairs, which is what uniform attention would give."
    )
    if without:
        section.text(f"No linear layer takes the attention output as it is in layers {', '.join(without)}: left out.")
    if not layers:
        return
    labels = [layer.label for layer, _ in layers]
    rows, by_head = _norm_rows(layers)
    present = [c for c in layers[0][1].categories if any(row["category"] == c and row["tokens"] > 0 for row in rows)]
    if len(present) > 1:
        _add_category_figures(book, section, labels, rows, present)
    else:
        section.text(f"All tokens count as “{present[0]}”: nothing is known of their kinds.")
    section.table(
        "norms",
        rows,
        "Means over heads. tokens, weight, contribution: shares of all pairs, of Σα and of Σ‖αf‖; contribution of "
        "heads: of Σ‖Σ_h αf‖; norm: mean ‖f(x)‖ of a token.",
    )
    by_token = [row for row in _norm_rows(fine)[0] if row["tokens"] > 0]
    if len({row["category"] for row in by_token}) > 1:
        section.table(
            "norms_by_token", by_token, "The same with [CLS], [SEP], commas and periods apart, of what occurs."
        )
    correlations = [norms.correlation().tolist() for _, norms in layers]
    section.figure(
        "norm_correlation",
        heat_map(
            padded(correlations),
            ("layer", labels),
            ("head", [str(head) for head in range(max(map(len, correlations)))]),
            scale="correlation of α and ‖f(x)‖",
        ),
        "Pearson correlation over all pairs of the weight α_ij and the length ‖f(x_j)‖ of what it weighs. Negative: "
        "the head attends most to what adds least.",
    )
    section.text(f"By head and category: tables/norms_by_head.csv, {len(by_head)} rows.")
    book.keep("norms_by_head", by_head)


def _add_category_figures(
    book: Book, section: BookSection, labels: Sequence[str], rows: Sequence[Mapping[str, Any]], present: Sequence[str]
) -> None:
    """What the first category gets and gives, and the lengths of all."""
    first = present[0]

    def of(category: str, key: str) -> list[float]:
        return [row[key] for row in rows if row["category"] == category]

    section.figure(
        "norm_shares",
        grouped_bars(
            labels,
            {
                f"tokens that are {first}": of(first, "tokens"),
                f"weight α on {first} tokens": of(first, "weight"),
                f"contribution ‖αf‖ of {first} tokens": of(first, "contribution"),
                "contribution ‖Σ_h αf‖ of them": of(first, "contribution_of_heads"),
            },
            x_title="layer",
            y_title="share",
        ),
        f"What {first} tokens get and give: share of the attention weight they receive, and of the vectors added.",
    )
    section.figure(
        "norm_lengths",
        grouped_bars(labels, {c: of(c, "norm") for c in present}, x_title="layer", y_title="mean ‖f(x)‖ of a token"),
        "Mean length of the transformed vector by category of token, over heads.",
    )


def _norm_rows(layers: Sequence[Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rows, by_head = [], []
    for layer, norms in layers:
        weight, contribution, norm = norms.weight_share(), norms.contribution_share(), norms.mean_norm()
        together, tokens = norms.layer_contribution_share(), norms.token_share()
        for c, category in enumerate(norms.categories):
            common = {"layer": layer.label, "category": category, "tokens": float(tokens[c])}
            rows.append(
                {
                    **common,
                    "weight": float(weight[:, c].mean()),
                    "contribution": float(contribution[:, c].mean()),
                    "contribution_of_heads": float(together[c]),
                    "norm": float(norm[:, c].mean()),
                }
            )
        for head, correlation in enumerate(norms.correlation().tolist()):
            row = {"layer": layer.label, "head": head, "correlation": correlation}
            for c, category in enumerate(norms.categories):
                row |= {
                    f"weight_{category}": float(weight[head, c]),
                    f"contribution_{category}": float(contribution[head, c]),
                    f"norm_{category}": float(norm[head, c]),
                }
            by_head.append(row)
    return rows, by_head


def add_reconstruction(book: Book, found: Sequence[Reconstruction], labels: Mapping[str, str], data: str) -> None:
    """How much would a partial computation lose?"""
    section = book.section("Reconstruction from part of the pairs")
    section.text(
        f"Mechanisms see the queries, keys and values of the unchanged model; nothing is trained. {data} Output: "
        "‖Ô − O‖/‖O‖. Weights: total variation, half the sum of |Â − A| over a row. Scores: ‖Ŝ − S‖/‖S‖ of centred "
        "rows, only of mechanisms that give every pair a score. A dash: the mechanism drops pairs, or returns no "
        "weights that are positive."
    )
    rows, by_layer = [], []
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for each in found:
        name = " ".join(word for word in each.label.split() if not word.startswith("keep="))
        cost = {"exact_share": each.exact_share, "score_ratio": each.score_ratio}
        row: dict[str, Any] = {
            "mechanism": each.label,
            "exact_pairs": each.exact_share,
            "score_cost": each.score_ratio,
        }
        for key, title in (
            ("output", "error of the output ‖Ô − O‖/‖O‖"),
            ("total_variation", "total variation of the weights"),
            ("scores", "error of centred scores ‖Ŝ − S‖/‖S‖"),
        ):
            values = [getattr(errors, key) for errors in each.layers.values()]
            row[key] = None if None in values else float(np.mean(values))
            if row[key] is not None:
                curves.setdefault(title, {}).setdefault(name, []).append((each.exact_share, row[key]))
        rows.append(row)
        for layer, errors in each.layers.items():
            place = {"label": each.label, "mechanism": each.options["name"], "layer": labels.get(layer, layer)}
            by_layer.append({**place, **cost, **vars(errors)})
    section.figure(
        "reconstruction",
        error_curves(curves),
        "Errors against the share of pairs whose exact score is used, means over layers, heads and sequences.",
    )
    section.table(
        "reconstruction",
        rows,
        "Means over layers. score cost: multiply-adds performed up to the weights, relative to exact attention.",
    )
    book.keep("reconstruction_layers", by_layer)


def add_transfer(book: Book, found: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> None:
    """What does a basis of another layer or another model cost?"""
    section = book.section(TRANSFER)
    section.text(
        "One basis per layer, fitted to this layer, to another layer of the model (mean over all others), to the same "
        "layer of the other model, or not at all: the slow cosines that mechanisms start from, and random directions. "
        "These two come with the layer's own mean and the variances of its scores along them, so only the directions "
        "are foreign; as random ones hold no more than their share, they leave little but the mean."
    )
    rows = means_over_layers(found)
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        lines = curves.setdefault(f"{row['mechanism']}: error of the output", {})
        for source in list(row)[2:]:
            lines.setdefault(source, []).append((row["exact_pairs"], row[source]))
    caption = "‖Ô − O‖/‖O‖ against the share of exact pairs, mean over layers, by where the basis is from."
    section.figure("transfer", error_curves(curves), caption)
    section.table("transfer", rows, "The same in figures; by layer in tables/transfer_layers.csv.")
    book.keep("transfer_layers", [{**row, "layer": labels.get(row["layer"], row["layer"])} for row in found])
