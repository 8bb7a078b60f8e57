"""Attention mechanisms: (batch, heads, length, dim) tensors in and out, one file each.

Importing this package imports every module in it, so that a mechanism is available by name as soon as
its file exists.
"""

import importlib
import pkgutil

from approx_attn.attention.base import AttentionMechanism, Capabilities, Cost
from approx_attn.attention.mask import AttentionMask
from approx_attn.attention.registry import (
    attention_class,
    attention_options,
    available_attention,
    build_attention,
    register_attention,
    resolve_attention,
)
from approx_attn.attention.shape import AttentionShape

for _module in pkgutil.walk_packages(__path__, prefix=f"{__name__}."):
    importlib.import_module(_module.name)

__all__ = [
    "AttentionMask",
    "AttentionMechanism",
    "AttentionShape",
    "Capabilities",
    "Cost",
    "attention_class",
    "attention_options",
    "available_attention",
    "build_attention",
    "register_attention",
    "resolve_attention",
]
