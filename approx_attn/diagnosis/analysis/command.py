"""The verb `approx-attn analyze`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from approx_attn.command import as_list, require_counts, require_shares, run_plain, settings
from approx_attn.comparison.report import Report
from approx_attn.data.text_classification import load_tokenizer
from approx_attn.diagnosis.analysis import norm_sections, sections
from approx_attn.diagnosis.analysis.alignment_section import refuse_alignment
from approx_attn.diagnosis.analysis.book import Book, show
from approx_attn.diagnosis.analysis.collect import Statistics, collect
from approx_attn.diagnosis.analysis.eigenspaces import Spectra, matrix_spectra, row_spectra
from approx_attn.diagnosis.analysis.parts import SECTIONS, SELECTIONS
from approx_attn.diagnosis.analysis.sources import load
from approx_attn.diagnosis.analysis.summary import add_summary
from approx_attn.diagnosis.analysis.tokens import (
    GROUPS,
    TokenCategories,
    random_tokens,
    with_decoder_inputs,
    without_decoder,
)
from approx_attn.diagnosis.calibrate import chosen_mechanisms
from approx_attn.diagnosis.inputs import Source
from approx_attn.errors import ConfigError
from approx_attn.output import print_table, require_folder, to_table
from approx_attn.run.record import environment

PARTS = ("spectrum", "matrices", "overlap", "norms", *SECTIONS)
MEASURED = {"reconstruction", "transfer", "noise", "mean_weights"}  # parts that look at `test_sequences`, too
COLLECTED = {"spectrum": "rows", "overlap": "rows", "matrices": "matrices", "norms": "norms"}  # what parts look at

LISTS = ("parts", "ranks", "keep", "divergence_weights")


def main(arguments: Sequence[str]) -> int:
    """`approx-attn analyze`: spectra, overlaps, vector norms and reconstruction errors of a model, as a report."""
    return run_plain("analyze", lambda: run(settings("analyze", arguments)), arguments)


def run(options: dict[str, Any]) -> Path:
    """Analyse a model as `configs/analyze.yaml` says, and write the folder `output`.

    Returns:
        The path of the report.

    Raises:
        ConfigError: an impossible option, or a model or file that is not there; nothing is written then.
    """
    options = options | {key: as_list(options[key]) for key in LISTS}
    check_options(options)
    require_folder("output", options["output"])
    model, parts = str(options["model"]), set(options["parts"])
    source = load(options, model, options["test_sequences"] if parts & MEASURED else 0)
    categories, ordinary = token_kinds(model, source)
    started = time.perf_counter(), time.process_time()
    statistics = _collect(options, source.model, source.first, categories, "analysing")
    rows = row_spectra(statistics) if parts & {"spectrum", "overlap"} else None
    spent = time.perf_counter() - started[0], time.process_time() - started[1]
    random = None
    if options["random_tokens"] and rows is not None and ordinary is not None:
        generator = torch.Generator().manual_seed(options["seed"])
        drawn = [
            with_decoder_inputs(source.model, random_tokens(without_decoder(batch), ordinary, generator))
            for batch in source.first
        ]
        random = row_spectra(_collect(options, source.model, drawn, categories, "random tokens", rows_only=True))

    book = Book(
        Report(f"Attention of {sections.short_name(model)}", subtitle(options, statistics, spent)), facts(options)
    )
    sections.add_layers(book, statistics)
    ranks = options["ranks"]
    if rows is not None and "spectrum" in parts:
        sections.add_row_spectra(book, rows, random, ranks)
    if "matrices" in parts:
        sections.add_matrix_spectra(book, matrix_spectra(statistics), ranks)
    if rows is not None and "overlap" in parts:
        sections.add_overlap(book, rows, random, ranks, options["seed"])
    if random is not None and rows is not None:
        sections.add_random_tokens(book, rows, random, ranks, options["seed"])
    if options["other_model"] is not None and rows is not None:
        other = _other_model(options)
        sections.add_two_models(book, rows, other, (model, str(options["other_model"])), ranks, options["seed"])
    if "norms" in parts:
        norm_sections.add_norms(book, statistics)
    for part, add_section in SECTIONS.items():
        if part in parts:
            add_section(book, options, source, statistics)
    add_summary(book)
    path = book.save(options["output"])
    _print_summary(statistics, rows, path)
    return path


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse impossible options.

    Raises:
        ConfigError: one sentence that names the key.
    """
    for part in options["parts"]:
        if part not in PARTS:
            raise ConfigError(f"parts must be among {', '.join(PARTS)}, got {part!r}.")
    keys = ("matrices", "rank", "calibration_sequences", "test_sequences", "explanation_seeds", "clusters")
    require_counts({key: options[key] for key in keys})
    require_counts({f"ranks[{i}]": rank for i, rank in enumerate(options["ranks"])})
    if options["rows"] is not None:
        require_counts({"rows": options["rows"]})
    for key in LISTS[:3]:
        if not options[key]:
            raise ConfigError(f"{key} must list at least one, got [].")
    require_shares("keep", options["keep"])
    for weight in options["divergence_weights"]:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or weight < 0:
            raise ConfigError(f"divergence_weights must list numbers of at least 0, got {weight!r}.")
    if "alignment" in options["parts"]:
        refuse_alignment(str(options["model"]))
    if "explanation" in options["parts"] and Path(str(options["model"])).suffix != ".ckpt":
        raise ConfigError(
            f"parts=[explanation] trains further models as a checkpoint was trained, so model must be a checkpoint "
            f"(.ckpt), got {options['model']!r}."
        )
    if "reconstruction" in options["parts"]:
        chosen_mechanisms(options, SELECTIONS)


