"""approx_attn: train transformers whose attention computes part of the scores and reconstructs the rest."""

from typing import TYPE_CHECKING, Any

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
from approx_attn.conversion.calibration import calibrate
from approx_attn.conversion.convert import convert, describe, revert
from approx_attn.conversion.saving import load_converted, save_converted

if TYPE_CHECKING:
    from approx_attn.run.predict import load_model, predict

__version__ = "0.1.0"

__all__ = [
    "AttentionMask",
    "AttentionMechanism",
    "Capabilities",
    "Cost",
    "MultiheadAttention",
    "available_attention",
    "build_attention",
    "calibrate",
    "convert",
    "describe",
    "load_converted",
    "load_model",
    "predict",
    "register_attention",
    "revert",
    "save_converted",
    "scaled_dot_product_attention",
]


def __getattr__(name: str) -> Any:
    """What needs Lightning and Hydra is imported when it is first used."""
    if name in ("load_model", "predict"):
        from approx_attn.run import predict as prediction

        return getattr(prediction, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
