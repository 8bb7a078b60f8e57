"""Mechanisms inside models of Hugging Face transformers (5 or later), through its attention interface.

Attention modules of that library look up a function by name at every call and hand it queries, keys and
values. The function registered here, `approx_attn`, passes them to the mechanism that sits on the attention
module; a mask function of the same name keeps padding and causality as structure beside the dense mask.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import eager_mask, sdpa_mask
    from transformers.utils.output_capturing import _active_collector
except ImportError as error:
    raise ImportError("models of Hugging Face need transformers 5 or later: pip install 'approx-attn[hf]'.") from error

from approx_attn.attention import AttentionShape
from approx_attn.attention.multihead import MultiheadAttention
from approx_attn.conversion.feed_forward import converted_blocks
from approx_attn.conversion.huggingface_cache import follow_cache, kept_beside
from approx_attn.conversion.huggingface_masks import mask_from_interface, mask_function
from approx_attn.conversion.layers import CROSS_ATTENTION, SLOT, AttentionLayer, AttentionSlot

IMPLEMENTATION, EAGER_IMPLEMENTATION = "approx_attn", "approx_attn_eager"
"""Names under which the attention and mask functions are registered.

The second is for models that run eager attention, some of which know no other: masks are additive, always
given, and no causal flag is read, which in such models may say anything.
"""

BEYOND_MECHANISMS = {
    "sinks": "an attention sink of each query",
    "indices": "a sparse index",
    "block_indices": "a sparse index",
}
"""Arguments that change attention itself, with what they mean, and that no mechanism knows."""
BEYOND_FUSED = ("softcap", "s_aux", *BEYOND_MECHANISMS)
"""Those that PyTorch's fused attention does not know: a cap on scores and a learned sink of each head, too."""


# -- finding attention modules ---------------------------------------------------------------------------


