"""Mechanisms inside modules that call `scaled_dot_product_attention` themselves, as those of timm do."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from approx_attn.attention import AttentionMask, AttentionShape
from approx_attn.attention.functional import attention_mask_of
from approx_attn.conversion.layers import SLOT, AttentionLayer, AttentionSlot


def find_sdpa_layers(model: nn.Module) -> list[AttentionLayer]:
    """The modules of `model` whose `forward` calls PyTorch's `scaled_dot_product_attention`.

    Not those of transformers: what they do outside the attention interface is not theirs to be changed here.
    """
    return [
        AttentionLayer(name, module, host="sdpa", shape=_declared_shape(module))
        for name, module in model.named_modules()
        if _calls_sdpa(type(module))
    ]


def _calls_sdpa(cls: type[nn.Module]) -> bool:
    if cls.__module__.startswith("transformers."):
        return False
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)
    return code is not None and "scaled_dot_product_attention" in code.co_names


def _declared_shape(module: nn.Module) -> AttentionShape | None:
    heads, head_dim = getattr(module, "num_heads", None), getattr(module, "head_dim", None)
    if not isinstance(heads, int):
        return None
    if not isinstance(head_dim, int):
        qkv = getattr(module, "qkv", None)
        if not isinstance(qkv, nn.Linear) or qkv.out_features % (3 * heads):
            return None
        head_dim = qkv.out_features // (3 * heads)
    return AttentionShape(heads, head_dim, head_dim, getattr(module, "num_kv_heads", None) or heads)


def install(module: Any, slot: AttentionSlot) -> None:
    """Send the attention of a module through the mechanism in `slot`, which becomes a submodule of it."""
    before: AttentionSlot | None = getattr(module, SLOT, None)
    # timm modules have a second path, which multiplies and normalises in plain sight and cannot be intercepted.
    slot.replaced = before.replaced if before is not None else getattr(module, "fused_attn", None)
    if slot.replaced is not None:
        module.fused_attn = True
    setattr(module, SLOT, slot)
    # An instance attribute that refers to the module: copied along by deepcopy, and gone when it is deleted.
    module.forward = partial(_forward, module)


def uninstall(module: Any) -> None:
    """Undo `install`."""
    replaced = getattr(module, SLOT).replaced
    if replaced is not None:
        module.fused_attn = replaced
    delattr(module, SLOT)
    del module.forward


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    slot: AttentionSlot = getattr(module, SLOT)

    def attend(
        query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float | None, dropout_p: float
    ) -> Tensor:
        return slot(query, key, value, mask, scale=scale, dropout_p=dropout_p)[0]

    with nullcontext() if slot.is_exact else SdpaCalls(attend):
        return type(module).forward(module, *args, **kwargs)


class SdpaCalls(TorchFunctionMode):
    """Sends every call of `scaled_dot_product_attention` inside the context to another function.

    Args:
        attend: called with query (b, h, n_q, d), key, value, `AttentionMask`, scale or None, and dropout_p;
            returns the output (b, h, n_q, d_v), or None to let PyTorch's function run.
    """

    def __init__(self, attend: Callable[..., Tensor | None]) -> None:
        super().__init__()
        self.attend = attend

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        output = self._intercept(*args, **kwargs)
        return func(*args, **kwargs) if output is None else output

    def _intercept(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor | None:
        if query.dim() != 4:
            raise ValueError(f"only (batch, heads, length, dim) attention can be converted, got {tuple(query.shape)}.")
        mask = attention_mask_of(attn_mask, (query.shape[0],), query, key, is_causal)
        return self.attend(query, key, value, mask, scale, dropout_p)
