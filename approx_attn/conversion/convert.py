"""Put a mechanism into the attention layers of a model that exists, take it out again, and say what is where."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from approx_attn.attention import AttentionMechanism, AttentionShape, Cost, build_attention
from approx_attn.attention.calibrated import CalibratedMechanism
from approx_attn.attention.multihead import MultiheadAttention
from approx_attn.conversion.budgets import Allocation
from approx_attn.conversion.calibration import calibrate
from approx_attn.conversion.calibration.fitting import refuse_texts
from approx_attn.conversion.calibration.refinement import refine_basis, require_refinable
from approx_attn.conversion.capture import capture_attention_inputs
from approx_attn.conversion.feed_forward import (
    converted_blocks,
    require_blocks,
    require_feed_forward,
    use_all_units,
    use_top_units,
)
from approx_attn.conversion.installing import find_layers, install, uninstall
from approx_attn.conversion.layers import AttentionLayer, AttentionSlot, select_layers
from approx_attn.conversion.saving import mark_converted
from approx_attn.errors import require_count

UNSAID: Any = object()  # what stands where nothing was given, in which None means something
LONGEST_DEFAULT = 2048
"""Mechanisms with parts laid out over positions get at most this max_length unless one is given."""


def convert(
    model: nn.Module,
    attention: str | Mapping[str, Any] | partial | None = None,
    *,
    layers: str | Iterable[str] | None = None,
    budgets: Allocation | str | Path | None = None,
    calibration: Iterable[Any] | None = UNSAID,
    refine: int = 0,
    example: Any = None,
    max_length: int | None = None,
    feed_forward: str | Mapping[str, Any] | None = None,
    **options: Any,
) -> nn.Module:
    """Let attention layers of a trained model use a mechanism; the model is changed in place.

    Converted are the attention modules of Hugging Face models that go through the attention interface of
    transformers, those of MPNet, `torch.nn.MultiheadAttention`, and modules that call
    `scaled_dot_product_attention`, as those of timm do. Everything is checked and built before the first layer is
    touched. Parameters of a mechanism become parameters of the model, so they train, move, and stand in its
    state_dict.

    Args:
        model: a trained model.
        attention: name of a mechanism, `{"name": ..., **options}`, or the partial of a mechanism's class; `eigen_topk`
            if None.
        layers: which layers: a kind (`self`, `cross`, `encoder`, `decoder`, `encoder-self`, `decoder-self`,
            `decoder-cross`), a glob pattern of qualified names, or several of them; all if None.
        budgets: what `allocate` returned for such a model, or the file it was saved to: the mechanism and options of
            every layer, in place of `attention` and `options`.
        calibration: batches of the model's inputs (mappings, tuples or tensors), to which bases are fitted in
            one pass, during which the model computes exact attention. Mechanisms that are of no use before they
            are calibrated or trained want it; None says that the model will be trained from their random start.
        refine: steps of gradient on the error of each layer's output, over the batches of `calibration`, that improve
            content bases after their closed form; the weights of the model stay fixed.
        example: one batch of inputs, to measure the shapes of layers that do not declare them; the first one
            of `calibration` if that is given.
        max_length: longest input, for mechanisms with parts laid out over positions; by default what the
            model declares, at most 2048.
        feed_forward: `{"name": "topk", "keep": ...}` lets every token use the `keep` largest pre-activations (a share
            of the hidden units or a number) of each plain two-layer feed-forward block; None leaves blocks as they are.
        options: of the mechanism, as `rank=8, keep=0.25`.

    Returns:
        `model`.

    Raises:
        ValueError: a model without an attention layer that can be converted (named), an unknown mechanism or
            option, a mechanism that a layer cannot use, such as one that is not causal in a decoder, or one whose
            queries see each other in the cross-attention of a decoder, one that needs `calibration` without a word
            about it, budgets of another model, nothing to refine, or `feed_forward` for a model without plain blocks.

    Example:
        >>> model = AutoModel.from_pretrained("sentence-transformers/all-MiniLM-L6-v2")
        >>> convert(model, "eigen_topk", rank=8, keep=0.25, calibration=batches)
    """
    found = find_layers(model)
    if not found:
        raise ValueError(_refusal(model))
    selected = select_layers(found, layers)
    specs = _specs(model, found, selected, attention, budgets, options)
    kept_units = None if feed_forward is None else require_feed_forward(feed_forward)
    blocks = [] if feed_forward is None else require_blocks(model)
    given = None if calibration is UNSAID else calibration
    seen: list[Any] = []
    if require_count("refine", refine, 0):
        if given is None:
            raise ValueError(f"refine={refine} needs calibration=, batches of the model's inputs.")
        require_refinable(specs)
        given = seen = list(given)
    if given is not None:
        given = iter(given)
        if example is None:
            example = next(given, None)
            given = itertools.chain([] if example is None else [example], given)
    shapes = {} if example is None else measure_shapes(model, example)
    slots = {
        layer.name: AttentionSlot(
            layer.name,
            specs[layer.name],
            shapes.get(layer.name, layer.shape),
            is_cross=layer.is_cross,
            max_length=_max_length(layer, max_length),
            causal=layer.causal,
            layer_index=found.index(layer),
        )
        for layer in selected
    }
    if any(layer.causal for layer in found):
        for slot in slots.values():
            if slot.is_cross and slot.mechanism is not None:
                slot.mechanism.require_independent_queries()
    mechanisms = [slot.mechanism for slot in slots.values() if slot.mechanism is not None]
    for mechanism in mechanisms[1:]:
        mechanism.tie_to(mechanisms[0])
    if calibration is UNSAID:
        for slot in slots.values():
            _require_calibration(specs[slot.layer], slot.mechanism)
    if given is not None and not any(isinstance(mechanism, CalibratedMechanism) for mechanism in mechanisms):
        names = ", ".join(sorted({spec["name"] for spec in specs.values()}))
        raise ValueError(f"attention={names} has no basis to fit: leave calibration= out.")
    install(model, found, slots)
    mark_converted(model)
    if given is not None:
        try:
            fitted = calibrate(model, given, max_rank=None, progress=False)
            if refine:
                refine_basis(model, seen, fitted, specs, steps=refine, progress=False).load_into_model(model)
        except BaseException:
            uninstall(model, [layer.name for layer in selected])
            mark_converted(model)
            raise
    if kept_units is not None:  # after calibration, which is to see what the exact model does
        use_top_units(blocks, kept_units)
        mark_converted(model)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Give every converted layer of `model` its own attention, and blocks their own activation, back; in place.

    The parameters of mechanisms are dropped; those of the model stay as they are, trained or not.
    """
    uninstall(model, [layer.name for layer in find_layers(model)])
    use_all_units(model)
    mark_converted(model)
    return model


