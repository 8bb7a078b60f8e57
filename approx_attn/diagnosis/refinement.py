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

from approx_attn.attention import AttentionMask, build_attention
from approx_attn.attention.eigen.basis_file import Calibration
from approx_attn.attention.eigen.content_basis import HasContentBasis
from approx_attn.conversion.calibration.fitting import run_model, with_progress
from approx_attn.diagnosis.inputs import attention_observed
from approx_attn.diagnosis.reconstruction import ReconstructionMeasurement, relative_errors
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
            learns, of share `head` or `layer`.
        steps: of gradient.
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
    learner = _Learner(attention, calibration)
    with attention_observed(model, learner):
        for step in with_progress(range(steps), progress, "refining"):
            learner.pace = 0.5 + 0.5 * math.cos(math.pi * step / steps)
            run_model(model, batches[step % len(batches)])
    return replace(calibration, tensors=calibration.tensors | learner.maps())


def require_refinable(attention: Mapping[str, Any]) -> None:
    """Raise a `ValueError` if a mechanism `{"name": ..., **options}` has no maps that `refine_basis` can teach."""
    if not _is_refinable(attention):
        raise ValueError(
            f"refine needs a content basis that learns, shared within a head or layer, got attention={dict(attention)}."
        )


def _is_refinable(attention: Mapping[str, Any]) -> bool:
    mechanism = build_attention(**attention, num_heads=1, head_dim=8, max_length=16)
    if not isinstance(mechanism, HasContentBasis):
        return False
    return mechanism.share != "model" and mechanism.basis.key_map.requires_grad


def basis_variants(
    model: nn.Module,
    batches: Sequence[Any],
    mechanisms: Mapping[str, Mapping[str, Any]],
    calibration: Calibration,
    steps: int,
    progress: bool = True,
) -> tuple[dict[str, dict[str, Any]], dict[str, Calibration | None]]:
    """Every mechanism as it is and, where it has a basis that learns, with a random and with a refined one.

    Returns:
        Mechanisms by label, and by the label of those that do not start from `calibration` what they do start from
        (None: their random basis).
    """
    table: dict[str, dict[str, Any]] = {}
    bases: dict[str, Calibration | None] = {}
    for label, options in mechanisms.items():
        table[label] = spec = dict(options)
        if steps and _is_refinable(spec):
            table |= {f"{label}, random basis": {"seed": 0} | spec, f"{label}, refined": spec}
            bases[f"{label}, random basis"] = None
            bases[f"{label}, refined"] = refine_basis(model, batches, calibration, spec, steps=steps, progress=progress)
    return table, bases


class _Learner(ReconstructionMeasurement):
    """Callback of a capture: one step of Adam on the maps of the layer that runs."""

    def __init__(self, attention: Mapping[str, Any], calibration: Calibration) -> None:
        super().__init__({"refined": attention}, calibration)
        self.optimizers: dict[str, torch.optim.Adam] = {}
        self.pace = 1.0

    def __call__(
        self, layer: str, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float
    ) -> None:
        mechanism = self.mechanism("refined", layer, query, key, value, mask)
        if layer not in self.optimizers:
            maps = [parameter for parameter in mechanism.parameters() if parameter.requires_grad]
            groups = [{"params": [x], "scale": float(x.square().mean().sqrt())} for x in maps]
            self.optimizers[layer] = torch.optim.Adam(groups, lr=0.0)
        optimizer = self.optimizers[layer]
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * self.pace * group["scale"]
        with torch.enable_grad():
            (errors,) = relative_errors([mechanism], query, key, value, mask, scale)  # (b, h)
            optimizer.zero_grad()
            errors.mean().backward()
        optimizer.step()

    def maps(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for (_, layer), mechanism in self.built.items():
            assert isinstance(mechanism, HasContentBasis)
            prefix = f"{self.layers[layer]}.{mechanism.basis_kind}.{mechanism.share}."
            for name in ("query_map", "key_map"):
                found[f"{prefix}{name}"] = getattr(mechanism.basis, name).detach().float().cpu().contiguous()
        return found
