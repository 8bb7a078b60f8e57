"""Names of mechanisms: one registry, one spelling, everywhere."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from approx_attn.attention.base import AttentionMechanism
from approx_attn.errors import suggestion

_MECHANISMS = AttentionMechanism.registered

# What the surrounding layer decides, so no config may set it.
SHAPE_ARGUMENTS = ("num_heads", "head_dim", "value_dim", "num_key_value_heads", "max_length", "causal", "layer_index")

REPLACED_CLASSES = {"approx_attn.attention.eigen.block.EigenBlockAttention": "eigen_block"}

REPLACED_OPTIONS = {"eigen_topk": {"block_size": "eigen_cluster"}}
"""Options of earlier versions, by mechanism, that were off at null, and the mechanism that has replaced them."""

AttentionSpec = str | Mapping[str, Any] | Callable[..., AttentionMechanism] | AttentionMechanism
"""How a layer is told its mechanism: a name; `{"name": ..., **options}`; a factory that takes the shape
arguments (such as the `functools.partial` that Hydra makes of a YAML file); or a built mechanism."""


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


def build_attention(name: str, **options: Any) -> AttentionMechanism:
    """Build a mechanism by name.

    Args:
        name: one of `available_attention()`.
        options: shape arguments (`num_heads`, `head_dim`, ...) and the options of the mechanism.

    Raises:
        ValueError: unknown name, unknown option, or an impossible value.
    """
    accepted, options = attention_options(name), without_replaced(name, options)
    for option in options:
        if option not in accepted and option not in SHAPE_ARGUMENTS:
            raise ValueError(f"attention.{option} is not an option of {name}{suggestion(option, accepted)}")
    return attention_class(name)(**options)


def resolve_attention(spec: AttentionSpec, **shape: Any) -> AttentionMechanism:
    """Build what a layer was told to use; `shape` are the shape arguments that the layer knows."""
    if isinstance(spec, AttentionMechanism):
        return spec
    if isinstance(spec, str):
        return build_attention(spec, **shape)
    if isinstance(spec, Mapping):
        options = {str(key): value for key, value in spec.items()}
        if "name" not in options:
            raise ValueError(f"an attention mapping must have the key 'name', got {sorted(options)}.")
        return build_attention(options.pop("name"), **options, **shape)
    return spec(**shape)


def without_replaced(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a mechanism without those of earlier versions, which specifications hold that were saved then.

    Raises:
        ValueError: one of these is not null.
    """
    replaced = REPLACED_OPTIONS.get(name, {})
    for option, mechanism in replaced.items():
        if options.get(option) is not None:
            raise ValueError(f"attention.{option} is no longer an option of {name}; {mechanism} has replaced it.")
    return {option: value for option, value in options.items() if option not in replaced}