# -- what is asked for ---------------------------------------------------------------------------------


def measure_shapes(model: nn.Module, example: Any) -> dict[str, AttentionShape]:
    """Heads and features that the attention layers of `model` run with on one batch of inputs."""
    shapes: dict[str, AttentionShape] = {}
    training = model.training

    def note(name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> None:
        shapes[name] = AttentionShape.of(query, key, value)

    try:
        with torch.no_grad(), capture_attention_inputs(model.eval(), note):
            run_model(model, example)
    finally:
        model.train(training)
    return shapes


def run_model(model: nn.Module, batch: Any) -> Any:
    """Call `model` on a batch of inputs: a mapping of keyword arguments, a tuple of arguments, or one argument."""
    refuse_texts(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def attention_spec(attention: str | Mapping[str, Any] | partial, options: Mapping[str, Any]) -> dict[str, Any]:
    """`{"name": ..., **options}` of what `convert` was given; plain data, so that it can be saved."""
    if isinstance(attention, partial):
        if not isinstance(attention.func, type) or not issubclass(attention.func, AttentionMechanism):
            raise ValueError(f"attention must be a mechanism, got a partial of {attention.func!r}.")
        attention = {"name": attention.func.name, **attention.keywords}
    if isinstance(attention, str):
        attention = {"name": attention}
    if not isinstance(attention, Mapping) or "name" not in attention:
        raise ValueError(f"attention must be a name or a mapping with the key 'name', got {attention!r}.")
    spec = {str(key): value for key, value in {**attention, **options}.items()}
    if spec["name"] == "exact" and len(spec) > 1:
        build_attention(**spec, num_heads=1, head_dim=1)  # which says that exact has no options
    return spec


def _specs(
    model: nn.Module,
    found: list[AttentionLayer],
    selected: list[AttentionLayer],
    attention: str | Mapping[str, Any] | partial | None,
    budgets: Allocation | str | Path | None,
    options: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """The mechanism and options of every selected layer."""
    if budgets is None:
        spec = attention_spec("eigen_topk" if attention is None else attention, options)
        return {layer.name: spec for layer in selected}
    if attention is not None or options:
        raise ValueError("budgets= says which mechanism with which options every layer gets: leave these out.")
    allocation = budgets if isinstance(budgets, Allocation) else Allocation.open(budgets)
    layers = allocation.of_model(type(model).__name__, found)
    return {layer.name: attention_spec(layers[layer.name].attention, {}) for layer in selected}


def _require_calibration(spec: Mapping[str, Any], mechanism: AttentionMechanism | None) -> None:
    """Refuse a mechanism whose parameters are still random, which would ruin a trained model in silence."""
    starts_from_data = spec.get("basis", "running") not in (None, "running")  # a file, or each input's own
    keeps_all = isinstance(spec.get("keep"), float) and spec["keep"] == 1.0
    keeps_all = keeps_all and mechanism is not None and mechanism.full_budget(1, mechanism.head_dim) is not None
    if starts_from_data or keeps_all or mechanism is None or not mechanism.capabilities.needs_calibration:
        return
    if isinstance(mechanism, CalibratedMechanism):
        raise ValueError(
            f"attention={spec['name']} is of no use in a trained model before its basis is fitted: give calibration=, "
            "batches of the model's inputs, or calibration=None if the model is trained next."
        )
    raise ValueError(
        f"attention={spec['name']} starts from parameters that only training makes useful and no calibration fits: "
        "give calibration=None if the model is trained next."
    )


def _max_length(layer: AttentionLayer, given: int | None) -> int | None:
    if given is not None or layer.max_length is None:
        return given
    return min(layer.max_length, LONGEST_DEFAULT)


def _refusal(model: nn.Module) -> str:
    kind = type(model).__name__
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is not None:
        return (
            f"{kind} (model_type={model_type}) computes its attention outside the attention interface of "
            "transformers, so it cannot be converted: give it attention modules of your own that call "
            "torch.nn.functional.scaled_dot_product_attention, with biases in attn_mask, or take a model such as bert, "
            "mpnet, gpt2, llama, t5 or vit."
        )
    return (
        f"{kind} holds no attention layer that can be converted: none of the attention interface of transformers, "
        "no torch.nn.MultiheadAttention, no module that calls scaled_dot_product_attention."
    )


# -- describing ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerDescription:
    """What stands in one attention layer.

    Attributes:
        layer: qualified name of the attention module.
        kind: `encoder-self`, `decoder-self` or `decoder-cross`.
        attention: name of the mechanism; `exact` where the layer is as it was.
        options: of the mechanism, those that were given.
        parameters: numbers that the mechanism learns.
        cost: of one sequence; None where the mechanism is built at the first run.
        exact_cost: of exact attention in its place.
    """

    layer: str
    kind: str
    attention: str
    options: dict[str, Any]
    parameters: int
    cost: Cost | None
    exact_cost: Cost | None


def describe(model: nn.Module, length: int = 128) -> list[LayerDescription]:
    """Print which mechanism stands in which attention layer of `model`, with its parameters and cost.

    Below stand the feed-forward blocks that use part of their hidden units, if there are any.

    Args:
        model: converted or not.
        length: tokens in the sequence that costs are stated for, queries and keys alike.

    Returns:
        One description per attention layer that can be converted.
    """
    from rich.table import Table

    from approx_attn.output import print_table

    rows = [_describe(layer, length) for layer in find_layers(model)]
    table = Table(title=f"{type(model).__name__}: attention at {length} tokens")
    for column in ("layer", "kind", "attention", "parameters", "exact pairs", "multiply-adds"):
        table.add_column(column, justify="left" if column in ("layer", "kind", "attention") else "right")
    for row in rows:
        options = ", ".join(f"{key}={shown_option(value)}" for key, value in row.options.items())
        share, relative = "?", "?"
        if row.cost is not None and row.exact_cost is not None:
            share = f"{row.cost.exact_share:.1%}"
            relative = f"{row.cost.multiply_adds / row.exact_cost.multiply_adds:.2f} × exact"
        name = f"{row.attention} ({options})" if options else row.attention
        table.add_row(row.layer, row.kind, name, f"{row.parameters:,}", share, relative)
    print_table(table)
    blocks = converted_blocks(model)
    if blocks:
        table = Table("block", "hidden units", title=f"{type(model).__name__}: feed-forward")
        for name, keep in blocks.items():
            table.add_row(name, f"topk (keep={keep})")
        print_table(table)
    return rows


def shown_option(option: Any) -> str:
    """An option; of a list, such as one of budgets by head, the ends."""
    return f"{min(option)} to {max(option)} by head" if isinstance(option, list | tuple) else str(option)


def _describe(layer: AttentionLayer, length: int) -> LayerDescription:
    if layer.host == "multihead":
        ours = isinstance(layer.module, MultiheadAttention)
        mechanism, spec = (layer.module.attention, layer.module.spec) if ours else (None, None)
        name = "exact" if mechanism is None else mechanism.name
    else:
        slot = layer.slot
        mechanism = None if slot is None else slot.mechanism
        name, spec = ("exact", None) if slot is None else (slot.name, slot.spec)
    exact_cost = None
    if layer.shape is not None:
        exact_cost = build_attention("exact", layer.shape).cost(length, causal=layer.causal)
    cost = mechanism.cost(length, causal=layer.causal) if mechanism is not None else None
    return LayerDescription(
        layer=layer.name,
        kind=f"{'decoder' if layer.is_decoder else 'encoder'}-{'cross' if layer.is_cross else 'self'}",
        attention=name,
        options={key: value for key, value in (spec or {}).items() if key != "name"},
        parameters=0 if mechanism is None else sum(p.numel() for p in mechanism.parameters()),
        cost=exact_cost if name == "exact" else cost,
        exact_cost=exact_cost,
    )
