"""Which positions survive in the masks that a model has learned.

Source: SparseBERT (Shi et al., arXiv 2102.12871), which finds the diagonal to be what attention needs least.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from approx_attn.attention import AttentionMask
from approx_attn.attention.baselines.differentiable_mask import DifferentiableMaskAttention
from approx_attn.diagnosis.analysis.book import Book
from approx_attn.diagnosis.analysis.collect import LayerStatistics
from approx_attn.diagnosis.analysis.figures import HEAT, new_figure, printed

PLACES = {  # what a pair (query i, key j) can be: (n, n) offsets j − i and keys j to those pairs
    "diagonal": lambda offsets, keys: offsets == 0,
    "previous": lambda offsets, keys: offsets == -1,
    "next": lambda offsets, keys: offsets == 1,
    "first_key": lambda offsets, keys: keys == 0,
}


def learned_masks(model: nn.Module, layers: Sequence[LayerStatistics]) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer label to the open gates (h, n, n), bool, and the pairs (n, n) that a mask leaves; n: the longest input."""
    found = {}
    for layer in layers:
        for name, module in model.named_modules():
            if isinstance(module, DifferentiableMaskAttention) and name.startswith(f"{layer.name}."):
                n, causal = layer.length, AttentionMask(causal="causal" in layer.needs)
                allowed = causal.dense_keep(n, n, torch.device("cpu"))
                with torch.no_grad():
                    is_open = module.logits(n, n).cpu() > 0
                found[layer.label] = is_open, torch.ones(n, n, dtype=torch.bool) if allowed is None else allowed
    return found


def share_kept(is_open: Tensor, allowed: Tensor) -> list[dict[str, Any]]:
    """A row per head: the share of the allowed pairs that is `kept`, of all and of those in each of `PLACES`."""
    columns = torch.arange(is_open.shape[-1])
    offsets, keys = columns - columns[:, None], columns.expand_as(allowed)
    places = {"kept": allowed} | {name: allowed & place(offsets, keys) for name, place in PLACES.items()}
    return [
        {"head": head, **{name: _share(gates, pairs) for name, pairs in places.items()}}
        for head, gates in enumerate(is_open)
    ]


def add_gates(book: Book, masks: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Which pairs are left?"""
    section = book.section("Learned masks")
    if not masks:
        section.text("No layer of the model has attention=differentiable_mask: no mask was learned.")
        return
    rows = [{"layer": layer, **row} for layer, mask in masks.items() for row in share_kept(*mask)]
    section.text(
        "A gate per pair of positions or per offset was learned to be open or closed, the same for all inputs. Shares "
        "are of the pairs that padding apart a query may use: of all, of a token with itself (diagonal), with the one "
        "before and after it, and with the first token."
    )
    maps = {layer: _over_heads(*mask) for layer, mask in masks.items()}
    section.figure("gates", position_maps(maps), "Share of the heads of a layer that keep a pair.")
    section.table("gates", rows, "Share of the pairs whose gate is open, by head.")


@printed
def position_maps(maps: Mapping[str, NDArray[np.float64]]) -> Figure:
    """Maps over query and key positions, values 0 to 1, a panel per layer; NaN is left white."""
    columns = min(3, len(maps))
    lines = -(-len(maps) // columns)
    figure = new_figure(1.0 + 2.1 * columns, 0.4 + 2.0 * lines)
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis, (layer, values) in zip(axes.flat, maps.items(), strict=False):
        image = axis.imshow(values, cmap=HEAT, vmin=0.0, vmax=1.0)
        axis.set_title(f"layer {layer}")
    for axis in axes.flat[len(maps) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("key position")
    for row in axes:
        row[0].set_ylabel("query position")
    figure.colorbar(image, ax=axes, label="share of heads that keep the pair")
    return figure


def _share(gates: Tensor, pairs: Tensor) -> float | None:
    count = int(pairs.sum())
    return float((gates & pairs).sum()) / count if count else None


def _over_heads(is_open: Tensor, allowed: Tensor) -> NDArray[np.float64]:
    shares: NDArray[np.float64] = is_open.double().mean(0).masked_fill(~allowed, torch.nan).numpy()
    return shares