def interface_attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Qualified name -> module, for every attention module that goes through the attention interface."""
    return {name: module for name, module in model.named_modules() if _uses_interface(type(module))}


def _uses_interface(cls: type) -> bool:
    """Does a method of the class look its function up, with `ALL_ATTENTION_FUNCTIONS.get_interface`?"""
    if issubclass(cls, PreTrainedModel):  # whole models manage the interface, and do not attend themselves
        return False
    functions = (getattr(cls, name, None) for name in dir(cls) if name == "forward" or not name.startswith("__"))
    codes = (getattr(_unwrapped(f), "__code__", None) for f in functions if callable(f))
    return any(code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names for code in codes)


def _unwrapped(function: Any) -> Any:
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def find_interface_layers(model: nn.Module) -> list[AttentionLayer]:
    """The attention layers of `model` that can be converted through the interface, in the order of modules."""
    return [
        AttentionLayer(
            name,
            module,
            host="interface",
            shape=_declared_shape(module),
            causal=getattr(module, "is_causal", False) is True and not CROSS_ATTENTION.search(name),
            max_length=_declared_max_length(name, getattr(module, "config", None)),
        )
        for name, module in interface_attention_modules(model).items()
    ]


def _first_int(owner: Any, *names: str) -> int | None:
    values = (getattr(owner, name, None) for name in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0), None)


def _declared_shape(module: nn.Module) -> AttentionShape | None:
    """Heads and features by the names that attention modules of transformers use; None if they leave it open."""
    config = getattr(module, "config", None)
    head_dim = _first_int(module, "qk_head_dim", "head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
    heads = _first_int(module, "num_heads", "num_attention_heads", "n_heads", "n_head", "num_query_heads")
    if heads is None:
        projection = getattr(module, "q_proj", None)
        if head_dim is not None and isinstance(projection, nn.Linear) and projection.out_features % head_dim == 0:
            heads = projection.out_features // head_dim
        else:
            heads = _first_int(config, "num_attention_heads", "n_head", "num_heads")
    if head_dim is None and heads is not None:
        width = _first_int(module, "all_head_size", "embed_dim", "hidden_size", "dim", "inner_dim")
        width = _first_int(config, "hidden_size", "d_model") if width is None else width
        head_dim = width // heads if width is not None and width % heads == 0 else None
    if heads is None or head_dim is None:
        return None
    groups = _first_int(module, "num_key_value_groups")
    key_value_heads = heads // groups if groups is not None else _first_int(module, "num_key_value_heads") or heads
    return AttentionShape(heads, head_dim, _first_int(module, "v_head_dim") or head_dim, key_value_heads)


def _declared_max_length(name: str, config: Any) -> int | None:
    positions = "max_target_positions" if "decoder" in name else "max_source_positions"
    length = _first_int(config, "max_position_embeddings", positions, "n_positions", "n_ctx", "max_seq_len")
    if length is None:
        image, patch = _first_int(config, "image_size"), _first_int(config, "patch_size")
        length = None if image is None or patch is None else (image // patch) ** 2 + 1
    return length


# -- installing ------------------------------------------------------------------------------------------


def install(layers: list[AttentionLayer], slots: dict[str, AttentionSlot]) -> None:
    """Put slots on attention modules and switch the configs of these modules to the function above.

    Attention modules that share a config with a converted one get an empty slot, which remembers the
    implementation they had.
    """
    configs = {id(layer.module.config) for layer in layers if layer.name in slots}
    sharing = [layer for layer in layers if id(layer.module.config) in configs]
    for layer in sharing:
        before: AttentionSlot | None = getattr(layer.module, SLOT, None)
        slot = slots.get(layer.name) or before or AttentionSlot(layer.name, None, layer.shape, is_cross=layer.is_cross)
        current = layer.module.config._attn_implementation
        slot.replaced = before.replaced if before is not None else current
        slot.eager = _eager_function(layer.module)
        setattr(layer.module, SLOT, slot)
        follow_cache(layer.module, slot, before)
    for layer in sharing:
        eager = getattr(layer.module, SLOT).replaced == "eager"
        _set_implementation(layer.module.config, EAGER_IMPLEMENTATION if eager else IMPLEMENTATION)


def uninstall(layers: list[AttentionLayer], names: Collection[str]) -> None:
    """Take the mechanisms off the named attention modules.

    A config gets the implementation it had back when none of its modules has a mechanism any more.

    Args:
        layers: all layers of the model that go through the interface.
        names: those to give their own attention back.
    """
    groups: dict[int, list[AttentionLayer]] = {}
    for layer in layers:
        if getattr(layer.module, SLOT, None) is not None:
            groups.setdefault(id(layer.module.config), []).append(layer)
    for group in groups.values():
        for layer in group:
            slot: AttentionSlot = getattr(layer.module, SLOT)
            if layer.name in names:
                empty = AttentionSlot(layer.name, None, layer.shape, is_cross=layer.is_cross)
                empty.replaced, empty.eager = slot.replaced, slot.eager
                setattr(layer.module, SLOT, empty)
                follow_cache(layer.module, empty, slot)
        if any(getattr(layer.module, SLOT).spec is not None for layer in group):
            continue
        for layer in group:
            _set_implementation(layer.module.config, getattr(layer.module, SLOT).replaced)
            delattr(layer.module, SLOT)


def _set_implementation(config: Any, implementation: Any) -> None:
    # The public setter would set sub-configs too, whose modules may not be converted.
    config._attn_implementation_internal = implementation


# -- saving ----------------------------------------------------------------------------------------------

OPENED_BY = "approx_attn: this model is converted, open its folder with approx_attn.load_converted"
"""What `config.json` of a converted model has for the name of its attention function.

