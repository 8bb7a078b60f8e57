"""Steps of decoding as a benchmark runs them: one query at a time behind all keys so far."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from approx_attn.attention import AttentionMask, AttentionMechanism
from approx_attn.diagnosis.benchmark.sources import LayerInputs

STEPS = 64  # of one call: with the usual blocks one run of keys is cut meanwhile, as it is in the long run


def steps_at(length: int) -> int:
    """Steps of one call, the last of which has `length` keys."""
    return min(STEPS, length - 1)


def decode_call(mechanism: AttentionMechanism | None, inputs: LayerInputs) -> Callable[[], Tensor]:
    """The last steps of a sequence as a function that gives their outputs (b, h, steps, d_v), time after time.

    Keys and values of the whole sequence lie in memory, as in a cache that need not grow. What the mechanism keeps
    beside them is taken back to the first of the steps at every call; the first call makes it for all keys before.

    Args:
        mechanism: None for `scaled_dot_product_attention`.
    """
    query, key, value, scale = inputs.query, inputs.key, inputs.value, inputs.scale
    length = key.shape[-2]
    start = length - steps_at(length)
    cache = None if mechanism is None else mechanism.start_cache()
    grouped = query.shape[1] != key.shape[1]

    def step(position: int) -> Tensor:
        stop = position + 1
        one, keys, values = query[:, :, position:stop], key[:, :, :stop], value[:, :, :stop]
        if mechanism is None:
            return F.scaled_dot_product_attention(one, keys, values, scale=scale, enable_gqa=grouped)
        mask = AttentionMask(causal=True, query_offset=position)
        attend = mechanism if cache is None else cache.attend
        return attend(one, keys, values, mask, scale=scale)[0]

    @torch.no_grad()
    def steps() -> Tensor:
        if cache is not None:
            cache.crop(start)
        return torch.cat([step(position) for position in range(start, length)], dim=2)

    return steps
