"""Content bases refined by gradient: what learning the maps adds to their closed form in a trained model.

The closed form minimises the error of scores; this minimises the error of the attention's output under the mechanism
that uses the basis. The weights of the model stay fixed, and every layer learns from its inputs in the unchanged model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from approx_attn.attention import AttentionMask, AttentionMechanism, build_attention
from approx_attn.attention.eigen.basis_file import Calibration
from approx_attn.attention.eigen.content_basis import HasContentBasis
from approx_attn.attention.exact import computing_exactly
from approx_attn.conversion.calibration.fitting import run_model, with_progress
from approx_attn.conversion.calibration.layer_errors import mechanism_for_layer, relative_errors
from approx_attn.conversion.capture import attention_observed
from approx_attn.errors import require_count

LEARNING_RATE = 0.01
"""Adam's first step as a share of the root mean square of each map; it falls to zero along half a cosine."""


def refine_basis(
    model: nn.Module,
    batches: Sequence[Any],
    calibration: Calibration,
    attention: Mapping[str, Any],
    *,
    steps: int = 200,
    exact: bool = True,
    progress: bool = True,
) -> Calibration:
    """Let the query and key maps of every layer learn to reconstruct the output of its exact attention.

    One step runs the model on one batch and moves the maps of all layers by Adam, against the mean over heads and
    sequences of ‖Ô − O‖ / ‖O‖. Memory holds one batch.

    Args:
        model: holds layers that `capture_attention_inputs` sees; stays as it is.
        batches: inputs of the model, as `calibrate` takes them; taken in turns.
        calibration: fitted on the same model; the maps start from it, and stay as they are in layers that do not run.
        attention: `{"name": ..., **options}` of the mechanism that the basis is for: one with a content basis that
            learns, of share `head` or `layer`. Or such mechanisms by the name of their layer: layers without one, or
            with one that has no such basis, stay as they are.
        steps: of gradient.
        exact: mechanisms in the model compute exact attention meanwhile, as in `calibrate`.
        progress: show a progress bar.

    Returns:
        A calibration with the refined maps, of the rank of the mechanism, in place of those of its share. All else is
        as in `calibration`.

    Raises:
        ValueError: a mechanism without such a basis, or no batches.
    """
    require_count("refine", steps)
    if not batches:
        raise ValueError("refine got no batches.")
    require_refinable(attention)
    one = isinstance(attention.get("name"), str)
    by_layer = {layer.name: attention for layer in calibration.layers} if one else attention
    learner = _Learner({layer: spec for layer, spec in by_layer.items() if is_refinable(spec)}, calibration)
    mechanisms = [m for m in model.modules() if isinstance(m, AttentionMechanism)] if exact else []
    with attention_observed(model, learner), computing_exactly(mechanisms):
        for step in with_progress(range(steps), progress, "refining"):
            learner.pace = 0.5 + 0.5 * math.cos(math.pi * step / steps)
            run_model(model, batches[step % len(batches)])
    return replace(calibration, tensors=calibration.tensors | learner.maps())


def require_refinable(attention: Mapping[str, Any]) -> None:
    """Raise a `ValueError` if no mechanism of what `refine_basis` takes has maps that it can teach."""
    given = [attention] if isinstance(attention.get("name"), str) else list(attention.values())
    if not any(map(is_refinable, given)):
        raise ValueError(
            f"refine needs a content basis that learns, shared within a head or layer, got attention={dict(given[0])}."
        )


def is_refinable(attention: Mapping[str, Any]) -> bool:
    """Whether a mechanism `{"name": ..., **options}` has maps that `refine_basis` can teach."""
    options = {key: value for key, value in attention.items() if key != "keep"}  # may be a list by head
    mechanism = build_attention(**options, num_heads=1, head_dim=8, max_length=16)
    if not isinstance(mechanism, HasContentBasis):
        return False
    return mechanism.share != "model" and mechanism.basis.key_map.requires_grad


class _Learner:
    """Callback of a capture: one step of Adam on the maps of the layer that runs."""

    def __init__(self, attention: Mapping[str, Mapping[str, Any]], calibration: Calibration) -> None:
        self.attention, self.calibration = attention, calibration
        self.mechanisms: dict[str, HasContentBasis] = {}
        self.optimizers: dict[str, torch.optim.Adam] = {}
        self.pace = 1.0

    def __call__(
        self, layer: str, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float
    ) -> None:
        if layer not in self.attention:
            return
        if layer not in self.mechanisms:
            self._start(layer, query, key, value, mask)
        mechanism, optimizer = self.mechanisms[layer], self.optimizers[layer]
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * self.pace * group["scale"]
        with torch.enable_grad():
            (errors,) = relative_errors([mechanism], query, key, value, mask, scale)  # (b, h)
            optimizer.zero_grad()
            errors.mean().backward()
        optimizer.step()

    def _start(self, layer: str, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask) -> None:
        inputs = (query, key, value, mask)
        mechanism = mechanism_for_layer(self.attention[layer], layer, self.calibration, *inputs, self.calibration)
        assert isinstance(mechanism, HasContentBasis)
        maps = [parameter for parameter in mechanism.parameters() if parameter.requires_grad]
        groups = [{"params": [x], "scale": float(x.square().mean().sqrt())} for x in maps]
        self.mechanisms[layer], self.optimizers[layer] = mechanism, torch.optim.Adam(groups, lr=0.0)

    def maps(self) -> dict[str, Tensor]:
        """The maps that were taught, named as in `Calibration.tensors`."""
        index = {layer.name: i for i, layer in enumerate(self.calibration.layers)}
        return {
            f"{index[layer]}.{mechanism.basis_kind}.{mechanism.share}.{name}": (
                getattr(mechanism.basis, name).detach().float().cpu().contiguous()
            )
            for layer, mechanism in self.mechanisms.items()
            for name in ("query_map", "key_map")
        }
