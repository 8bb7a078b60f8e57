"""The verb `approx-attn allocate`: budgets from a target, as a file, a table and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from approx_attn.command import as_list, mechanism_spec, run_plain, settings
from approx_attn.conversion.allocation import allocate
from approx_attn.conversion.budgets import Allocation, LayerBudget
from approx_attn.conversion.convert import shown_option
from approx_attn.diagnosis.inputs import load_source
from approx_attn.errors import ConfigError
from approx_attn.output import print_table, require_file, to_table


def main(arguments: Sequence[str]) -> int:
    """`approx-attn allocate`: choose budgets for a model and write them to a file."""
    return run_plain("allocate", lambda: _allocate(settings("allocate", arguments)), arguments)


def _allocate(options: Mapping[str, Any]) -> None:
    mechanisms = [mechanism_spec(entry) for entry in as_list(options["attention"])]
    output = require_file("output", options["output"])
    picture = require_file("output", output.with_suffix(".png"))
    sizes = {key: options[key] for key in ("length", "sequences", "batch_size")}
    source = load_source(str(options["model"]), options["data"], **sizes)
    target = {key: options[key] for key in ("target_error", "mean_share")}
    try:
        budgets = allocate(source.model, source.first, mechanisms, **target, progress=options["progress_bar"])
    except ValueError as error:
        raise ConfigError(str(error)) from error
    print_table(
        to_table(
            [_cells(name, layer) for name, layer in budgets.layers.items()],
            words=("attention",),
            title=f"Budgets of {options['model']}: {budgets.exact_share:.1%} of the pairs exact",
            caption="Error: ‖Ô − O‖ / ‖O‖ of the output of the layer's attention; least and largest of its heads.\n"
            "Effect: relative error of the model's output per error of the layer, 1 where it was not measured.",
        )
    )
    budgets.save(output)
    plot_budgets(budgets, picture)
    print(f"{output}\n{picture}")


def _cells(name: str, layer: LayerBudget) -> dict[str, str]:
    words = [f"{key}={shown_option(value)}" for key, value in layer.attention.items() if key != "name"]
    heads = layer.head_errors or (0.0,)
    return {
        "layer": name,
        "attention": " ".join([layer.attention["name"], *words]),
        "exact pairs": f"{layer.exact_share:.1%}",
        "error": f"{layer.error:.3f}",
        "heads": f"{min(heads):.3f} to {max(heads):.3f}",
        "effect": f"{layer.effect:.2f}",
    }


def plot_budgets(budgets: Allocation, path: Path) -> None:
    """Two panels of layers by heads: the error of the output and the share of the pairs that is exact."""
    layers = [layer for layer in budgets.layers.values() if layer.head_errors]
    heads = max(len(layer.head_errors) for layer in layers)
    figure = Figure(figsize=(4 + 0.5 * heads, 1.5 + 0.3 * len(layers)), layout="constrained")
    panels = (("error of the output", "head_errors", "magma_r"), ("share of exact pairs", "head_shares", "viridis_r"))
    for axis, (title, key, colours) in zip(figure.subplots(1, 2, squeeze=False)[0], panels, strict=True):
        values = np.full((len(layers), heads), np.nan)
        for row, layer in enumerate(layers):
            values[row, : len(getattr(layer, key))] = getattr(layer, key)
        image = axis.imshow(values, aspect="auto", cmap=colours, vmin=0.0)
        axis.set(title=title, xlabel="head", ylabel="layer")
        figure.colorbar(image, ax=axis)
    figure.savefig(path, dpi=150)
