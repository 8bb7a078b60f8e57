"""What measurements compare: copies of a model with other attention, closed-form, random and refined bases, costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from approx_attn.attention import Cost, build_attention
from approx_attn.attention.eigen.basis_file import Calibration
from approx_attn.conversion.allocation import sharing_copy
from approx_attn.conversion.budgets import Allocation
from approx_attn.conversion.calibration.refinement import is_refinable, refine_basis
from approx_attn.conversion.convert import attention_spec, convert
from approx_attn.conversion.installing import find_layers

Attention = Mapping[str, Any] | Allocation
"""A mechanism `{"name": ..., **options}` for all layers, or the budgets of each."""


def basis_variants(
    model: nn.Module,
    batches: Sequence[Any],
    mechanisms: Mapping[str, Attention],
    calibration: Calibration,
    steps: int,
    progress: bool = True,
) -> tuple[dict[str, Any], dict[str, Calibration | None]]:
    """Every mechanism as it is and, where it has a basis that learns, with a random and with a refined one.

    Budgets of layers get no row with random bases.

    Returns:
        Mechanisms by label, and by the label of those that do not start from `calibration` what they do start from
        (None: their random basis).
    """
    table: dict[str, Any] = {}
    bases: dict[str, Calibration | None] = {}
    for label, given in mechanisms.items():
        table[label] = given
        specs = _by_layer(model, given) if isinstance(given, Allocation) else {"": dict(given)}
        if not steps or not any(map(is_refinable, specs.values())):
            continue
        if not isinstance(given, Allocation):
            table[f"{label}, random basis"] = {"seed": 0} | dict(given)
            bases[f"{label}, random basis"] = None
        table[f"{label}, refined"] = given
        attention = specs if isinstance(given, Allocation) else given
        refined = refine_basis(model, batches, calibration, attention, steps=steps, progress=progress)
        bases[f"{label}, refined"] = refined
    return table, bases


def _by_layer(model: nn.Module, budgets: Allocation) -> dict[str, dict[str, Any]]:
    layers = budgets.of_model(type(model).__name__, find_layers(model))
    return {name: layer.attention for name, layer in layers.items()}


def converted_copy(model: nn.Module, attention: Attention, basis: Calibration | None, length: int) -> nn.Module:
    """A copy of a model with other attention and the same weights, in evaluation mode.

    Args:
        attention: its mechanism or budgets.
        basis: what mechanisms start from; None keeps their random bases.
        length: longest input.
    """
    copied = sharing_copy(model)
    if isinstance(attention, Allocation):
        convert(copied, budgets=attention, calibration=None, max_length=length)
    else:
        convert(copied, attention_spec(attention, {}), calibration=None, max_length=length)
    if basis is not None:
        basis.load_into_model(copied)
    return copied.eval()


def costs(model: nn.Module, length: int, causal: bool | None = None) -> tuple[Cost, Cost]:
    """Cost of all attention layers of a model at a length, and of exact attention in their place.

    Args:
        causal: whether layers are used under a causal mask; None: as they say themselves.
    """
    own, exact = [], []
    for layer in find_layers(model):
        mechanism = layer.mechanism
        shape = layer.shape if mechanism is None else mechanism.shape
        is_causal = layer.causal if causal is None else causal
        if shape is None:
            continue  # neither says its shape before it has run
        exact.append(build_attention("exact", shape).cost(length, causal=is_causal))
        own.append(exact[-1] if mechanism is None else mechanism.cost(length, causal=is_causal))
    return sum(own[1:], start=own[0]), sum(exact[1:], start=exact[0])
