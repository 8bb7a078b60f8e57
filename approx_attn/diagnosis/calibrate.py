"""The verbs `approx-attn calibrate` and `approx-attn reconstruct`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from approx_attn.attention import available_attention, build_attention
from approx_attn.attention.registry import attention_options
from approx_attn.command import as_list, mechanism_spec, require_counts, require_shares, run_plain, settings
from approx_attn.conversion.budgets import Allocation
from approx_attn.conversion.calibration import STATISTICS
from approx_attn.conversion.calibration.fitting import calibrate
from approx_attn.conversion.calibration.refinement import refine_basis, require_refinable
from approx_attn.diagnosis.inputs import load_source
from approx_attn.diagnosis.reconstruction import (
    Reconstruction,
    reconstruct,
    standard_mechanisms,
    statistics_for,
    without_refusals,
)
from approx_attn.diagnosis.variants import basis_variants
from approx_attn.errors import ConfigError
from approx_attn.output import print_table, require_file, to_csv, to_table
from approx_attn.run.record import write_text_atomically


def main(arguments: Sequence[str]) -> int:
    """`approx-attn calibrate`: fit bases on a live model and its data, and write them to a file."""
    return run_plain("calibrate", lambda: _calibrate(settings("calibrate", arguments)), arguments)


def reconstruct_main(arguments: Sequence[str]) -> int:
    """`approx-attn reconstruct`: error of the attention output per mechanism, budget and layer."""
    return run_plain("reconstruct", lambda: _reconstruct(settings("reconstruct", arguments)), arguments)


def _calibrate(options: dict[str, Any]) -> None:
    for name in options["statistics"] or ():
        if name not in STATISTICS:
            raise ConfigError(f"statistics must be among {', '.join(STATISTICS)}, got {name!r}.")
    steps = refinement_steps(options)
    mechanism = None if options["attention"] is None else _mechanism(options["attention"], {})
    if steps and mechanism is None:
        raise ConfigError(f"refine={steps} needs attention=<the mechanism that the basis is for>.")
    if mechanism is not None and not steps:
        raise ConfigError(f"attention={mechanism['name']} is what refine=<steps> is for, got refine=0.")
    if mechanism is not None:
        require_refinable(mechanism)
    require_file("output", options["output"])
    progress = options["progress_bar"]
    sizes = {key: options[key] for key in ("length", "sequences", "batch_size")}
    source = load_source(str(options["model"]), options["data"], **sizes)
    calibration = calibrate(
        source.model,
        source.first,
        path=options["output"] if mechanism is None else None,
        source=_names(options),
        progress=progress,
        **{key: options[key] for key in ("statistics", "max_rank", "rows", "exact", "seed")},
    )
    if mechanism is not None:
        calibration = refine_basis(
            source.model,
            source.first,
            calibration,
            mechanism,
            steps=steps,
            exact=options["exact"],
            progress=progress,
        )
        calibration.save(options["output"])
    rows = [
        {
            "layer": layer.name,
            "heads": str(layer.num_heads),
            "key heads": str(layer.num_key_value_heads),
            "head_dim": str(layer.head_dim),
            "length": str(layer.length),
            "rows": str(seen),
        }
        for layer, seen in zip(calibration.layers, calibration.rows, strict=True)
    ]
    print_table(to_table(rows, title=f"{options['output']}: {', '.join(calibration.statistics)}"))


def _reconstruct(options: dict[str, Any]) -> None:
    mechanisms, steps = chosen_mechanisms(options), refinement_steps(options)
    output = require_file("output", options["output"])
    sizes = {key: options[key] for key in ("length", "sequences", "test_sequences", "batch_size")}
    source = load_source(str(options["model"]), options["data"], **sizes)
    statistics, progress = statistics_for(mechanisms), options["progress_bar"]
    calibration = calibrate(
        source.model, source.first, statistics=statistics, source=_names(options), progress=progress
    )
    if options["attention"] is None:  # nobody asked for the others by name
        mechanisms, refused = without_refusals(mechanisms, calibration)
        if refused:
            print(f"Not measured, for lack of causal attention: {', '.join(refused)}.")
    mechanisms, bases = basis_variants(source.model, source.first, mechanisms, calibration, steps, progress)
    try:
        found = reconstruct(source.model, source.second, mechanisms, calibration, bases=bases, progress=progress)
    except ValueError as error:  # of a mechanism that does not fit the length of the model
        raise ConfigError(str(error)) from error
    table = to_table(
        [_cells(row) for row in found],
        title=f"Relative error of the attention output: {options['model']}",
        caption="‖Ô − O‖ / ‖O‖, mean over heads and sequences; nothing fine-tuned. "
        "Score cost: multiply-adds performed up to the weights, relative to exact attention.",
    )
    print_table(table)
    values = [
        {"mechanism": row.label, "exact_share": row.exact_share, "score_ratio": row.score_ratio, "error": row.error}
        | {layer: errors.output for layer, errors in row.layers.items()}
        for row in found
    ]
    write_text_atomically(output, to_csv(values))
    print(output)


def _cells(row: Reconstruction) -> dict[str, str]:
    """A mechanism and budget for people; layers by their number."""
    shown = {"mechanism": row.label, "exact pairs": f"{row.exact_share:.1%}", "score cost": f"{row.score_ratio:.2f}"}
    layers = {str(index): f"{errors.output:.3f}" for index, errors in enumerate(row.layers.values())}
    return {**shown, "error": f"{row.error:.4f}", **layers}


def chosen_mechanisms(options: Mapping[str, Any], selections: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """The mechanisms that the configuration asks for, by label.

    Args:
        options: `attention`, `keep` and `rank`.
        selections: as `standard_mechanisms`.

    Raises:
        ConfigError: an unknown name, none at all, or a budget that is no share.
    """
    budgets = as_list(options["keep"])
    require_shares("keep", budgets)
    standard = standard_mechanisms(budgets, options["rank"], selections)
    known = sorted({spec["name"] for spec in standard.values()} & set(available_attention()))
    names = known if options["attention"] is None else as_list(options["attention"])
    for key, chosen in (("keep", budgets), ("attention", names)):
        if not chosen:
            raise ConfigError(f"{key} must list at least one, got [].")
    with_options = [entry for entry in names if isinstance(entry, dict)]
    for name in names:
        if name not in known and name not in with_options:
            raise ConfigError(
                f"attention={name} cannot be measured here; accepted: {', '.join(known)}, or {{name: ..., <options>}}."
            )
    table = {label: spec for label, spec in standard.items() if spec["name"] in names}
    for entry in with_options:
        for keep in budgets:
            spec = _mechanism(entry, {"keep": keep, "rank": options["rank"]})
            shown = (f"{key}={value}" for key, value in spec.items() if key in ("keep", *entry) and key != "name")
            table[" ".join([spec["name"], *shown])] = spec
    return table


def _mechanism(entry: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`{"name": ..., **options}` of an entry, with those of the `defaults` that the mechanism takes."""
    given = mechanism_spec(entry)
    accepted = attention_options(given["name"])
    spec = given | {key: value for key, value in defaults.items() if key in accepted and key not in given}
    try:
        # Long enough that a share of the keys observes a rank, which at the model's length is checked again.
        build_attention(**spec, num_heads=1, head_dim=8, max_length=512)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return spec


def read_budgets(options: Mapping[str, Any]) -> dict[str, Allocation]:
    """The budgets in the files of `budgets`, by the name of the file.

    Raises:
        ConfigError: a file that `approx-attn allocate` did not write.
    """
    paths = [] if options["budgets"] is None else as_list(options["budgets"])
    try:
        return {f"budgets={Path(path).name}": Allocation.open(path) for path in paths}
    except ValueError as error:
        raise ConfigError(str(error)) from error


def refinement_steps(options: Mapping[str, Any]) -> int:
    """`refine`, checked."""
    require_counts({"refine": options["refine"]}, least=0)
    return int(options["refine"])


def _names(options: Mapping[str, Any]) -> dict[str, str]:
    return {"model": str(options["model"]), "data": str(options["data"] or "its own")}
