"""The verbs `approx-attn calibrate` and `approx-attn reconstruct`."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from approx_attn.attention import available_attention, build_attention
from approx_attn.attention.registry import attention_options
from approx_attn.command import run_plain, settings
from approx_attn.conversion.calibration import STATISTICS
from approx_attn.conversion.calibration.fitting import calibrate
from approx_attn.conversion.calibration.reconstruction import (
    Reconstruction,
    reconstruct,
    standard_mechanisms,
    without_refusals,
)
from approx_attn.conversion.calibration.refinement import basis_variants, refine_basis, require_refinable
from approx_attn.diagnosis.inputs import load_source
from approx_attn.errors import ConfigError
from approx_attn.output import print_table, require_file


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
    source = load_source(
        str(options["model"]),
        options["data"],
        length=options["length"],
        sequences=options["sequences"],
        batch_size=options["batch_size"],
    )
    calibration = calibrate(
        source.model,
        source.first,
        path=options["output"] if mechanism is None else None,
        statistics=options["statistics"],
        max_rank=options["max_rank"],
        rows=options["rows"],
        exact=options["exact"],
        source=_names(options),
        progress=options["progress_bar"],
        seed=options["seed"],
    )
    if mechanism is not None:
        calibration = refine_basis(
            source.model, source.first, calibration, mechanism, steps=steps, progress=options["progress_bar"]
        )
        calibration.save(options["output"])
    table = Table(title=f"{options['output']}: {', '.join(calibration.statistics)}", title_justify="left")
    for header in ("layer", "heads", "key heads", "head_dim", "length", "rows"):
        table.add_column(header, justify="left" if header == "layer" else "right")
    for layer, rows in zip(calibration.layers, calibration.rows, strict=True):
        shape = (layer.num_heads, layer.num_key_value_heads, layer.head_dim, layer.length, rows)
        table.add_row(layer.name, *map(str, shape))
    print_table(table)


def _reconstruct(options: dict[str, Any]) -> None:
    mechanisms, steps = chosen_mechanisms(options), refinement_steps(options)
    output = require_file("output", options["output"])
    source = load_source(
        str(options["model"]),
        options["data"],
        length=options["length"],
        sequences=options["sequences"],
        test_sequences=options["test_sequences"],
        batch_size=options["batch_size"],
    )
    calibration = calibrate(
        source.model,
        source.first,
        statistics=["content", "absolute"],
        source=_names(options),
        progress=options["progress_bar"],
    )
    if options["attention"] is None:  # nobody asked for the others by name
        mechanisms, refused = without_refusals(mechanisms, calibration)
        if refused:
            print(f"Not measured, for lack of causal attention: {', '.join(refused)}.")
    progress = options["progress_bar"]
    mechanisms, bases = basis_variants(source.model, source.first, mechanisms, calibration, steps, progress)
    rows = reconstruct(source.model, source.second, mechanisms, calibration, bases=bases, progress=progress)
    print_table(as_table(rows, str(options["model"])))
    print(write_csv(rows, output))


def chosen_mechanisms(options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The mechanisms that the configuration asks for, by label.

    Raises:
        ConfigError: an unknown name, none at all, or a budget that is no share.
    """
    budgets = _as_list(options["keep"])
    for keep in budgets:
        if not isinstance(keep, float) or not 0.0 < keep <= 1.0:
            raise ConfigError(f"keep must list shares in (0, 1], got {keep!r}.")
    standard = standard_mechanisms(budgets, options["rank"])
    known = sorted({spec["name"] for spec in standard.values()} & set(available_attention()))
    names = known if options["attention"] is None else _as_list(options["attention"])
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
    """`{"name": ..., **options}` from a name or such a mapping, with those of the `defaults` that it takes."""
    given = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(given, dict) or "name" not in given:
        raise ConfigError(f"attention: an entry with options needs a name, got {entry!r}.")
    try:
        accepted = attention_options(given["name"])
        spec = {**given, **{k: v for k, v in defaults.items() if k in accepted and k not in given}}
        build_attention(**spec, num_heads=1, head_dim=8, max_length=16)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return spec


def refinement_steps(options: Mapping[str, Any]) -> int:
    """`refine`, checked."""
    steps = options["refine"]
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ConfigError(f"refine must be a whole number of at least 0, got {steps!r}.")
    return steps


def as_table(rows: Sequence[Reconstruction], model: str) -> Table:
    """A table for the console: one row per mechanism and budget, one column per layer."""
    table = Table(title=f"Relative error of the attention output: {model}", title_justify="left")
    table.caption = (
        "‖Ô − O‖ / ‖O‖, mean over heads and sequences; nothing fine-tuned. "
        "Score cost: multiply-adds performed up to the weights, relative to exact attention."
    )
    table.add_column("mechanism")
    for header in ("exact pairs", "score cost", "error", *map(str, range(len(rows[0].errors)))):
        table.add_column(header, justify="right")
    for row in rows:
        layers = (f"{error:.3f}" for error in row.errors.values())
        table.add_row(row.label, f"{row.exact_share:.1%}", f"{row.score_ratio:.2f}", f"{row.error:.4f}", *layers)
    return table


def write_csv(rows: Sequence[Reconstruction], path: Path) -> Path:
    """The same numbers as a file, layers by their names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["mechanism", "exact_share", "score_ratio", "error", *rows[0].errors])
        for row in rows:
            writer.writerow([row.label, row.exact_share, row.score_ratio, row.error, *row.errors.values()])
    return path


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def _names(options: Mapping[str, Any]) -> dict[str, str]:
    return {"model": str(options["model"]), "data": str(options["data"] or "its own")}
