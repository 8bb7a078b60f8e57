"""Queries, keys and values of a live model, taken where its attention layers use them."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from approx_attn.attention import AttentionMask, AttentionMechanism, AttentionShape, Capabilities
from approx_attn.attention.base import Request
from approx_attn.attention.multihead import MultiheadAttention, TorchMultiheadAttention
from approx_attn.conversion import mpnet, timm
from approx_attn.conversion.layers import SLOT

CaptureCallback = Callable[[str, Tensor, Tensor, Tensor, AttentionMask, float], None]
"""(layer_name, query (b, h, n_q, d), key (b, h_kv, n_k, d), value (b, h_kv, n_k, d_v), mask, scale) -> None"""


@contextmanager
def capture_attention_inputs(model: nn.Module, callback: CaptureCallback) -> Iterator[None]:
    """Call `callback` with the inputs of every attention of `model` that runs inside the context.

    Seen are the layers of Hugging Face models that go through the attention interface of transformers, those of
    MPNet, every `torch.nn.MultiheadAttention`, which the models of this package use too, and modules that call
    `scaled_dot_product_attention`, as those of timm do; converted layers as well as unconverted ones. The
    output of the model stays what it is.

    Args:
        model: any module that holds such layers.
        callback: called once per attention call, in the order of the calls, with the qualified name of the
            attention module, query (b, h, n_q, d), key (b, h_kv, n_k, d), value (b, h_kv, n_k, d_v), the
            `AttentionMask` and the scale on query-key products. The tensors are detached, must not be
            changed, and may hold anything where the mask says padding. Position biases, soft caps and sinks stand in
            the mask.

    Raises:
        ValueError: the model holds no layer that can be seen.

    Example:
        >>> with torch.no_grad(), capture_attention_inputs(model, lambda name, q, *rest: print(name, q.shape)):
        ...     model(**batch)
    """
    with ExitStack() as stack:
        multihead = {name: m for name, m in model.named_modules() if isinstance(m, TorchMultiheadAttention)}
        for name, module in multihead.items():
            hook = _multihead_hook(name, module, callback)
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        calling = timm.find_sdpa_layers(model)
        for layer in calling:
            stack.enter_context(_sdpa_calls(layer.name, layer.module, callback))
        written = mpnet.find_mpnet_layers(model)
        for layer in written:
            hook = _mpnet_hook(layer.name, callback)
            stack.callback(layer.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        interface: dict[nn.Module, str] = {}
        if "transformers" in sys.modules:  # no model of that library can be here before it was imported
            from approx_attn.conversion.huggingface import interface_attention_modules

            interface = {module: name for name, module in interface_attention_modules(model).items()}
            stack.enter_context(_interface_calls(interface, callback))
        if not (multihead or calling or written or interface):
            raise ValueError(
                f"{type(model).__name__} holds no torch.nn.MultiheadAttention, no module that calls "
                "scaled_dot_product_attention and no attention layer that goes through the attention interface of "
                "transformers, so nothing can be captured."
            )
        yield


@contextmanager
def attention_observed(model: nn.Module, callback: CaptureCallback) -> Iterator[None]:
    """Show a callback the inputs of every attention layer of a model that runs meanwhile, in evaluation mode."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), capture_attention_inputs(model, callback):
            yield
    finally:
        model.train(was_training)


# -- torch.nn.MultiheadAttention -------------------------------------------------------------------------


class _Recorder(AttentionMechanism):
    """Hands its inputs to a callback and computes nothing."""

    name = "recorder"
    capabilities = Capabilities(window=True)

    def __init__(
        self, shape: AttentionShape, *, record: Callable[[Tensor, Tensor, Tensor, AttentionMask, float], None]
    ) -> None:
        super().__init__(shape)
        self.record = record

    def attend(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> tuple[Tensor, Tensor | None]:
        self.record(query, key, value, request.mask, request.scale)
        return torch.zeros_like(query), None


def _multihead_hook(
    name: str, module: TorchMultiheadAttention, callback: CaptureCallback
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    """A pre-hook that runs the input projections once more, into a mechanism that only records."""

    def record(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float) -> None:
        callback(name, query, key, value, mask, scale)

    layer = MultiheadAttention.from_torch(module, partial(_Recorder, record=record))
    signature = inspect.signature(MultiheadAttention.forward)  # PyTorch's, and coordinates

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = dict(signature.bind(module, *args, **kwargs).arguments)
        del arguments["self"]
        with torch.no_grad():
            layer(**(arguments | {"need_weights": False}))

    return hook


# -- modules of MPNet ------------------------------------------------------------------------------------


def _mpnet_hook(name: str, callback: CaptureCallback) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    """A pre-hook that runs the input projections once more."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch.no_grad():
            callback(name, *mpnet.attention_inputs(module, *args, **kwargs))

    return hook


# -- modules that call scaled_dot_product_attention ------------------------------------------------------


@contextmanager
def _sdpa_calls(name: str, module: nn.Module, callback: CaptureCallback) -> Iterator[None]:
    """Record the calls of one module: before its mechanism if it has one, else where it calls PyTorch's function."""

    def record(
        query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float | None = None, *rest: Any
    ) -> None:
        scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
        callback(name, query.detach(), key.detach(), value.detach(), mask, scale)

    def before_mechanism(slot: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        record(*args[:4], kwargs.get("scale"))

    slot = getattr(module, SLOT, None)
    if slot is not None and not slot.is_exact:
        with slot.register_forward_pre_hook(before_mechanism, with_kwargs=True):
            yield
        return

    def forward(*args: Any, **kwargs: Any) -> Any:
        with timm.SdpaCalls(record):
            return type(module).forward(module, *args, **kwargs)

    before = vars(module).get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before  # type: ignore[method-assign]


# -- attention interface of transformers -------------------------------------------------------------------


@contextmanager
def _interface_calls(names: dict[nn.Module, str], callback: CaptureCallback) -> Iterator[None]:
    """Record the calls that the modules in `names` make through the interface.

    Every attention module of transformers asks `AttentionInterface.get_interface` for its function at every
    call, so wrapping what that method returns sees each of them, eager ones too, and changes no setting.
    """
    from transformers import AttentionInterface

    from approx_attn.conversion.huggingface_masks import mask_from_interface

    original = AttentionInterface.get_interface

    def get_interface(self: AttentionInterface, implementation: str, default: Callable) -> Callable:
        function = original(self, implementation, default)

        def recorded(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
        ) -> Any:
            if module in names:
                q, k, v = query.detach(), key.detach(), value.detach()
                k, v, mask = mask_from_interface(
                    names[module],
                    module,
                    q,
                    k,
                    v,
                    attention_mask,
                    is_causal=kwargs.get("is_causal"),
                    position_bias=kwargs.get("position_bias"),
                    softcap=kwargs.get("softcap"),
                    sinks=kwargs.get("s_aux"),
                    implementation=implementation,
                )
                scaling = kwargs.get("scaling")
                callback(names[module], q, k, v, mask, 1.0 / math.sqrt(q.shape[-1]) if scaling is None else scaling)
            return function(module, query, key, value, attention_mask, *args, **kwargs)

        return recorded

    AttentionInterface.get_interface = get_interface  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        AttentionInterface.get_interface = original  # type: ignore[method-assign]
