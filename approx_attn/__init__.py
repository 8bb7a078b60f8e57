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
    from approx_attn.conversion.calibration import calibrate
    from approx_attn.conversion.convert import convert, describe, revert
    from approx_attn.conversion.saving import load_converted, save_converted
    from approx_attn.run.evaluate import evaluate
    from approx_attn.run.predict import load_model, predict
    from approx_attn.run.train import train

__version__ = "0.1.0"

# Where a name is defined; a module is imported when something of it is first used.
_PLACES = {
    "AttentionMask": "attention",
    "AttentionMechanism": "attention",
    "Capabilities": "attention",
    "Cost": "attention",
    "MultiheadAttention": "attention.multihead",
    "available_attention": "attention",
    "build_attention": "attention",
    "calibrate": "conversion.calibration",
    "compare": "comparison.command",
    "compose_config": "config.compose",
    "convert": "conversion.convert",
    "describe": "conversion.convert",
    "evaluate": "run.evaluate",
    "load_converted": "conversion.saving",
    "load_model": "run.predict",
    "predict": "run.predict",
    "register_attention": "attention",
    "revert": "conversion.convert",
    "save_converted": "conversion.saving",
    "scaled_dot_product_attention": "attention.functional",
    "train": "run.train",
}

__all__ = [
    "AttentionMask",
    "AttentionMechanism",
    "Capabilities",
    "Cost",
    "MultiheadAttention",
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
    "revert",
    "save_converted",
    "scaled_dot_product_attention",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value
