"""The findings of a report in a few sentences, made from its tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from approx_attn.comparison.report import Section
from approx_attn.diagnosis.analysis.book import Book
from approx_attn.diagnosis.analysis.eigenspaces import ALL
from approx_attn.diagnosis.analysis.sections import HEADLINE_RANK, REAL, headline_rank

Rows = Sequence[Mapping[str, Any]]


def add_summary(book: Book) -> None:
    """Put the findings in front of the report."""
    section = Section("Summary")
    sentences = (
        _spectrum(book.tables.get("row_spectrum", ())),
        _overlap(book.tables.get("overlap", ())),
        _random_tokens(book.tables.get("random_tokens", ())),
        _norms(book.tables.get("norms", ())),
        _reconstruction(book.tables.get("reconstruction", ())),
        _explanation(book.tables.get("explanation_means", ())),
    )
    for sentence in filter(None, sentences):
        section.text(sentence)
    if section.parts:
        book.report.sections.insert(0, section)


def _spectrum(rows: Rows) -> str | None:
    layers = [
        row for row in rows if (row["data"], row["kind"], row["head"]) == (REAL, "centred", ALL) and row["layer"] != ALL
    ]
    if not layers:
        return None
    rank = headline_rank([int(key[2:]) for key in layers[0] if key.startswith("r=")])
    held = _range(layers, f"r={rank}", _percent)
    return (
        f"Dimension: the first {rank} of {layers[0]['dimensions']} components hold {held} of the variance of single "
        "centred score rows, heads pooled."
    )


def _overlap(rows: Rows) -> str | None:
    of_layers = [row for row in rows if row["pairs"] == "two layers"]
    if not of_layers:
        return None
    row = min(of_layers, key=lambda row: abs(row["rank"] - HEADLINE_RANK))
    return (
        f"Overlap: the {row['rank']} leading components of two layers overlap by {row['mean']:.2f} on average "
        f"({row['lowest']:.2f} to {row['highest']:.2f}); random subspaces by {row['random_mean']:.3f} ± "
        f"{row['random_std']:.3f}."
    )


def _random_tokens(rows: Rows) -> str | None:
    if not rows:
        return None
    overlaps = _range(rows, "overlap", "{:.2f}".format)
    return (
        f"Random tokens: the eigenspaces of a layer on the data and on random tokens overlap by {overlaps}; random "
        f"subspaces by {rows[0]['random_subspaces']:.3f}."
    )


def _norms(rows: Rows) -> str | None:
    special = [row for row in rows if row["category"] == "special" and row["tokens"] > 0]
    if not special:
        return None
    most = max(special, key=lambda row: row["weight"])
    others = [row["norm"] for row in rows if row["layer"] == most["layer"] and row["category"] == "other"]
    return (
        f"Norms: special tokens are {_percent(most['tokens'])} of the keys. In layer {most['layer']} they get "
        f"{_percent(most['weight'])} of the attention weight and give {_percent(most['contribution'])} of the "
        f"contributions ‖αf‖: their vectors have a mean length of {most['norm']:.2f}, other words' {others[0]:.2f}."
    )


def _reconstruction(rows: Rows) -> str | None:
    if not rows:
        return None
    budget = min((row["exact_pairs"] for row in rows), key=lambda share: abs(share - 0.25))
    near = sorted((row for row in rows if abs(row["exact_pairs"] - budget) < 0.02), key=lambda row: row["output"])
    named = ", ".join(f"{row['output']:.3f} with {row['mechanism'].replace(' keep=', ' at ')}" for row in near[:1])
    simple = [row for row in near if row["mechanism"].split()[0] in ("topk", "sliding_window")]
    beside = ", ".join(f"{row['output']:.3f} with {row['mechanism'].split()[0]}" for row in simple)
    return f"Reconstruction: with {_percent(budget)} of the pairs exact the error of the output is lowest, {named}" + (
        f"; it is {beside}." if beside else "."
    )


def _explanation(rows: Rows) -> str | None:
    by = {row["experiment"]: row for row in rows if row["experiment"] != "adversary"}
    if not by:
        return None
    text = (
        f"Explanation: test accuracy is {_percent(by['base']['test_accuracy'])}, with uniform weights "
        f"{_percent(by['uniform']['test_accuracy'])}, with the base model's weights imposed "
        f"{_percent(by['imposed']['test_accuracy'])}. "
    )
    closest = min(
        (row for row in rows if row["experiment"] == "adversary"),
        key=lambda row: row["distance_of_predictions"],
        default=None,
    )
    if closest is not None:
        text += (
            f"An adversary (λ = {closest['λ']:g}) moves its weights by {closest['divergence_of_weights']:.2f} nats, "
            f"seeds by {by['seed']['divergence_of_weights']:.2f}, and reaches {_percent(closest['test_accuracy'])}. "
        )
    if "context_free_base" in by:
        text += (
            f"A context-free model reaches {_percent(by['context_free_uniform']['test_accuracy'])} with uniform "
            f"weights, {_percent(by['context_free_own']['test_accuracy'])} with its own and "
            f"{_percent(by['context_free_base']['test_accuracy'])} with the base model's. "
        )
    return text.rstrip()


def _range(rows: Rows, key: str, write: Callable[[float], str]) -> str:
    """The lowest and the highest figure with their layers."""
    low, high = min(rows, key=lambda row: row[key]), max(rows, key=lambda row: row[key])
    if low is high:
        return f"{write(high[key])} (layer {high['layer']})"
    return f"{write(low[key])} (layer {low['layer']}) to {write(high[key])} (layer {high['layer']})"


_percent = "{:.1%}".format
