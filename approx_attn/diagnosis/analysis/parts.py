"""What `approx-attn analyze` looks at beside spectra and norms: a section of the report for each part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from approx_attn.attention import attention_class
from approx_attn.attention.eigen.basis_file import Calibration
from approx_attn.conversion.calibration.fitting import calibrate
from approx_attn.diagnosis.analysis import features, noise, norm_sections, transfer
from approx_attn.diagnosis.analysis.alignment import alignment_errors
from approx_attn.diagnosis.analysis.alignment_section import add_alignment, sentence_pairs
from approx_attn.diagnosis.analysis.book import Book
from approx_attn.diagnosis.analysis.collect import Statistics
from approx_attn.diagnosis.analysis.explanation_runs import run_experiments
from approx_attn.diagnosis.analysis.explanation_section import add_explanation
from approx_attn.diagnosis.analysis.gates import add_gates, learned_masks
from approx_attn.diagnosis.analysis.mean_weights import add_mean_weights, mean_weights
from approx_attn.diagnosis.analysis.sources import load
from approx_attn.diagnosis.calibrate import chosen_mechanisms
from approx_attn.diagnosis.inputs import Source
from approx_attn.diagnosis.reconstruction import reconstruct, statistics_for

SELECTIONS = ("strided", "random", "greedy")  # of pairs, compared by eigen_row


def _reconstruction(book: Book, options: Mapping[str, Any], source: Source, statistics: Statistics) -> None:
    mechanisms = chosen_mechanisms(options, SELECTIONS)
    number = options["calibration_sequences"]
    batches = source.first[: -(-number // options["batch_size"])]
    needed = set().union(*(layer.needs for layer in statistics.layers))
    unfit = []
    if options["attention"] is None:  # mechanisms that were asked for by name refuse in their own words
        unfit = sorted({str(spec["name"]) for spec in mechanisms.values() if lacks(str(spec["name"]), needed)})
        mechanisms = {label: spec for label, spec in mechanisms.items() if spec["name"] not in unfit}
    if "causal" in needed:
        mechanisms = {label: causal_form(spec) for label, spec in mechanisms.items()}
    kinds = statistics_for(mechanisms)
    calibration = calibrate(source.model, batches, statistics=kinds, progress=options["progress_bar"])
    found = reconstruct(
        source.model, source.second, mechanisms, calibration, weights=True, progress=options["progress_bar"]
    )
    labels = {layer.name: layer.label for layer in statistics.layers}
    data = (
        f"Bases are fitted to {calibration.sequences} sequences and measured on {options['test_sequences']} others, "
        "from another part of the data."
    )
    if unfit:
        data += f" Left out, as they cannot do {', '.join(sorted(needed))} attention: {', '.join(unfit)}."
    norm_sections.add_reconstruction(book, found, labels, data)


def _transfer(book: Book, options: Mapping[str, Any], source: Source, statistics: Statistics) -> None:
    def fitted(model: nn.Module, batches: Sequence[Any]) -> Calibration:
        chosen = batches[: -(-options["calibration_sequences"] // options["batch_size"])]
        kinds = list(transfer.KINDS.values())
        return calibrate(
            model, chosen, statistics=kinds, max_rank=options["rank"], progress=options["progress_bar"], rows=None
        )

    own, other = fitted(source.model, source.first), None
    if options["other_model"] is not None:
        there = load(options, str(options["other_model"]))
        other = fitted(there.model, there.first)
    refused = transfer.refusal(own, other)
    if refused is not None:
        book.section(norm_sections.TRANSFER).text(refused)
        return
    chosen = {"budgets": options["keep"], "rank": options["rank"], "seed": options["seed"]}
    found = transfer.transfer_errors(
        source.model, source.second, own, other, **chosen, progress=options["progress_bar"]
    )
    labels = {layer.name: layer.label for layer in statistics.layers}
    norm_sections.add_transfer(book, found, labels)


def _mean_weights(book: Book, options: Mapping[str, Any], source: Source, statistics: Statistics) -> None:
    lengths = {layer.name: layer.length for layer in statistics.layers}
    found = mean_weights(source.model, source.first, source.second, lengths, progress=options["progress_bar"])
    add_mean_weights(book, found, {layer.name: layer.label for layer in statistics.layers})


def _noise(book: Book, options: Mapping[str, Any], source: Source, statistics: Statistics) -> None:
    progress, rank = options["progress_bar"], options["rank"]
    sampled = {"rows": options["rows"], "seed": options["seed"]}
    calibration = calibrate(source.model, source.first, statistics=["absolute"], progress=progress, **sampled)
    found = noise.noise_of_positions(source.model, calibration, source.second, rank=rank, progress=progress)
    noise.add_noise(book, found, {layer.name: layer.label for layer in statistics.layers}, rank)


def _features(book: Book, options: Mapping[str, Any], source: Source, statistics: Statistics) -> None:
    clusters, chosen = options["clusters"], {"seed": options["seed"]}
    sample = features.sample_features(
        source.model, source.first, source.classes, progress=options["progress_bar"], **chosen
    )
    found = features.cluster_features(sample, clusters, **chosen)
    features.add_features(book, sample, found, {layer.name: layer.label for layer in statistics.layers}, clusters)


def _gates(book: Book, options: Mapping[str, Any], source: Source, statistics: Statistics) -> None:
    add_gates(book, learned_masks(source.model, statistics.layers))


def _alignment(book: Book, options: Mapping[str, Any], source: Source, statistics: Statistics) -> None:
    pairs = sentence_pairs(str(options["model"]), options["test_sequences"])
    add_alignment(book, alignment_errors(source.model, pairs))


def _explanation(book: Book, options: Mapping[str, Any], source: Source, statistics: Statistics) -> None:
    outcomes = run_experiments(
        str(options["model"]),
        Path(str(options["output"])) / "runs",
        seeds=options["explanation_seeds"],
        divergence_weights=options["divergence_weights"],
        progress=options["progress_bar"],
    )
    add_explanation(book, outcomes)


SECTIONS: dict[str, Callable[[Book, Mapping[str, Any], Source, Statistics], None]] = {
    "reconstruction": _reconstruction,
    "transfer": _transfer,
    "noise": _noise,
    "mean_weights": _mean_weights,
    "gates": _gates,
    "features": _features,
    "alignment": _alignment,
    "explanation": _explanation,
}
"""What adds the section of a part, in the order of the report."""


def causal_form(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The same mechanism with options that do not look ahead."""
    return {**spec, "basis": "running"} if spec["name"] == "low_rank_topk" else dict(spec)


def lacks(mechanism: str, needed: set[str]) -> bool:
    """Does a mechanism lack one of these capabilities?"""
    return not all(getattr(attention_class(mechanism).capabilities, capability) for capability in needed)
