"""approx_attn: train transformers whose attention computes part of the scores and reconstructs the rest."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from approx_attn.attention import (
        AttentionMask,
        AttentionMechanism,
        Capabilities,
        Cost,
        available_attention,
        build_attention,
        register_attention,
    )
    from approx_attn.attention.functional import scaled_dot_product_attention
    from approx_attn.attention.multihead import MultiheadAttention
    from approx_attn.comparison.command import compare
    from approx_attn.config.compose import compose_config
    from approx_attn.config.trust import trust
    from approx_attn.conversion.allocation import allocate
    from approx_attn.conversion.budgets import Allocation
    from approx_attn.conversion.calibration import calibrate
    from approx_attn.conversion.convert import convert, describe, revert
    from approx_attn.conversion.saving import load_converted, save_converted
    from approx_attn.metrics import Counts, Metric, register_metric
    from approx_attn.run.evaluate import evaluate
    from approx_attn.run.predict import load_model, predict
    from approx_attn.run.train import train

__version__ = "0.1.0"

# What is defined where; a module is imported when something of it is first used.
_PLACES = {
    "attention": (
        *("AttentionMask", "AttentionMechanism", "Capabilities", "Cost"),
        *("available_attention", "build_attention", "register_attention"),
    ),
    "attention.functional": ("scaled_dot_product_attention",),
    "attention.multihead": ("MultiheadAttention",),
    "comparison.command": ("compare",),
    "config.compose": ("compose_config",),
    "config.trust": ("trust",),
    "conversion.allocation": ("allocate",),
    "conversion.budgets": ("Allocation",),
    "conversion.calibration": ("calibrate",),
    "conversion.convert": ("convert", "describe", "revert"),
    "conversion.saving": ("load_converted", "save_converted"),
    "metrics": ("Counts", "Metric", "register_metric"),
    "run.evaluate": ("evaluate",),
    "run.predict": ("load_model", "predict"),
    "run.train": ("train",),
}

__all__ = [
    "Allocation",
    "AttentionMask",
    "AttentionMechanism",
    "Capabilities",
    "Cost",
    "Counts",
    "Metric",
    "MultiheadAttention",
    "allocate",
    "available_attention",
    "build_attention",
    "calibrate",
    "compare",
    "compose_config",
    "convert",
    "describe",
    "evaluate",
    "load_converted",
    "load_model",
    "predict",
    "register_attention",
    "register_metric",
    "revert",
    "save_converted",
    "scaled_dot_product_attention",
    "train",
    "trust",
]


def __getattr__(name: str) -> Any:
    place = next((place for place, names in _PLACES.items() if name in names), None)
    if place is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{place}"), name)
