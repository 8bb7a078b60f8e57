"""Section of the report on attention as explanation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from approx_attn.comparison.statistics import mean_interval, summarise
from approx_attn.diagnosis.analysis.book import Book
from approx_attn.diagnosis.analysis.explanation_runs import Outcome
from approx_attn.diagnosis.analysis.figures import scatter


def add_explanation(book: Book, outcomes: Sequence[Outcome]) -> None:
    """Is attention explanation?"""
    section = book.section("Is attention explanation?")
    section.text(
        "Experiments after Wiegreffe and Pinter (EMNLP 2019) around one trained classifier, the base. Further seeds "
        "show how far weights and predictions move by chance. A model with uniform weights shows whether the task "
        "needs attention; one whose weights are the base model's, frozen, while the rest is learned anew, whether "
        "these weights help a model that had no part in making them. Adversaries learn to predict as the base does "
        "with weights as different as possible (loss: distance of predictions − λ · divergence of weights). Weights "
        "that an adversary can move further than seeds do, at an equal distance of predictions, did not decide them."
    )
    if any(outcome.experiment.startswith("context_free") for outcome in outcomes):
        section.text(
            "Context-free models embed every token by itself and see others only through the weights: uniform ones, "
            "their own, the base's or those of the adversary of the same seed and λ (of several layers the last one's, "
            "mean over queries). Weights that say which tokens matter help them; weights that suit only the model that "
            "made them do not."
        )
    points: dict[str, list[tuple[float, float]]] = {}
    for outcome in outcomes:
        if outcome.weight_divergence is not None and outcome.experiment != "base":
            name = outcome.experiment
            if outcome.divergence_weight is not None:
                name += f", λ = {outcome.divergence_weight:g}"
            points.setdefault(name, []).append((outcome.weight_divergence, outcome.prediction_distance))
    if points:
        section.figure(
            "explanation",
            scatter(
                points,
                x_title="divergence of weights from the base model (JSD, nats)",
                y_title="distance of predictions (TVD)",
            ),
            "Every model beside the base model on the test split. Far right and low: other weights, same predictions.",
        )
    section.table(
        "explanation_means",
        _means(outcomes),
        "Means over seeds, ±: half of Student's 95% interval, a dash with one seed. Columns as in the next table.",
    )
    section.table(
        "explanation",
        [_row(outcome) for outcome in outcomes],
        "Distance: mean total variation between class probabilities and the base model's. Divergence: mean "
        "Jensen-Shannon divergence between rows of weights, at most log 2 = 0.693 nats; a dash where weights are not "
        "the model's own. Heads are compared by their index, so the order of heads is part of what seeds differ in.",
    )


def _row(outcome: Outcome) -> dict[str, Any]:
    return {
        "experiment": outcome.experiment,
        "seed": outcome.seed,
        "λ": outcome.divergence_weight,
        "test_accuracy": outcome.accuracy,
        "distance_of_predictions": outcome.prediction_distance,
        "divergence_of_weights": outcome.weight_divergence,
    }


def _means(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, float | None], list[dict[str, Any]]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.experiment, outcome.divergence_weight), []).append(_row(outcome))
    rows = []
    for (experiment, weight), group in groups.items():
        row: dict[str, Any] = {"experiment": experiment, "λ": weight, "seeds": len(group)}
        for key in ("test_accuracy", "distance_of_predictions", "divergence_of_weights"):
            values = [each[key] for each in group]
            summary = None if None in values else summarise(values)
            row[key] = None if summary is None else summary.mean
            row[f"{key}_±"] = None if summary is None else mean_interval(summary)
        rows.append(row)
    return rows
