"""Caches of Hugging Face transformers, with what a mechanism decodes from beside the keys and values of its layers.

Dynamic caches are lists of layers. Where a mechanism keeps something beside keys (`AttentionMechanism.start_cache`),
the layer of an attention module is replaced, in the list, by one that does the same and tells what becomes of its
keys. Static caches stay as they are: every step is a pass over all keys there.
"""

from __future__ import annotations

import weakref
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    StaticSlidingWindowLayer,
)

from approx_attn.attention import AttentionMechanism
from approx_attn.attention.decoding import DecodingCache
from approx_attn.conversion.layers import AttentionSlot

LEAST_ROOM, ROOM = 256, 8  # keys, and one part in so many of those there, that memory is taken for ahead


class _Watched:
    """A layer of a cache that tells what stands beside it which keys go where."""

    beside: DecodingCache
    owner: weakref.ref[AttentionMechanism]
    keys: Tensor | None

    @classmethod
    def in_place_of(cls, layer: Any) -> Self:
        """With all that `layer` holds."""
        new = cls.__new__(cls)
        vars(new).update(vars(layer))
        return new

    def belong_to(self, mechanism: AttentionMechanism) -> None:
        """Start anew where what stands beside the keys is another mechanism's; keys have all that is needed."""
        if getattr(self, "owner", lambda: None)() is not mechanism:
            beside = mechanism.start_cache()
            assert beside is not None
            self.beside, self.owner = beside, weakref.ref(mechanism)

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.beside.crop(0)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)  # type: ignore[misc]
        self.beside.crop(self.get_seq_length())  # type: ignore[attr-defined]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.beside.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        samples = self._samples().repeat_interleave(repeats)
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.beside.select(samples)

    def batch_select_indices(self, indices: Tensor) -> None:
        samples = self._samples()[indices]
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.beside.select(samples)

    def _samples(self) -> Tensor:
        return torch.arange(0) if self.keys is None else torch.arange(len(self.keys), device=self.keys.device)


class WatchedLayer(_Watched, DynamicLayer):
    """A dynamic layer that does not copy all its keys and values to add one."""

    room: tuple[Tensor, Tensor] | None = None  # what keys and values are the beginning of

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        learns = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        if learns or not self.is_initialized or not self.get_seq_length():  # a prompt is often all there ever is
            self.room = None
            return super().update(key_states, value_states, *args, **kwargs)
        assert self.keys is not None
        assert self.values is not None
        length, stop = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
        if self.room is None or not (
            _begins(self.keys, self.room[0], stop) and _begins(self.values, self.room[1], stop)
        ):
            self.room = _with_room(self.keys, stop), _with_room(self.values, stop)
        for room, states in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, length:stop] = states
        self.keys, self.values = (room[:, :, :stop] for room in self.room)
        return self.keys, self.values


class WatchedSlidingLayer(_Watched, DynamicSlidingWindowLayer):
    """A dynamic layer that drops the keys that have left the window."""


def _begins(x: Tensor, room: Tensor, stop: int) -> bool:
    """Whether x is the beginning of `room`, which has place up to `stop`."""
    same = x.data_ptr() == room.data_ptr() and x.stride() == room.stride() and x.shape[:2] == room.shape[:2]
    return same and stop <= room.shape[2] and (torch.is_inference_mode_enabled() or not room.is_inference())


def _with_room(x: Tensor, stop: int) -> Tensor:
    """A copy of x, and room behind it."""
    room = x.new_empty(*x.shape[:2], stop + max(stop // ROOM, LEAST_ROOM), x.shape[-1])
    room[:, :, : x.shape[2]] = x
    return room


# -- following the cache of a call ------------------------------------------------------------------------


def follow_cache(module: nn.Module, slot: AttentionSlot, before: AttentionSlot | None) -> None:
    """Let `slot` know at every call of `module` which layer of a cache it adds to, if its mechanism decodes from one.

    Args:
        before: the slot that was there.
    """
    if before is not None and before.hook is not None:
        before.hook.remove()
        before.hook = None
    if slot.mechanism is not None and not slot.is_cross and slot.mechanism.start_cache() is not None:
        slot.hook = module.register_forward_pre_hook(_find_layer, with_kwargs=True)


def _find_layer(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():  # with a static cache, which stays as it is
        return
    slot: AttentionSlot = module.approx_attn
    slot.cached = None
    cache = next((x for x in (*args, *kwargs.values()) if isinstance(x, Cache)), None)
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    index = getattr(module, "layer_idx", getattr(module, "layer_id", None))
    if cache is None or cache.offloading or index is None:
        return
    if cache.layer_class_to_replicate is not None:  # layers that it would append itself, as it is added to
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
    if index >= len(cache.layers):
        return
    kinds: dict[type, type[_Watched]]
    kinds = {DynamicLayer: WatchedLayer, DynamicSlidingWindowLayer: WatchedSlidingLayer}
    kind = kinds.get(type(cache.layers[index]))  # no subclass, which may keep more
    if kind is not None:
        cache.layers[index] = kind.in_place_of(cache.layers[index])
    layer = cache.layers[index]
    if isinstance(layer, _Watched):
        assert slot.mechanism is not None
        layer.belong_to(slot.mechanism)
        slot.cached = layer
    elif type(layer) is StaticSlidingWindowLayer:
        slot.cached = layer


def kept_beside(slot: AttentionSlot, key: Tensor) -> dict[str, Any]:
    """The words of `DecodingCache.attend` about a cache, `beside` included, for the keys that it has given out."""
    layer, slot.cached = slot.cached, None
    if layer is None or layer.keys is None or layer.keys.shape[:2] != key.shape[:2]:
        return {}
    is_static = isinstance(layer, StaticSlidingWindowLayer)
    window = layer.max_cache_len if is_static else getattr(layer, "sliding_window", None)
    assert slot.mechanism is not None
    beside = layer.beside if isinstance(layer, _Watched) else slot.mechanism.start_cache()
    return {"beside": beside, "first": max(layer.get_seq_length() - key.shape[-2], 0), "window": window}
