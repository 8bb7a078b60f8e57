"""Names of mechanisms: one registry, one spelling, everywhere."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from approx_attn.attention.base import AttentionMechanism
from approx_attn.attention.shape import AttentionShape
from approx_attn.errors import suggestion

_MECHANISMS = AttentionMechanism.registered

SHAPE_ARGUMENTS = ("shape", *(field.name for field in fields(AttentionShape)))
"""What the surrounding layer decides, whole or in parts, so that no config may set it."""

REPLACED_CLASSES = {"approx_attn.attention.eigen.block.EigenBlockAttention": "eigen_block"}

REPLACED_OPTIONS: dict[str, dict[str, tuple[Any, str]]] = {
    "eigen_topk": {
        "block_size": (None, "eigen_cluster has replaced it"),
        "scoring": ("dense", "exact scores are computed by whole chunks"),
    },
    "low_rank_topk": {"scoring": ("dense", "exact scores are computed by whole chunks")},
    "eigen_row": {"alignment": ("absolute", "its basis is laid out over the positions of keys")},
}
"""Options of earlier versions, by mechanism: the value at which they play no part, and what is there instead."""

ADDED_OPTIONS: dict[str, dict[str, Any]] = {
    "differentiable_mask": {"lr_multiplier": 1.0, "freeze_step": None, "closed_offsets": []},
    "eigen_cluster": {"rest": "keep"},
    "eigen_matrix": {"basis_init": "dct", "basis": None},
    "eigen_row": {"noise": "shared"},
    "gaussian": {"gaussian_heads": None},
    "low_rank_topk": {"in_training": "chosen"},
}
"""Options that are younger than records of runs, by mechanism: the value at which a run is what it was without them."""

AttentionSpec = str | Mapping[str, Any] | Callable[[AttentionShape], AttentionMechanism] | AttentionMechanism
"""How a layer is told its mechanism: a name; `{"name": ..., **options}`; a factory that takes an `AttentionShape`
(such as the `functools.partial` that Hydra makes of a YAML file); or a built mechanism."""


def register_attention(name: str) -> Callable[[type[AttentionMechanism]], type[AttentionMechanism]]:
    """Class decorator that makes a mechanism available as `attention=<name>`."""

    def register(cls: type[AttentionMechanism]) -> type[AttentionMechanism]:
        if name in _MECHANISMS:
            raise ValueError(f"attention name {name!r} is taken by {_MECHANISMS[name].__qualname__}.")
        cls.name = name
        _MECHANISMS[name] = cls
        return cls

    return register


def available_attention() -> list[str]:
    """Names of all mechanisms, sorted."""
    return sorted(_MECHANISMS)


def attention_class(name: str) -> type[AttentionMechanism]:
    """The class behind a name.

    Raises:
        ValueError: unknown name; the message lists the known ones, or says what has replaced it.
    """
    if name not in _MECHANISMS:
        raise ValueError(f"attention={name!r} is unknown{suggestion(name, available_attention())}")
    return _MECHANISMS[name]


def attention_options(name: str) -> dict[str, inspect.Parameter]:
    """Options that `attention.<option>` may set for a mechanism, with their defaults."""
    parameters = inspect.signature(attention_class(name).__init__).parameters
    return {key: p for key, p in parameters.items() if key != "self" and key not in SHAPE_ARGUMENTS}


def build_attention(name: str, shape: AttentionShape | None = None, **options: Any) -> AttentionMechanism:
    """Build a mechanism by name.

    Args:
        name: one of `available_attention()`.
        shape: of the layer it serves; None takes its parts (`num_heads`, `head_dim`, ...) from among the options.
        options: of the mechanism.

    Raises:
        ValueError: unknown name, unknown option, or an impossible value.
    """
    accepted, options = attention_options(name), without_replaced(name, options)
    parts = {key: options.pop(key) for key in SHAPE_ARGUMENTS if shape is None and key in options}
    for option in options:
        if option not in accepted:
            raise ValueError(f"attention.{option} is not an option of {name}{suggestion(option, accepted)}")
    return attention_class(name)(AttentionShape(**parts) if shape is None else shape, **options)


def resolve_attention(spec: AttentionSpec, shape: AttentionShape) -> AttentionMechanism:
    """Build what a layer of a shape was told to use."""
    if isinstance(spec, AttentionMechanism):
        return spec
    if isinstance(spec, str):
        return build_attention(spec, shape)
    if isinstance(spec, Mapping):
        name, options = named_options(spec)
        return build_attention(name, shape, **options)
    return spec(shape)


def named_options(spec: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and options of `{"name": ..., **options}`.

    Raises:
        ValueError: the name is missing.
    """
    options = {str(key): value for key, value in spec.items()}
    if "name" not in options:
        raise ValueError(f"an attention mapping must have the key 'name', got {sorted(options)}.")
    return options.pop("name"), options


def without_replaced(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a mechanism without those of earlier versions, which specifications hold that were saved then.

    Raises:
        ValueError: one of these is set to something that is no longer there.
    """
    replaced = REPLACED_OPTIONS.get(name, {})
    for option, (neutral, instead) in replaced.items():
        if options.get(option) not in (None, neutral):
            raise ValueError(f"attention.{option} is no longer an option of {name}; {instead}.")
    return {option: value for option, value in options.items() if option not in replaced}
