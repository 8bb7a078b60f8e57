"""Which mechanism at which budget every attention layer of a model gets: the result of `allocate`, kept as a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from approx_attn.conversion.layers import AttentionLayer

FORMAT, VERSION = "approx_attn.budgets", 1


@dataclass(frozen=True)
class LayerBudget:
    """What one attention layer gets, and what was measured of it.

    Attributes:
        attention: `{"name": ..., **options}`; exact where the layer is left as it is.
        shape: `num_heads`, `num_key_value_heads` and `head_dim` of the layer; None if it did not run.
        error: ‖Ô − O‖ / ‖O‖ of the output of the layer's attention, all heads together.
        head_errors: the same of every head by itself.
        head_shares: share of the pairs that each head computes exactly.
        total_pairs: pairs of all heads that exact attention computes for the longest input seen.
        effect: relative error of the model's output per error of this layer alone; 1 where it was not measured.
    """

    attention: dict[str, Any]
    shape: dict[str, int] | None = None
    error: float = 0.0
    head_errors: Sequence[float] = ()
    head_shares: Sequence[float] = ()
    total_pairs: int = 0
    effect: float = 1.0

    @property
    def exact_share(self) -> float:
        """Share of the pairs that is computed exactly, mean over heads; all where the layer did not run."""
        return sum(self.head_shares) / len(self.head_shares) if self.head_shares else 1.0


@dataclass(frozen=True)
class Allocation:
    """Budgets of the attention layers of one model.

    Attributes:
        layers: by qualified name of the attention module, all that the model has.
        model: class of the model, for messages.
    """

    layers: Mapping[str, LayerBudget]
    model: str = ""

    @property
    def exact_share(self) -> float:
        """Share of the pairs of all layers that is computed exactly."""
        pairs = sum(layer.total_pairs for layer in self.layers.values())
        return sum(layer.exact_share * layer.total_pairs for layer in self.layers.values()) / max(pairs, 1)

    def save(self, path: str | Path) -> Path:
        """Write the file, whole or not at all."""
        path = Path(path)
        header = {"format": FORMAT, "version": VERSION, "model": self.model}
        text = json.dumps(header | {"layers": {name: asdict(layer) for name, layer in self.layers.items()}}, indent=2)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(f"{text}\n", encoding="utf-8")
        partial.replace(path)
        return path

    @classmethod
    def open(cls, path: str | Path) -> Allocation:
        """Read a file that `save` wrote.

        Raises:
            ValueError: missing, truncated or foreign file.
        """
        wanted = "`approx-attn allocate` writes one"
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"budgets={path} is not a file; {wanted}.") from error
        except ValueError as error:
            raise ValueError(f"budgets={path} is truncated or not JSON; {wanted}.") from error
        if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"budgets={path} is not a file of budgets of version {VERSION}; {wanted}.")
        try:
            return cls({name: LayerBudget(**layer) for name, layer in data["layers"].items()}, data["model"])
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"budgets={path} is damaged ({error}); {wanted}.") from error

    def of_model(self, model: str, found: Sequence[AttentionLayer]) -> dict[str, LayerBudget]:
        """The budgets by the names that the layers have in a model, which may be wrapped in another or taken out.

        Args:
            model: class of the model, for messages.
            found: its attention layers.

        Raises:
            ValueError: the layers are not those of the budgets.
        """
        own, theirs = next(iter(self.layers), ""), found[0].name if found else ""
        outer = theirs.removesuffix(own) if theirs.endswith(own) else ""
        inner = own.removesuffix(theirs) if own.endswith(theirs) else ""
        renamed = {f"{outer}{name.removeprefix(inner)}": layer for name, layer in self.layers.items()}
        names = {layer.name for layer in found}
        of = f"budgets are those of a {self.model} with {len(renamed)} attention layers"
        if names != set(renamed):
            other = min(names ^ set(renamed))
            raise ValueError(f"{of}, this {model} has {len(names)}; {other} is not in both.")
        for layer in found:
            shape = renamed[layer.name].shape
            if shape is not None and layer.shape is not None and shape != shape_of(layer.shape):
                raise ValueError(f"{of}, whose {layer.name} has {shape}; here it has {shape_of(layer.shape)}.")
        return renamed


def shape_of(sizes: Any) -> dict[str, int]:
    """What tells layers of different models apart: heads, key/value heads and dimension."""
    return {key: getattr(sizes, key) for key in ("num_heads", "num_key_value_heads", "head_dim")}
