"""A mechanism beside the exact attention of a layer: started from the layer's basis, run on its inputs, compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from approx_attn.attention import AttentionMask, AttentionMechanism, AttentionShape, resolve_attention
from approx_attn.attention.calibrated import BasisMechanism
from approx_attn.attention.eigen.basis_file import Calibration
from approx_attn.attention.exact import exact_attention_with_weights
from approx_attn.conversion.calibration.moments import used_tokens


def mechanism_for_layer(
    attention: Mapping[str, Any],
    layer: str,
    calibration: Calibration,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    basis: Calibration | None,
) -> AttentionMechanism:
    """A mechanism in evaluation mode, in the shape of the inputs of a layer.

    Args:
        attention: `{"name": ..., **options}`.
        layer: qualified name of the attention module, one of `calibration`, which knows its longest input.
        query, key, value, mask: inputs of the layer.
        basis: what the mechanism starts from if it has a basis; None keeps its random one.
    """
    index = next(i for i, shape in enumerate(calibration.layers) if shape.name == layer)
    longest = calibration.layers[index].length
    shape = AttentionShape.of(query, key, value, max_length=longest, causal=mask.causal)
    mechanism = resolve_attention(attention, shape).eval()
    if isinstance(mechanism, BasisMechanism) and basis is not None:
        basis.load_into(mechanism, index)
    return mechanism.to(query.device)


def relative_errors(mechanisms: Sequence[AttentionMechanism], *inputs: Any) -> Iterator[Tensor]:
    """(b, h) of each mechanism in turn: ‖Ô − O‖ / ‖O‖; `inputs` as `output_errors` takes them."""
    for error, norm in output_errors(mechanisms, *inputs):
        yield error / norm


def output_errors(
    mechanisms: Sequence[AttentionMechanism],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    scale: float,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(b, h) twice for each mechanism in turn: ‖Ô − O‖ and ‖O‖ over the real queries, O the exact output."""
    if mask.key_keep is not None:
        padded = ~mask.key_keep[:, None, :, None]
        key, value = key.masked_fill(padded, 0.0), value.masked_fill(padded, 0.0)
    exact, _ = exact_attention_with_weights(query, key, value, mask, scale, 0.0)
    real = used_tokens(mask, query, key)[0][:, None, :, None]  # (b, 1, n_q, 1)
    norm = exact.masked_fill(~real, 0.0).flatten(2).norm(dim=-1).clamp_min(1e-12)  # (b, h)
    for mechanism in mechanisms:
        output, _ = mechanism(query, key, value, mask, scale=scale)
        yield (output - exact).masked_fill(~real, 0.0).flatten(2).norm(dim=-1), norm
