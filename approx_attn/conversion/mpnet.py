"""Mechanisms inside the attention modules of MPNet, which do not go through the attention interface of transformers.

There is no door to them, so their forward pass is written again here, with the mechanism where the softmax was. The
relative position bias that all layers share goes to it as part of the mask.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from approx_attn.attention import AttentionMask, AttentionShape
from approx_attn.conversion.layers import SLOT, AttentionLayer, AttentionSlot


class AttentionInputs(NamedTuple):
    """Query, key, value (b, h, n, d), the mask, and the scale on query-key products."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: AttentionMask
    scale: float


def find_mpnet_layers(model: nn.Module) -> list[AttentionLayer]:
    """The attention modules of MPNet in `model`, in the order of modules."""
    max_length = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return [
        AttentionLayer(
            name,
            module,
            host="mpnet",
            shape=AttentionShape(module.num_attention_heads, module.attention_head_size),
            max_length=max_length,
        )
        for name, module in model.named_modules()
        if (type(module).__module__, type(module).__name__)
        == ("transformers.models.mpnet.modeling_mpnet", "MPNetSelfAttention")
    ]


def install(module: Any, slot: AttentionSlot) -> None:
    """Send the attention of a module through the mechanism in `slot`, which becomes a submodule of it."""
    setattr(module, SLOT, slot)
    # An instance attribute, as in timm.py: copied along by deepcopy, and gone when it is deleted.
    module.forward = partial(_forward, module)


def uninstall(module: Any) -> None:
    """Undo `install`."""
    delattr(module, SLOT)
    del module.forward


def attention_inputs(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> AttentionInputs:
    """What a module attends with, from the arguments of its forward pass.

    Args:
        hidden_states: (b, n, h·d).
        attention_mask: (b, 1, n | 1, n) float, added to the scaled scores; None for no padding.
        position_bias: (b, h, n, n), added, too.
    """
    from approx_attn.conversion.huggingface_masks import mask_from_interface

    heads = (module.num_attention_heads, module.attention_head_size)
    projections = (module.q, module.k, module.v)
    query, key, value = (projection(hidden_states).unflatten(-1, heads).transpose(1, 2) for projection in projections)
    key, value, mask = mask_from_interface(
        "",
        module,
        query,
        key,
        value,
        attention_mask,
        is_causal=False,
        position_bias=position_bias,
        implementation="eager",
    )
    return AttentionInputs(query, key, value, mask, 1.0 / math.sqrt(module.attention_head_size))


def _forward(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, ...]:
    slot: AttentionSlot = getattr(module, SLOT)
    if slot.is_exact:
        words = {"output_attentions": output_attentions, **kwargs}
        return type(module).forward(module, hidden_states, attention_mask, position_bias, **words)
    *inputs, scale = attention_inputs(module, hidden_states, attention_mask, position_bias)
    words = {"scale": scale, "dropout_p": module.dropout.p, "need_weights": output_attentions}
    output, weights = slot(*inputs, **words)
    output = module.o(output.transpose(1, 2).flatten(-2))
    return (output, weights) if output_attentions else (output,)