`from_pretrained` refuses a name that it does not know and shows it, where it would else build exact attention.
"""


def mark_converted(model: nn.Module, save: Callable[..., Any]) -> None:
    """Let every model of transformers in `model`, itself included, be saved as what it is, converted or not.

    Args:
        save: takes the place of `save_pretrained` of a converted model, as `save(model, folder, **options)`.
    """
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        vars(module.config).pop("attn_implementation", None)
        vars(module).pop("save_pretrained", None)
        if _is_converted(module):
            module.config.attn_implementation = OPENED_BY
            # An instance attribute, as in timm.py: copied along by deepcopy, and gone when it is deleted.
            vars(module)["save_pretrained"] = partial(save, module)


def _is_converted(model: nn.Module) -> bool:
    """Does any layer of `model` have other attention than exact, or a block part of its hidden units?"""
    if converted_blocks(model):
        return True
    specs = (m.spec for m in model.modules() if isinstance(m, AttentionSlot | MultiheadAttention))
    return any(spec is not None and spec["name"] != "exact" for spec in specs)


# -- the attention function ------------------------------------------------------------------------------


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention function of transformers: (b, h, n, d) in, (b, n_q, h, d_v) and weights or None out.

    A module without a mechanism of its own keeps the attention that it had.

    Raises:
        ValueError: a request beyond the mechanism, such as weights or attention sinks that it does not have.
    """
    slot: AttentionSlot | None = getattr(module, SLOT, None)
    need_weights = _weights_requested(kwargs)
    if slot is None or slot.is_exact:
        function = _original_function(module, slot, need_weights, kwargs)
        return function(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            position_bias=position_bias,
            **kwargs,
        )
    for argument, meaning in BEYOND_MECHANISMS.items():
        if kwargs.get(argument) is not None:
            raise ValueError(
                f"attention={slot.name} does not support {meaning} ({argument}), which layer {slot.layer} asks for; "
                "leave that layer out with layers=, or use exact."
            )
    cached = kept_beside(slot, key)
    key, value, mask = mask_from_interface(
        slot.layer,
        module,
        query,
        key,
        value,
        attention_mask,
        is_causal=is_causal,
        position_bias=position_bias,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        implementation=module.config._attn_implementation,
    )
    words = {"scale": scaling, "dropout_p": dropout, "need_weights": need_weights}
    output, weights = slot(query, key, value, mask, **words, **cached)
    return output.transpose(1, 2).contiguous(), weights


def _weights_requested(kwargs: dict[str, Any]) -> bool:
    """Does the caller of the model want attention weights?

    Models record what their attention modules return while a collector is active; few pass the request on.
    """
    if kwargs.get("output_attentions"):
        return True
    if torch.compiler.is_compiling():  # a context variable cannot be traced; the library keeps a plain one meanwhile
        collected = _active_collector.global_var
    else:
        collected = _active_collector.get()
    return any("attentions" in key for key in collected or ())


def _original_function(
    module: nn.Module, slot: AttentionSlot | None, need_weights: bool, kwargs: dict[str, Any]
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The exact attention of a module: PyTorch's fused one, or its own eager one where that one cannot."""
    eager_only = any(kwargs.get(argument) is not None for argument in BEYOND_FUSED)
    was_eager = slot is not None and slot.replaced == "eager"
    if not (eager_only or was_eager or need_weights):
        return sdpa_attention_forward
    eager = _eager_function(module) if slot is None else slot.eager
    if eager is None:
        raise ValueError(
            f"{type(module).__name__} has no eager attention, so exact attention returns no weights there."
        )
    return eager if was_eager else _with_additive_mask(eager)


def _eager_function(module: nn.Module) -> Callable[..., Any] | None:
    """The eager attention function that stands beside the class of an attention module, if there is one."""
    namespace = vars(sys.modules[type(module).__module__])
    found = [f for name, f in namespace.items() if name.endswith("eager_attention_forward") and callable(f)]
    return found[0] if len(found) == 1 else None


def _with_additive_mask(eager: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Eager functions add their mask to the scores and know no causal flag."""

    def function(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        is_causal: bool | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        n_q, n_k = query.shape[-2], key.shape[-2]
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if attention_mask is None and causal and n_q > 1:
            attention_mask = torch.ones(n_q, n_k, dtype=torch.bool, device=query.device).tril()[None, None]
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            lowest = torch.full((), torch.finfo(query.dtype).min, dtype=query.dtype, device=query.device)
            attention_mask = torch.where(attention_mask, torch.zeros_like(lowest), lowest)
        if position_bias is not None:
            kwargs["position_bias"] = position_bias
        if is_causal is not None:
            kwargs["is_causal"] = is_causal
        return eager(module, query, key, value, attention_mask, **kwargs)

    return function


for _name, _dense_mask in ((IMPLEMENTATION, sdpa_mask), (EAGER_IMPLEMENTATION, eager_mask)):
    AttentionInterface.register(_name, attention_forward)
    AttentionMaskInterface.register(_name, mask_function(_dense_mask))
