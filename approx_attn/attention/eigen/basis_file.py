"""Fitted bases as a file: safetensors with a JSON header, read into mechanisms all or nothing.

Tensors are named `<layer>.<kind>.<head | layer>.<name>`, or `model.<kind>.<name>` for the basis of all layers together.
The header says what was fitted, on which model and data, and the shape of every layer.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from approx_attn.attention.base import AttentionMechanism
from approx_attn.attention.calibrated import BasisMechanism

FORMAT = "approx_attn.basis"
VERSION = 1


@dataclass(frozen=True)
class LayerShape:
    """Shape of one attention layer; `name` is its qualified name in the model, `length` its longest input.

    `causal` says whether it was seen under a causal mask.
    """

    name: str
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    length: int
    causal: bool = False

    def __str__(self) -> str:
        return f"{self.num_heads} heads, {self.num_key_value_heads} key heads, head_dim {self.head_dim}"


@dataclass
class Calibration:
    """Fitted bases of all layers of a model.

    Attributes:
        tensors: by name, as in the file.
        layers: shapes, in the order of the model's modules; the index is a mechanism's `layer_index`.
        statistics: kinds of bases that were fitted.
        model, data: where they come from, for people.
        sequences: inputs seen.
        rows: rows of scores (content: queries) seen per layer.
    """

    tensors: dict[str, Tensor]
    layers: list[LayerShape]
    statistics: list[str]
    model: str = ""
    data: str = ""
    sequences: int = 0
    rows: list[int] = field(default_factory=list)

    def save(self, path: str | Path) -> Path:
        """Write the file, whole or not at all."""
        path = Path(path)
        header = asdict(self) | {"format": FORMAT, "version": VERSION}
        del header["tensors"]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        save_file({k: v.contiguous() for k, v in self.tensors.items()}, partial, metadata={FORMAT: json.dumps(header)})
        partial.replace(path)
        return path

    @classmethod
    def open(cls, path: str | Path) -> Calibration:
        """Read a file that `save` wrote.

        Raises:
            ValueError: missing, truncated or foreign file.
        """
        if not Path(path).is_file():
            raise ValueError(f"attention.basis={path} is not a file; `approx-attn calibrate` writes one.")
        try:
            with safe_open(str(path), framework="pt") as file:
                header = json.loads((file.metadata() or {}).get(FORMAT, "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, ValueError, OSError) as error:
            raise ValueError(f"attention.basis={path} is truncated or not a safetensors file ({error}).") from error
        if (
            not isinstance(header, dict)
            or header.pop("format", None) != FORMAT
            or header.pop("version", None) != VERSION
        ):
            raise ValueError(
                f"attention.basis={path} is not a basis file of version {VERSION}; `approx-attn calibrate` writes one."
            )
        try:
            layers = [LayerShape(**layer) for layer in header.pop("layers")]
            return cls(tensors=tensors, layers=layers, **header)
        except (KeyError, TypeError) as error:
            raise ValueError(f"attention.basis={path} has a damaged header ({error}).") from error

    def load_into(self, mechanism: AttentionMechanism, layer: int | None = None, source: str = "calibration") -> None:
        """Start a mechanism from the fitted basis of one layer.

        Args:
            mechanism: a `BasisMechanism`.
            layer: index into `layers`; the mechanism's `layer_index` if None.
            source: what messages call this calibration.

        Raises:
            ValueError: a mechanism without a basis, or a basis of another kind or shape; nothing is changed then.
        """
        index = mechanism.layer_index if layer is None else layer
        if not 0 <= index < len(self.layers):
            raise ValueError(f"{source} holds {len(self.layers)} layers, layer_index={index} is not among them.")
        shape = self.layers[index]
        own = LayerShape("", mechanism.num_heads, mechanism.num_key_value_heads, mechanism.head_dim, 0)
        if str(own) != str(shape):
            raise ValueError(f"{source} was fitted to {shape} ({shape.name}); attention={mechanism.name} has {own}.")
        if not isinstance(mechanism, BasisMechanism):
            raise ValueError(f"{source}: attention={mechanism.name} has no basis to start from a file.")
        try:
            mechanism.load_fit(lambda scope: self._fitted(mechanism, index, scope))
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error

    def _fitted(self, mechanism: BasisMechanism, layer: int, scope: str) -> Any:
        """A basis of the kind of a mechanism, whole and finite."""
        kind = mechanism.basis_kind
        if kind not in self.statistics:
            raise ValueError(f"holds {', '.join(self.statistics)}; attention={mechanism.name} needs {kind}.")
        prefix = f"model.{kind}." if scope == "model" else f"{layer}.{kind}.{scope}."
        parts = {name[len(prefix) :]: part for name, part in self.tensors.items() if name.startswith(prefix)}
        if scope == "model" and not parts:
            raise ValueError("holds no basis for the model: its layers differ in shape; use attention.share=head.")
        wanted = {f.name for f in fields(mechanism.fit_type)}
        needed = {f.name for f in fields(mechanism.fit_type) if f.default is MISSING}
        if not needed <= parts.keys() <= wanted:
            raise ValueError(f"is damaged: {prefix} has {sorted(parts)}, it must have {sorted(needed)}.")
        for name, part in parts.items():
            if not bool(part.isfinite().all()):
                raise ValueError(f"is damaged: {prefix}{name} must be finite.")
        return mechanism.fit_type(**parts)

    def load_into_model(self, model: nn.Module) -> list[str]:
        """Start every mechanism of a model that has a basis from that of the layer it belongs to.

        Returns:
            The qualified names of these mechanisms.
        """
        loaded = []
        for name, mechanism in model.named_modules():
            if isinstance(mechanism, BasisMechanism):
                inside = [i for i, layer in enumerate(self.layers) if f"{name}.".startswith(f"{layer.name}.")]
                if inside:
                    self.load_into(mechanism, max(inside, key=lambda i: len(self.layers[i].name)))
                    loaded.append(name)
        return loaded


def load_basis_into(mechanism: AttentionMechanism, path: str | Path) -> None:
    """Start a mechanism from the basis of its layer (`layer_index`) in a file.

    Args:
        mechanism: a `BasisMechanism`.
        path: written by `Calibration.save`.

    Raises:
        ValueError: a missing, truncated or foreign file, or one fitted to another shape or kind of mechanism; the
            message names both, and nothing is changed.
    """
    Calibration.open(path).load_into(mechanism, source=f"attention.basis={path}")


def as_float32(prefix: str, fitted: Any) -> dict[str, Tensor]:
    """The tensors of a fitted basis as they go into a file: float32, on the CPU, their names behind a prefix."""
    parts = {f.name: getattr(fitted, f.name) for f in fields(fitted)}
    return {f"{prefix}{name}": part.float().cpu().contiguous() for name, part in parts.items() if part is not None}
