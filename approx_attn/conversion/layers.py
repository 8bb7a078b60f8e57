"""Attention layers of a model as conversion sees them: where they are, what shape they have, what replaces them."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from approx_attn.attention import AttentionMask, AttentionMechanism, AttentionShape, resolve_attention
from approx_attn.attention.decoding import DecodingCache
from approx_attn.attention.multihead import MultiheadAttention
from approx_attn.attention.registry import attention_class

SLOT = "approx_attn"
"""Name of the submodule that holds the mechanism of a converted attention module."""

KINDS = ("self", "cross", "encoder", "decoder", "encoder-self", "decoder-self", "decoder-cross")
CROSS_ATTENTION = re.compile(r"cross|encoder_attn|encdec|multihead_attn", re.IGNORECASE)
DECODER = re.compile(r"(?<!encoder_)decoder", re.IGNORECASE)


@dataclass(frozen=True)
class AttentionLayer:
    """One attention module that can be converted.

    Attributes:
        name: qualified name in the model.
        module: the attention module.
        host: how its attention is reached: `interface` (transformers), `multihead`
            (`torch.nn.MultiheadAttention`), `sdpa` (calls `scaled_dot_product_attention`) or `mpnet`.
        shape: None where the module does not tell before it runs.
        causal: the module says that it is used under a causal mask.
        max_length: longest input that the model declares; None if it does not.
    """

    name: str
    module: Any
    host: str
    shape: AttentionShape | None
    causal: bool = False
    max_length: int | None = None

    @property
    def is_cross(self) -> bool:
        """Do keys come from another sequence than queries?"""
        flag = getattr(self.module, "is_cross_attention", None)
        return flag if isinstance(flag, bool) else CROSS_ATTENTION.search(self.name) is not None

    @property
    def slot(self) -> AttentionSlot | None:
        """The slot in use; None without one, or if the model was switched to another implementation since."""
        if self.host == "interface" and not str(self.module.config._attn_implementation).startswith(SLOT):
            return None
        return getattr(self.module, SLOT, None)

    @property
    def mechanism(self) -> AttentionMechanism | None:
        """What computes the attention of the layer; None where that is PyTorch's own or built at the first run."""
        if self.host == "multihead":
            return self.module.attention if isinstance(self.module, MultiheadAttention) else None
        slot: AttentionSlot | None = getattr(self.module, SLOT, None)
        return None if slot is None else slot.mechanism

    @property
    def is_decoder(self) -> bool:
        """Does the layer stand in a decoder, by its name or because it is causal?"""
        return self.causal or self.is_cross or DECODER.search(self.name) is not None

    def matches(self, pattern: str | int) -> bool:
        """Is this layer meant by a kind of `KINDS` or a glob pattern of qualified names?"""
        side, kind = "decoder" if self.is_decoder else "encoder", "cross" if self.is_cross else "self"
        if pattern in KINDS:
            return pattern in (side, kind, f"{side}-{kind}")
        return fnmatch.fnmatchcase(self.name, str(pattern))


def select_layers(layers: list[AttentionLayer], patterns: str | Iterable[str] | None) -> list[AttentionLayer]:
    """The layers that at least one pattern means; all if `patterns` is None.

    Raises:
        ValueError: a pattern that means no layer.
    """
    if patterns is None:
        return layers
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in patterns:
        if not any(layer.matches(pattern) for layer in layers):
            names = ", ".join(layer.name for layer in layers[:8]) + (", …" if len(layers) > 8 else "")
            raise ValueError(
                f"layers={pattern!r} means no attention layer of this model; accepted are the kinds "
                f"{', '.join(KINDS)} and glob patterns of these names: {names}."
            )
    return [layer for layer in layers if any(layer.matches(pattern) for pattern in patterns)]


class AttentionSlot(nn.Module):
    """The mechanism of one attention module; a submodule of it, so it trains, moves and is saved with the model.

    Args:
        layer: name of the attention module, for messages.
        spec: `{"name": ..., **options}`; None leaves the attention of the module as it was.
        shape: heads and dimensions; None builds the mechanism at the first call, which only mechanisms without
            parameters can.
        options: `max_length`, `causal`, `layer_index` of the shape.
        is_cross: keys come from another sequence than queries.

    Raises:
        ValueError: an impossible option; a mechanism with parameters without a shape.
    """

    def __init__(
        self,
        layer: str,
        spec: dict[str, Any] | None,
        shape: AttentionShape | None,
        *,
        is_cross: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.layer, self.spec, self.options, self.is_cross = layer, spec, options, is_cross
        self.shape = None if shape is None else replace(shape, **options)
        self.replaced: str | bool | None = None  # what the host has to restore
        self.eager: Callable[..., Any] | None = None  # the module's own attention that returns weights
        self.cached: Any = None  # the layer of a cache that the call under way has added to
        self.hook: RemovableHandle | None = None  # which finds that layer
        self.mechanism: AttentionMechanism | None = None
        if spec is None or spec["name"] == "exact":
            return
        if self.shape is not None:
            self.mechanism = self._build(self.shape)
        elif attention_class(spec["name"]).capabilities.has_parameters:
            raise ValueError(
                f"the numbers of heads and features of layer {layer} cannot be read from its attributes, and "
                f"attention={spec['name']} has parameters of that shape: give example=, one batch of inputs."
            )

    @property
    def name(self) -> str:
        """Name of the mechanism; `exact` also for a layer that was left as it was."""
        return "exact" if self.spec is None else str(self.spec["name"])

    @property
    def is_exact(self) -> bool:
        return self.name == "exact"

    def _build(self, shape: AttentionShape) -> AttentionMechanism:
        assert self.spec is not None
        return resolve_attention(self.spec, shape)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: AttentionMask,
        *,
        scale: float | None = None,
        dropout_p: float = 0.0,
        need_weights: bool = False,
        beside: DecodingCache | None = None,
        **cached: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As `AttentionMechanism.forward`, (b, h, n, d) in and out; as `DecodingCache.attend` where there is one."""
        if self.mechanism is None or self.shape is None or not self.shape.fits(query, key, value):
            self._rebuild(AttentionShape.of(query, key, value, **self.options), query)
        assert self.mechanism is not None
        if query.shape[0] != key.shape[0]:  # learned queries, given once for the whole batch
            query = query.expand(key.shape[0], -1, -1, -1)
        attend: Callable[..., Any] = self.mechanism if beside is None else beside.attend
        words = {"scale": scale, "dropout_p": dropout_p, "need_weights": need_weights}
        return attend(query, key, value, mask, **words, **cached)

    def _rebuild(self, shape: AttentionShape, query: Tensor) -> None:
        if self.mechanism is not None and self.mechanism.capabilities.has_parameters:
            raise ValueError(
                f"layer {self.layer} runs with {shape}, but its attention={self.name} was built for {self.shape}; "
                "convert with example=, one batch of inputs."
            )
        mechanism = self._build(shape).train(self.training)
        dtype = query.dtype if torch.is_floating_point(query) else None
        self.shape, self.mechanism = shape, mechanism.to(device=query.device, dtype=dtype)

    def extra_repr(self) -> str:
        return "left as it was" if self.spec is None else f"attention={self.name}"