def token_kinds(model: str, source: Source) -> tuple[TokenCategories, Tensor | None]:
    """Categories of tokens, and the ids that random text is drawn from (None if nothing is known of them)."""
    if Path(model).suffix == ".ckpt":
        known = None if source.tokenizer is None else load_tokenizer(source.tokenizer)
        return TokenCategories(known), _ids_that_occur(source)
    if "input_ids" not in source.first[0]:
        return TokenCategories(), None
    from transformers import AutoTokenizer

    categories = TokenCategories(AutoTokenizer.from_pretrained(model))
    assert categories.vocabulary is not None
    vocabulary = categories.vocabulary
    embeddings = source.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    ordinary = torch.nonzero(~torch.isin(vocabulary, torch.tensor(GROUPS["special"]))).flatten()
    return categories, ordinary[ordinary < embeddings]


def _ids_that_occur(source: Source) -> Tensor | None:
    """Ids in the data of a checkpoint, padding (0) left out."""
    tokens = [batch["tokens"] for batch in source.first if batch.get("tokens") is not None]
    if not tokens or any(part.is_floating_point() for part in tokens):
        return None
    found = torch.unique(torch.cat([part.flatten() for part in tokens]))
    return found[found != 0]


def _collect(
    options: Mapping[str, Any],
    model: nn.Module,
    batches: Sequence[Any],
    categories: TokenCategories,
    description: str,
    rows_only: bool = False,
) -> Statistics:
    return collect(
        model,
        batches,
        parts=["rows"] if rows_only else list(dict.fromkeys(COLLECTED[p] for p in options["parts"] if p in COLLECTED)),
        rows=options["rows"],
        matrices=options["matrices"],
        categories=categories,
        progress=options["progress_bar"],
        description=description,
        seed=options["seed"],
    )


def _other_model(options: Mapping[str, Any]) -> Spectra:
    other = load(options, str(options["other_model"]))
    return row_spectra(_collect(options, other.model, other.first, TokenCategories(), "other model", rows_only=True))


def subtitle(options: Mapping[str, Any], statistics: Statistics, spent: tuple[float, float]) -> str:
    """What was run, on what, and how long the pass took."""
    where = environment()
    lengths = sorted({layer.length for layer in statistics.layers})
    return (
        f"{options['model']} on {options['data'] or 'its own data'}: {statistics.sequences} sequences of up to "
        f"{lengths[-1]} tokens, one pass in {spent[0]:.0f} s ({spent[1]:.0f} s of processor time) on "
        f"{where['processor']}, {where['torch_threads']} thread(s), torch {where['packages'].get('torch')}."
    )


def facts(options: Mapping[str, Any]) -> dict[str, Any]:
    """What `numbers.json` says beside the tables."""
    return {"options": dict(options), "environment": environment()}


def _print_summary(statistics: Statistics, rows: Spectra | None, path: Path) -> None:
    lines = []
    for layer in statistics.layers:
        spectrum = rows.layers["centred"][layer.label] if rows is not None else None
        norms = layer.norms.grouped(GROUPS) if layer.norms is not None else None
        if norms is not None and norms.tokens[0] == 0:
            norms = None
        figures = {
            "heads": layer.heads,
            "effective rank": None if spectrum is None else spectrum.effective_rank,
            "r = 8": None if spectrum is None else spectrum.explained_by(8),
            "weight on special": None if norms is None else float(norms.weight_share()[:, 0].mean()),
            "their ‖αf‖": None if norms is None else float(norms.contribution_share()[:, 0].mean()),
        }
        lines.append({"layer": layer.label, **{header: show(figure) for header, figure in figures.items()}})
    print_table(to_table(lines, title="Attention layers"))
    print(path)
