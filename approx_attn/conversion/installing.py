"""Where the attention layers of a model are, and how a mechanism gets into them and out again."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping

from torch import nn

from approx_attn.attention import AttentionShape
from approx_attn.attention.multihead import MultiheadAttention, TorchMultiheadAttention
from approx_attn.conversion import mpnet, timm
from approx_attn.conversion.layers import SLOT, AttentionLayer, AttentionSlot


def find_layers(model: nn.Module) -> list[AttentionLayer]:
    """The attention layers of `model` that can be converted, or are, in the order of its modules."""
    layers = timm.find_sdpa_layers(model) + find_multihead_layers(model)
    if "transformers" in sys.modules:  # no model of that library can be here before it was imported
        from approx_attn.conversion import huggingface

        layers += huggingface.find_interface_layers(model) + mpnet.find_mpnet_layers(model)
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    return sorted(layers, key=lambda layer: order[layer.name])


def find_multihead_layers(model: nn.Module) -> list[AttentionLayer]:
    """The `torch.nn.MultiheadAttention` layers of `model`, or the layers of this package in their place."""
    return [
        AttentionLayer(
            name,
            module,
            host="multihead",
            shape=AttentionShape(module.num_heads, module.head_dim, module.head_dim, module.num_heads),
        )
        for name, module in model.named_modules()
        if type(module) in (TorchMultiheadAttention, MultiheadAttention)
    ]


# -- installing ----------------------------------------------------------------------------------------


def install(model: nn.Module, found: list[AttentionLayer], slots: Mapping[str, AttentionSlot]) -> None:
    """Put built mechanisms into the layers of a model.

    Args:
        found: `find_layers(model)`.
        slots: layer name -> slot with its mechanism.
    """
    for layer in found:
        if layer.name in slots:
            _match(slots[layer.name], layer.module)
    interface = [layer for layer in found if layer.host == "interface"]
    if any(layer.name in slots for layer in interface):
        from approx_attn.conversion import huggingface

        huggingface.install(interface, dict(slots))
    for layer in found:
        if layer.name not in slots:
            continue
        if layer.host == "sdpa":
            timm.install(layer.module, slots[layer.name])
        elif layer.host == "mpnet":
            mpnet.install(layer.module, slots[layer.name])
        elif layer.host == "multihead":
            _replace_multihead(model, layer, slots[layer.name])


def _match(slot: AttentionSlot, module: nn.Module) -> None:
    """Move a slot to the device, type and mode of the module it is for."""
    slot.train(module.training)
    reference = next((p for p in module.parameters() if p.is_floating_point()), None)
    if reference is not None:
        slot.to(device=reference.device, dtype=reference.dtype)


def _replace_multihead(model: nn.Module, layer: AttentionLayer, slot: AttentionSlot) -> None:
    if not layer.name:
        raise ValueError("the model is an attention layer itself: use MultiheadAttention.from_torch(layer, attention).")
    ours = isinstance(layer.module, MultiheadAttention)
    replaced = (ours and layer.module.replaced) or (layer.module,)
    attention = "exact" if slot.mechanism is None else slot.mechanism
    converted = MultiheadAttention.from_torch(layer.module, attention)
    converted.spec = slot.spec
    converted.replaced = replaced
    _set_module(model, layer.name, converted)


def uninstall(model: nn.Module, names: Collection[str]) -> None:
    """Give layers of a model, by name, their own attention back."""
    found = find_layers(model)
    interface = [layer for layer in found if layer.host == "interface"]
    if interface:
        from approx_attn.conversion import huggingface

        huggingface.uninstall(interface, names)
    for layer in found:
        if layer.name not in names:
            continue
        if isinstance(layer.module, MultiheadAttention) and layer.module.replaced is not None:
            (original,) = layer.module.replaced
            _set_module(model, layer.name, original.train(layer.module.training))
        elif layer.host == "sdpa" and getattr(layer.module, SLOT, None) is not None:
            timm.uninstall(layer.module)
        elif layer.host == "mpnet" and getattr(layer.module, SLOT, None) is not None:
            mpnet.uninstall(layer.module)


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
